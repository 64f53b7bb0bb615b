"""The equations of each cell. The NumPy reference, the kernels and the double backward are derived from them.

Equations are a function of four arguments: ``x``, the pre-activations from the input, by gate; ``recurrent``, which
multiplies its argument by the recurrent weights (or projects it); ``s``, the previous states; and ``v``, the
:class:`Variant`. They return the new states, the output first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from fusedrnn.cell.activations import Activation
from fusedrnn.cell.expr import Expr
from fusedrnn.cell.initial import Initial
from fusedrnn.cell.leaves import ParamVector
from fusedrnn.cell.primitives import clip, clip_nan

__all__ = ["FAMILIES", "Cell", "Family", "Variant", "make_cell"]


@dataclass(frozen=True)
class Cell:
    """A cell: its gates in the order in which weights stack them, its states, its equations, its other parameters.

    Attributes:
        vectors: The names of parameters with one number for each unit, apart from peephole weights.
        scalars: The names of parameters that are one number.
        initial: The initial values of parameters, by name, where they are not the default.
        heads: The number of blocks of block-diagonal recurrent weights; 1 for full weights.
        output: The name of the output if it is not a state; the equations then return it before the new states.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equations: Callable[..., Any]
    vectors: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    initial: tuple[tuple[str, Initial], ...] = ()
    heads: int = 1
    output: str | None = None

    @property
    def recorded_equations(self) -> Callable[..., Any]:
        """Equations for another run, which gives the same result: of a user cell a recording of the first run."""
        return self.equations

    @property
    def slug(self) -> str:
        """A short name for files, different for cells that compute different things."""
        return self.name

    @property
    def digest(self) -> str:
        """What distinguishes cells of one name: of a user cell a hash of its equations and heads."""
        return self.slug

    @property
    def reference(self) -> str:
        """The name of the cell in graphs and files."""
        return self.name

    @property
    def has_kinks(self) -> bool:
        """Whether the derivative jumps somewhere."""
        return False


@dataclass(frozen=True)
class Variant:
    """A cell with all its options.

    Attributes:
        mode: The cell: a key of :data:`FAMILIES`, or a cell that has no options.
        activations: Its activations, in the order in which the equations unpack them.
        reset_after: Whether a GRU's r multiplies the recurrent product rather than the state.
        peepholes: Whether an LSTM's gates see the cell state.
        coupled_gates: Whether an LSTM's f is 1 - i.
        gate_clip: Bound on the size of pre-activations; None for none.
        state_clip: Lower and upper bound of an LSTM's cell state, and whether NaN becomes the lower bound; None for
            no bounds.
        projects: Whether an LSTM's output is projected.
        residual: What layers add to their output: None, ``"identity"`` or ``"projection"``, as in a spec.
    """

    mode: str | Cell
    activations: tuple[Activation, ...] = ()
    reset_after: bool = True
    peepholes: bool = False
    coupled_gates: bool = False
    gate_clip: float | None = None
    state_clip: tuple[float, float, bool] | None = None
    projects: bool = False
    residual: str | None = None

    @property
    def slug(self) -> str:
        """A short name for files: the mode, followed by a hash unless all options are the defaults."""
        if isinstance(self.mode, Cell):
            return self.mode.slug if self.residual is None else f"{self.mode.slug}_{self.residual}"
        if self == FAMILIES[self.mode].default:
            return self.mode
        return f"{self.mode}_{sha256(repr(self).encode()).hexdigest()[:12]}"

    @property
    def has_kinks(self) -> bool:
        """Whether the derivative jumps somewhere, so that a rounding error may change a gradient."""
        if isinstance(self.mode, Cell):
            return self.mode.has_kinks
        clips = self.gate_clip is not None or self.state_clip is not None
        return clips or any(activation.has_kink for activation in self.activations)

    def clip_gate(self, a: Expr) -> Expr:
        """Clip a pre-activation."""
        return a if self.gate_clip is None else clip(a, -self.gate_clip, self.gate_clip)

    def with_peephole(self, gate: str, a: Expr, c: Expr) -> Expr:
        """Add the peephole from ``c`` to a gate's pre-activation, then clip it."""
        return self.clip_gate(a + ParamVector(gate) * c if self.peepholes else a)

    def clip_state(self, c: Expr) -> Expr:
        """Clip a cell state."""
        if self.state_clip is None:
            return c
        low, high, nan = self.state_clip
        return (clip_nan if nan else clip)(c, low, high)


