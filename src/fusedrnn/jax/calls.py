"""The jobs for XLA: a call of the operator, with its optional operands and the order of its buffers, or transposes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from fusedrnn.cell.activations import Activation
from fusedrnn.cell.cells import Cell
from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.launch.kernel_args import state_symbols
from fusedrnn.engines.cpu.weights.transpose_kernel import Block
from fusedrnn.jax.array_layout import ArrayLayout, Piece
from fusedrnn.lazy import cached_property
from fusedrnn.spec import RNNSpec

JobKind = Literal["forward", "training", "backward"]
"""What a job computes, as exported programs name it; ``"forward"`` is inference."""
OPTIONAL = "states", "lengths", "resets", "seed"
"""Optional operands of a call; they follow x and params in this order."""


@dataclass(frozen=True)
class Call:
    """A call: its network, and which optional operands it has.

    Attributes:
        spec: The network.
        options: The members of :data:`OPTIONAL` that are given, in that order.
        batch_first: Whether input and output are (N, T, features); else they are (T, N, features).
        arrays: The layout of the arrays of parameters; None if they are the flat vector.
    """

    spec: RNNSpec
    options: tuple[str, ...] = ()
    batch_first: bool = False
    arrays: ArrayLayout | None = None

    @property
    def num_states(self) -> int:
        """The number of states of the cell."""
        return len(self.spec.state_names)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """T and N, from the shape of an input."""
        return (shape[1], shape[0]) if self.batch_first else (shape[0], shape[1])

    @cached_property
    def param_names(self) -> list[str]:
        """The names of the operands that are parameters."""
        return ["params"] if self.arrays is None else [f"params{number}" for number in range(len(self.arrays.shapes))]

    @cached_property
    def initial_names(self) -> list[str]:
        """The names of the operands that are initial states."""
        return self._state_buffers("{}0") if "states" in self.options else []

    @cached_property
    def operand_names(self) -> list[str]:
        """The names of the operands of forward."""
        return ["x", *self.param_names, *self.initial_names, *(name for name in OPTIONAL[1:] if name in self.options)]

    @property
    def num_floats(self) -> int:
        """The number of operands that have gradients. They come first: input, parameters, initial states."""
        return 1 + len(self.param_names) + len(self.initial_names)

    def _state_buffers(self, form: str) -> list[str]:
        """The names of one array for each state, in a form such as ``"{}0"``."""
        return state_symbols(state_letters(self.num_states)[: self.num_states], form)

    def pieces(self, operands: Any) -> dict[str, Any]:
        """The operands by name. Parameters and states are tuples; the states are None if none are given."""
        by_name = dict(zip(self.operand_names, operands, strict=True))
        params, states = (tuple(map(by_name.__getitem__, names)) for names in (self.param_names, self.initial_names))
        return {
            "x": by_name["x"], "params": params, "states": states or None,
            **{name: by_name.get(name) for name in OPTIONAL[1:]},
        }  # fmt: skip

    def buffers(self, kind: JobKind, needs: Needs | None = None) -> list[str]:
        """The name of each buffer of a job, operands before results; "" for a buffer that it does not use."""
        params = dict(zip(self.param_names, ["params", *[""] * (len(self.param_names) - 1)], strict=True))
        operands = [params.get(name, name) for name in self.operand_names]
        if kind != "backward":
            results = ["y", *self._state_buffers("{}_n")]
            return [*operands, *results, *(["reserve"] if kind == "training" else [])]
        assert needs is not None
        used = "params", "lengths", "resets", "seed"
        own = [name if name in used else "" for name in operands]
        results = [*(["dx"] if needs.x else []), *(["dparams"] if needs.params else [])]
        results += self._state_buffers("d{}0") if needs.states else []
        return [*own, "reserve", "dy", *self._state_buffers("d{}_n"), *results]


@dataclass(frozen=True)
class Needs:
    """The operands whose gradients a backward call computes."""

    x: bool
    params: bool
    states: bool


class NetworkJob(NamedTuple):
    """A call of the operator, forward or backward; only backward has ``needs``."""

    call: Call
    kind: JobKind
    needs: Needs | None


class TransposeJob(NamedTuple):
    """Transposes of blocks of buffers, with elements of one dtype. Operands come before results."""

    dtype: str
    blocks: tuple[Block, ...]


Job = NetworkJob | TransposeJob


@lru_cache(maxsize=1024)
def describe(job: Job) -> tuple[int, str]:
    """The key of a job and its description. From these, :func:`restore` makes the job again in another process."""
    text = json.dumps(_network_values(job) if isinstance(job, NetworkJob) else {"job": "transpose", **job._asdict()})
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    if isinstance(job, NetworkJob) and isinstance(job.call.spec.mode, Cell):
        _known[key] = job
    return key, text


def _network_values(job: NetworkJob) -> dict[str, Any]:
    spec = job.call.spec
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    cell = None
    if isinstance(spec.mode, Cell):
        # Not the slug, which names kernels: cells that differ in the number of heads have the same kernels.
        values["mode"], cell = spec.mode.name, spec.mode.digest
    if spec.activations is not None:
        values["activations"] = [asdict(activation) for activation in spec.activations]
    return {
        "job": job.kind, "spec": values, "cell": cell, "options": job.call.options,
        "batch_first": job.call.batch_first, "arrays": job.call.arrays,
        "needs": None if job.needs is None else asdict(job.needs),
    }  # fmt: skip


_known: dict[int, Job] = {}
"""The jobs of user cells, by key. A description does not restore these, so they stay as long as the process."""


def restore(key: int, text: str) -> Job:
    """The job with that key and description.

    Raises:
        LookupError: If its network has a user cell that this process has not used yet.
    """
    if key in _known:
        return _known[key]
    values = json.loads(text)
    if values["job"] == "transpose":
        return TransposeJob(values["dtype"], tuple(Block(*block) for block in values["blocks"]))
    spec = values["spec"]
    if values["cell"] is not None:
        raise LookupError(
            f"the exported function has a network of the cell {spec['mode']!r}, which this process does not know: "
            "trace fusedrnn.jax.rnn with that cell and the same options once before calling it"
        )
    if spec["activations"] is not None:
        spec["activations"] = tuple(Activation(**activation) for activation in spec["activations"])
    arrays = None
    if values["arrays"] is not None:
        shapes, pieces = values["arrays"]
        arrays = ArrayLayout(tuple(map(tuple, shapes)), tuple(Piece(*piece) for piece in pieces))
    call = Call(RNNSpec(**spec), tuple(values["options"]), values["batch_first"], arrays)
    return NetworkJob(call, values["job"], None if values["needs"] is None else Needs(**values["needs"]))
