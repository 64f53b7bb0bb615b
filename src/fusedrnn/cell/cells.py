"""The maths of each cell, written once.

A cell is a function of three things: ``x``, the gate pre-activations that come from the input; ``recur``, which gives
those that come from the recurrent weights applied to whatever it is handed, and projects; and ``s``, the previous
states. It returns the new states, the output first. What a cell leaves open is in its :class:`Variant`. Everything
else (the NumPy reference, the kernels) is derived from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from fusedrnn.cell.activations import Activation
from fusedrnn.cell.expr import Expr
from fusedrnn.cell.leaves import Peephole
from fusedrnn.cell.primitives import clip, clip_nan
from fusedrnn.cell.trace import TracedCell, trace

__all__ = ["CELLS", "Cell", "Variant", "traced"]


@dataclass(frozen=True)
class Variant:
    """A cell with everything that it leaves open; a field is as it is if nothing is said.

    Attributes:
        mode: The cell.
        activations: Its functions in the order in which it has them.
        reset_after: Whether a GRU's r multiplies the recurrent product, not what is multiplied.
        peepholes: Whether an LSTM's gates see the cell state.
        coupled_gates: Whether an LSTM forgets as much as it lets in.
        gate_clip: How large a pre-activation may be either way.
        state_clip: Bounds of an LSTM's cell state, and whether NaN is replaced by the lower one.
        projects: Whether an LSTM's output is projected.
    """

    mode: str
    activations: tuple[Activation, ...]
    reset_after: bool = True
    peepholes: bool = False
    coupled_gates: bool = False
    gate_clip: float | None = None
    state_clip: tuple[float, float, bool] | None = None
    projects: bool = False

    @property
    def slug(self) -> str:
        """A short name, for files: the mode, and if anything is out of the ordinary a number made from it all."""
        if self == FAMILIES[self.mode].default:
            return self.mode
        return f"{self.mode}_{sha256(repr(self).encode()).hexdigest()[:12]}"

    @property
    def has_corners(self) -> bool:
        """Whether derivatives jump somewhere, so that rounding a sum may change them."""
        clips = self.gate_clip is not None or self.state_clip is not None
        return clips or any(one.has_corner for one in self.activations)

    def clipped(self, a: Expr) -> Expr:
        """A pre-activation within its bounds."""
        return a if self.gate_clip is None else clip(a, -self.gate_clip, self.gate_clip)

    def peeking(self, gate: str, a: Expr, c: Expr) -> Expr:
        """A gate's pre-activation, which may see the cell state, within its bounds."""
        return self.clipped(a + Peephole(gate) * c if self.peepholes else a)

    def bounded(self, c: Expr) -> Expr:
        """A cell state within its bounds."""
        if self.state_clip is None:
            return c
        low, high, nan = self.state_clip
        return (clip_nan if nan else clip)(c, low, high)


@dataclass(frozen=True)
class Cell:
    """A cell's name, its gates in the order in which weights stack them, its states, and its equations."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equations: Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """A cell and all its variants: the equations' last argument says which."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    default: Variant
    equations: Callable[..., Any]


FAMILIES: dict[str, Family] = {}


def cell(name: str, gates: str, states: str, activations: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated equations as the cell of that name; gates and states are given one letter each."""

    def register(equations: Callable[..., Any]) -> Callable[..., Any]:
        default = Variant(name, tuple(map(Activation, activations.split())))
        FAMILIES[name] = Family(tuple(gates), tuple(states), default, equations)
        return equations

    return register


@cell("rnn_tanh", gates="a", states="h", activations="tanh")
@cell("rnn_relu", gates="a", states="h", activations="relu")
def rnn(x: Any, recur: Any, s: Any, v: Variant) -> Any:
    (activate,) = v.activations
    h = recur(s.h)
    return activate(v.clipped(x.a + h.a))


@cell("lstm", gates="ifgo", states="hc", activations="sigmoid tanh tanh")
def lstm(x: Any, recur: Any, s: Any, v: Variant) -> Any:
    gate, candidate, output = v.activations
    h = recur(s.h)
    i = gate(v.peeking("i", x.i + h.i, s.c))
    f = 1.0 - i if v.coupled_gates else gate(v.peeking("f", x.f + h.f, s.c))
    g = candidate(v.clipped(x.g + h.g))
    c = v.bounded(f * s.c + i * g)
    o = gate(v.peeking("o", x.o + h.o, c))
    y = o * output(c)
    return recur.project(y) if v.projects else y, c


@cell("gru", gates="rzn", states="h", activations="sigmoid tanh")
def gru(x: Any, recur: Any, s: Any, v: Variant) -> Any:
    gate, candidate = v.activations
    h = recur(s.h)
    r = gate(v.clipped(x.r + h.r))
    z = gate(v.clipped(x.z + h.z))
    n = candidate(v.clipped(x.n + (r * h.n if v.reset_after else recur(r * s.h).n)))
    return n + z * (s.h - n)


def cell_of(variant: Variant) -> Cell:
    """The cell with everything settled."""
    family = FAMILIES[variant.mode]
    gates = tuple(gate for gate in family.gates if not (gate == "f" and variant.coupled_gates))
    return Cell(
        variant.mode, gates, family.states, lambda x, recur, s: family.equations(x, recur, s, variant)
    )


@lru_cache(maxsize=256)
def traced(variant: Variant) -> TracedCell:
    """That cell as expressions."""
    return trace(cell_of(variant))


CELLS: dict[str, Cell] = {name: cell_of(family.default) for name, family in FAMILIES.items()}
"""The cells as they are if nothing is said."""