@dataclass(frozen=True)
class Family:
    """All variants of a cell; ``gates`` are those of the default variant."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    default: Variant
    equations: Callable[..., Any]


FAMILIES: dict[str, Family] = {}


def family(name: str, gates: str, states: str, activations: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated equations as the cell ``name``; each gate and state is one letter."""

    def register(equations: Callable[..., Any]) -> Callable[..., Any]:
        default = Variant(name, tuple(map(Activation, activations.split())))
        FAMILIES[name] = Family(tuple(gates), tuple(states), default, equations)
        return equations

    return register


@family("rnn_tanh", gates="a", states="h", activations="tanh")
@family("rnn_relu", gates="a", states="h", activations="relu")
def rnn(x: Any, recurrent: Any, s: Any, v: Variant) -> Any:
    (activate,) = v.activations
    h = recurrent(s.h)
    return activate(v.clip_gate(x.a + h.a))


@family("lstm", gates="ifgo", states="hc", activations="sigmoid tanh tanh")
def lstm(x: Any, recurrent: Any, s: Any, v: Variant) -> Any:
    gate, candidate, output = v.activations
    h = recurrent(s.h)
    i = gate(v.with_peephole("i", x.i + h.i, s.c))
    f = 1.0 - i if v.coupled_gates else gate(v.with_peephole("f", x.f + h.f, s.c))
    g = candidate(v.clip_gate(x.g + h.g))
    c = v.clip_state(f * s.c + i * g)
    o = gate(v.with_peephole("o", x.o + h.o, c))
    y = o * output(c)
    return recurrent.project(y) if v.projects else y, c


@family("gru", gates="rzn", states="h", activations="sigmoid tanh")
def gru(x: Any, recurrent: Any, s: Any, v: Variant) -> Any:
    gate, candidate = v.activations
    h = recurrent(s.h)
    r = gate(v.clip_gate(x.r + h.r))
    z = gate(v.clip_gate(x.z + h.z))
    n = candidate(v.clip_gate(x.n + (r * h.n if v.reset_after else recurrent(r * s.h).n)))
    return n + z * (s.h - n)


def variant_of(spec: Any) -> Variant:
    """The variant that an :class:`fusedrnn.RNNSpec` describes."""
    if isinstance(spec.mode, Cell):
        return Variant(spec.mode, residual=spec.residual)
    default = FAMILIES[spec.mode].default
    state_clip = None
    if spec.state_clip_min is not None and spec.state_clip_max is not None:
        state_clip = spec.state_clip_min, spec.state_clip_max, spec.state_clip_nan
    return replace(
        default,
        activations=spec.activations or default.activations,
        reset_after=spec.reset_after,
        peepholes=spec.peepholes,
        coupled_gates=spec.coupled_gates,
        gate_clip=spec.gate_clip,
        state_clip=state_clip,
        projects=spec.projection_size is not None,
        residual=spec.residual,
    )


RESIDUAL_GATE = "residual"
"""The gate whose rows of the input weights project the input, which is then added to the output."""


def make_cell(variant: Variant) -> Cell:
    """The cell of a variant."""
    cell = _without_residual(variant)
    return _with_projection(cell) if variant.residual == "projection" else cell


def _with_projection(cell: Cell) -> Cell:
    """The cell with one more gate, from the input alone, which is added to its output."""

    def equations(x: Any, recurrent: Any, s: Any, *parameters: Any) -> Any:
        result = cell.recorded_equations(x, recurrent, s, *parameters)
        results = result if isinstance(result, tuple) else (result,)
        states = results if cell.output is None else results[1:]
        return results[0] + getattr(x, RESIDUAL_GATE), *states

    return replace(cell, gates=(*cell.gates, RESIDUAL_GATE), equations=equations, output=cell.output or "output")


def _without_residual(variant: Variant) -> Cell:
    if isinstance(variant.mode, Cell):
        return variant.mode
    of_mode = FAMILIES[variant.mode]
    gates = tuple(gate for gate in of_mode.gates if not (gate == "f" and variant.coupled_gates))
    return Cell(
        variant.mode, gates, of_mode.states, lambda x, recurrent, s: of_mode.equations(x, recurrent, s, variant)
    )
