"""Cells as expressions: run a cell's equations on symbols, see its stages, merge what is only ever added.

The leaves of a traced cell are in :mod:`fusedrnn.cell.leaves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from fusedrnn.cell.expr import Expr, Leaf, substitute, walk
from fusedrnn.cell.leaves import Peephole, PreH, PreSum, PreX, Projected, State

if TYPE_CHECKING:
    from fusedrnn.cell.cells import Cell


@dataclass(frozen=True)
class Stage:
    """One GEMM of a step: its operand, and the gates whose rows of the recurrent weights it uses.

    Attributes:
        operand: What is multiplied: the output of the step before, or something that an earlier stage made.
        gates: Those gates, neighbours in the weights; none in a projection.
        projects: Whether this is the projection, whose weights are its own and whose result is the leaf
            :class:`Projected`.
        merged: Whether the gates' two parts are only ever added, so that a kernel can accumulate onto the input's.
    """

    operand: Expr
    gates: tuple[str, ...]
    projects: bool = False
    merged: bool = False


@dataclass(frozen=True)
class TracedCell:
    """A cell as expressions: its stages in order and its new states, the output first."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    stages: tuple[Stage, ...]
    outputs: tuple[Expr, ...]

    @property
    def merged(self) -> bool:
        """Whether those of all gates are."""
        return all(stage.merged or stage.projects for stage in self.stages)

    @cached_property
    def peepholes(self) -> tuple[str, ...]:
        """The gates that have a peephole weight, in the order of the gates."""
        used = {node.gate for node in walk([*self.outputs, *self.operands]) if isinstance(node, Peephole)}
        return tuple(gate for gate in self.gates if gate in used)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """What the stages behind the first multiply."""
        return tuple(stage.operand for stage in self.stages[1:])

    @cached_property
    def projects(self) -> bool:
        """Whether there is a projection."""
        return any(stage.projects for stage in self.stages)

    def ready_stage(self, node: Expr) -> int:
        """The number of the stage after whose GEMM a node can be computed."""
        ready = 0
        for leaf in walk([node]):
            for number, stage in enumerate(self.stages):
                if isinstance(leaf, Projected):
                    needed = stage.projects
                else:
                    needed = isinstance(leaf, (PreH, PreSum)) and leaf.gate in stage.gates
                if needed:
                    ready = max(ready, number)
        return ready


class _Gates:
    """``x.i``, ``h.i`` or ``s.c``: leaves by attribute; ``used`` collects the names of those read."""

    def __init__(self, leaf: Callable[[str], Leaf], gates: Sequence[str], used: set[str]) -> None:
        self._leaf, self._gates, self._used = leaf, gates, used

    def __getattr__(self, gate: str) -> Expr:
        if gate not in self._gates:
            raise AttributeError(f"the cell has no gate {gate!r}; its gates are {', '.join(self._gates)}")
        self._used.add(gate)
        return self._leaf(gate)


class _Recurrence:
    """What equations call to have something multiplied by the recurrent weights, or projected."""

    def __init__(self, gates: Sequence[str]) -> None:
        self._gates = gates
        self._stages: list[tuple[Expr, set[str], bool]] = []

    def __call__(self, operand: Expr) -> _Gates:
        self._stages.append((operand, set(), False))
        return _Gates(PreH, self._gates, self._stages[-1][1])

    def project(self, operand: Expr) -> Expr:
        self._stages.append((operand, set(), True))
        return Projected()

    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            Stage(operand, tuple(gate for gate in self._gates if gate in used), projects)
            for operand, used, projects in self._stages
        )


@lru_cache(maxsize=64)
def trace(cell: Cell) -> TracedCell:
    """Run a cell's equations on symbols.

    Raises:
        ValueError: If a gate comes from more than one stage, or those of a stage are no neighbours.
    """
    recurrence = _Recurrence(cell.gates)
    result = cell.equations(_Gates(PreX, cell.gates, set()), recurrence, _Gates(State, cell.states, set()))
    outputs = result if isinstance(result, tuple) else (result,)
    stages = recurrence.stages()
    asked = [gate for stage in stages for gate in stage.gates]
    if repeated := {gate for gate in asked if asked.count(gate) > 1}:
        raise ValueError(f"cell {cell.name!r} takes gate {', '.join(sorted(repeated))} from more than one stage")
    return TracedCell(cell.gates, cell.states, stages, outputs)


@lru_cache(maxsize=64)
def merge(traced: TracedCell) -> TracedCell:
    """Exchange x + h for one leaf :class:`PreSum`, in each stage whose gates' two parts are never needed apart.

    A kernel then lets the recurrent GEMM accumulate onto the input's pre-activations. Only the reset-after GRU is left
    as it was: its r multiplies the recurrent part of n alone.
    """
    # What a later stage multiplies may be made of gates too.
    roots = [*traced.outputs, *(stage.operand for stage in traced.stages)]
    stages = []
    for stage in traced.stages:
        sums = {PreX(gate) + PreH(gate): gate for gate in stage.gates}
        merged = substitute(roots, _to_sums(sums))
        apart = {kind(gate) for kind in (PreX, PreH) for gate in stage.gates}
        mergeable = bool(stage.gates) and apart.isdisjoint(walk(merged))
        roots = merged if mergeable else roots
        stages.append(replace(stage, merged=mergeable))
    outputs, operands = roots[: len(traced.outputs)], roots[len(traced.outputs) :]
    if not any(stage.merged for stage in stages):
        return traced
    done = (replace(stage, operand=operand) for operand, stage in zip(operands, stages, strict=True))
    return replace(traced, stages=tuple(done), outputs=tuple(outputs))


def _to_sums(sums: Mapping[Expr, str]) -> Callable[[Expr], Expr | None]:
    return lambda node: PreSum(sums[node]) if node in sums else None
