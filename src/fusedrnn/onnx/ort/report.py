"""The report of :func:`accelerate`: which recurrent nodes of a model were replaced, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeReport:
    """A recurrent node.

    Attributes:
        name: As in :attr:`fusedrnn.onnx.Layer.name`; in the body of another node it is a path.
        operator: Its operator, such as ``LSTM``.
        in_body: Whether it is in the body of an If, a Loop or a Scan.
        sizes: I, H and the number of directions; None if they are not known.
        replaced: Whether it runs on the fused operator.
        reason: Why it was replaced, or why not.
        seconds: The seconds of its fastest run, in ONNX Runtime and on the fused operator; None if not measured.
    """

    name: str
    operator: str
    in_body: bool
    sizes: tuple[int, int, int] | None
    replaced: bool
    reason: str
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Report:
    """Which recurrent nodes of a model were replaced, and how that changes its time. ``str(report)`` is a table.

    Attributes:
        nodes: The recurrent nodes, in the order of the graph.
        reason: Why nodes were replaced, or why none were.
        num_threads: The most threads of a replaced node.
        recurrent_share: The recurrent nodes' share of the time in ONNX Runtime alone; None if not measured.
        seconds: The median seconds of a run, in ONNX Runtime alone and with the faster nodes replaced; None if not
            measured.
    """

    nodes: tuple[NodeReport, ...]
    reason: str
    num_threads: int
    recurrent_share: float | None = None
    seconds: tuple[float, float] | None = None

    @property
    def num_replaced(self) -> int:
        """How many nodes run on the fused operator."""
        return sum(node.replaced for node in self.nodes)

    def __str__(self) -> str:
        lines = [f"{self.num_replaced} of {len(self.nodes)} recurrent nodes replaced: {self.reason}"]
        if self.recurrent_share is not None:
            lines.append(f"recurrent nodes take {self.recurrent_share:.0%} of the time in ONNX Runtime alone")
        if self.seconds is not None:
            before, after = self.seconds
            lines.append(f"ONNX Runtime alone {before * 1e6:.0f} us, with replaced nodes {after * 1e6:.0f} us")
        for node in self.nodes:
            sizes = "" if node.sizes is None else " I={} H={} D={}".format(*node.sizes)
            times = ""
            if node.seconds is not None:
                times = " ({:.0f} us in ONNX Runtime, {:.0f} us here)".format(*(1e6 * time for time in node.seconds))
            verb = "replaced" if node.replaced else "left"
            lines.append(f"  {node.name} {node.operator}{sizes}: {verb}, {node.reason}{times}")
        return "\n".join(lines)
