"""The maths of each cell, written once.

A cell is a function of three things: ``x``, the gate pre-activations that come from the input; ``recur``, which gives
those that come from the recurrent weights applied to whatever it is handed; and ``s``, the previous states. It
returns the new states, the output first. Everything else (the NumPy reference, the kernels) is derived from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedrnn.symbolic import relu, sigmoid, tanh

__all__ = ["CELLS", "Cell", "cell"]


@dataclass(frozen=True)
class Cell:
    """A cell's name, its gates in the order in which weights stack them, its states, and its equations."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    equations: Callable[..., Any]


CELLS: dict[str, Cell] = {}


def cell(name: str, gates: str, states: str) -> Callable[[Callable[..., Any]], Cell]:
    """Register the decorated equations as the cell of that name; gates and states are given one letter each."""

    def register(equations: Callable[..., Any]) -> Cell:
        CELLS[name] = Cell(name, tuple(gates), tuple(states), equations)
        return CELLS[name]

    return register


@cell("rnn_relu", gates="a", states="h")
def rnn_relu(x: Any, recur: Any, s: Any) -> Any:
    h = recur(s.h)
    return relu(x.a + h.a)


@cell("rnn_tanh", gates="a", states="h")
def rnn_tanh(x: Any, recur: Any, s: Any) -> Any:
    h = recur(s.h)
    return tanh(x.a + h.a)


@cell("lstm", gates="ifgo", states="hc")
def lstm(x: Any, recur: Any, s: Any) -> Any:
    h = recur(s.h)
    i = sigmoid(x.i + h.i)
    f = sigmoid(x.f + h.f)
    g = tanh(x.g + h.g)
    o = sigmoid(x.o + h.o)
    c = f * s.c + i * g
    return o * tanh(c), c


@cell("gru", gates="rzn", states="h")
def gru(x: Any, recur: Any, s: Any) -> Any:
    h = recur(s.h)
    r = sigmoid(x.r + h.r)
    z = sigmoid(x.z + h.z)
    n = tanh(x.n + r * h.n)
    return n + z * (s.h - n)
