"""The inputs of a cell's expressions, one class each.

A traced cell reads ``PreX``, ``PreH`` (or their sum ``PreSum``), ``State``, ``Peephole`` and ``Projected``. Its
derivative reads ``State``, ``NewState``, ``Peephole``, ``Saved``, ``StateCotangent`` and ``OperandCotangent``. A stage
of a kernel stores a ``NewState``, a ``StageOperand`` or a ``Saved``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.cell.expr import Leaf


@dataclass(frozen=True)
class PreX(Leaf):
    """A gate's pre-activation from the input: a row of ``W x + b``."""

    gate: str


@dataclass(frozen=True)
class PreH(Leaf):
    """A gate's pre-activation from the recurrent weights: a row of ``U h + c``."""

    gate: str


@dataclass(frozen=True)
class PreSum(Leaf):
    """``PreX + PreH`` of a gate, summed by the recurrent GEMM."""

    gate: str


@dataclass(frozen=True)
class Peephole(Leaf):
    """An element of a gate's peephole weight."""

    gate: str


@dataclass(frozen=True)
class Projected(Leaf):
    """The result of the projection."""


@dataclass(frozen=True)
class State(Leaf):
    """A state before the step."""

    name: str


@dataclass(frozen=True)
class NewState(Leaf):
    """A state after the step."""

    name: str


@dataclass(frozen=True)
class StageOperand(Leaf):
    """What a stage multiplies by its weights; ``stage`` is 1 or more, since stage 0 multiplies a state."""

    stage: int


@dataclass(frozen=True)
class Saved(Leaf):
    """A forward value from the reserve: element ``index`` of ``Derivative.saved``."""

    index: int


@dataclass(frozen=True)
class StateCotangent(Leaf):
    """The gradient of the loss with respect to a new state."""

    name: str


@dataclass(frozen=True)
class OperandCotangent(Leaf):
    """The gradient of the loss with respect to a stage's operand."""

    stage: int
