"""The inputs of a cell's expressions, one class each.

A traced cell reads ``PreX``, ``PreH`` (or their sum ``PreSum``), ``RawInput``, ``State``, ``ParamVector``,
``ParamScalar``, ``Projected``, ``RowMean``, ``RowVariance`` and ``Mask``. Its derivative reads ``State``, ``NewState``,
``ParamVector``, ``ParamScalar``, ``RowMean``, ``RowVariance``, ``Saved`` and the cotangents. A stage of a kernel stores
a ``NewState``, an ``Output``, a ``StageOperand``, a ``ReducedRow``, a ``KeptProduct`` or a ``Saved``.

For error messages, the text of a leaf that equations read is what equations write, such as ``x.f``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusedrnn.cell.expr import Leaf


@dataclass(frozen=True, repr=False, eq=False)
class _OfGate(Leaf):
    gate: str


@dataclass(frozen=True, repr=False, eq=False)
class _OfName(Leaf):
    name: str


@dataclass(frozen=True, repr=False, eq=False)
class _OfStage(Leaf):
    stage: int


class PreX(_OfGate):
    """A gate's pre-activation from the input: a row of ``W x + b``."""

    def __repr__(self) -> str:
        return f"x.{self.gate}"


class PreH(_OfGate):
    """A gate's pre-activation from the recurrent weights: a row of ``U h + c``."""

    def __repr__(self) -> str:
        return f"recurrent(...).{self.gate}"


class PreSum(_OfGate):
    """``PreX + PreH`` of a gate, summed by the recurrent GEMM."""

    def __repr__(self) -> str:
        return f"(x.{self.gate} + recurrent(...).{self.gate})"


@dataclass(frozen=True, repr=False, eq=False)
class RawInput(Leaf):
    """An element of the layer's input itself, where it has as many features as there are units."""

    def __repr__(self) -> str:
        return "x.raw"


class ParamVector(_OfName):
    """An element of a parameter with one number for each unit, such as the peephole weight of a gate."""

    def __repr__(self) -> str:
        return f"p.{self.name}"


class ParamScalar(_OfName):
    """A parameter that is one number."""

    def __repr__(self) -> str:
        return f"p.{self.name}"


Parameter = ParamVector | ParamScalar


@dataclass(frozen=True, repr=False, eq=False)
class Projected(Leaf):
    """The result of the projection."""


@dataclass(frozen=True, repr=False, eq=False)
class Mask(_OfName):
    """1 with probability ``keep``, else 0, for a unit at a step or in a whole sequence; in inference ``keep``."""

    keep: float
    per_sequence: bool

    def __repr__(self) -> str:
        return f"mask({self.name!r}, {self.keep:g})"


class State(_OfName):
    """A state before the step."""

    def __repr__(self) -> str:
        return f"s.{self.name}"


class NewState(_OfName):
    """A state after the step."""


@dataclass(frozen=True, repr=False, eq=False)
class Output(Leaf):
    """The output of a step, in a cell whose output is not a state."""


@dataclass(frozen=True, repr=False, eq=False)
class _OfReduction(_OfStage):
    index: int


class RowMean(_OfReduction):
    """The mean over the units of a row, by reduction ``index`` of a stage."""

    def __repr__(self) -> str:
        return "mean(...)"


class RowVariance(_OfReduction):
    """The variance over the units of a row, by reduction ``index`` of a stage."""

    def __repr__(self) -> str:
        return "variance(...)"


class MeanCotangent(_OfReduction):
    """The gradient of the loss with respect to a :class:`RowMean`, divided by the number of its values."""


class VarianceCotangent(_OfReduction):
    """The gradient of the loss with respect to a :class:`RowVariance`, divided by the number of its values."""


class StateCotangent(_OfName):
    """The gradient of the loss with respect to a new state."""


@dataclass(frozen=True, repr=False, eq=False)
class OutputCotangent(Leaf):
    """The gradient of the loss with respect to an :class:`Output`."""


class KeptProduct(_OfGate):
    """A ``PreH`` that a stage stores because later stages read it."""


class StageOperand(_OfStage):
    """What a stage multiplies by its weights; ``stage`` is 1 or more, since stage 0 multiplies a state."""


class ReducedRow(_OfReduction):
    """A row that a stage of reductions reads: value ``index`` of all values that it reduces."""


class OperandCotangent(_OfStage):
    """The gradient of the loss with respect to a stage's operand."""


@dataclass(frozen=True, repr=False, eq=False)
class Saved(Leaf):
    """A forward value from the reserve: element ``index`` of ``Derivative.saved``."""

    index: int
