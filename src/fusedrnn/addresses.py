"""Operands by address: for those who hold their data otherwise than in NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Strided = tuple[int, int, int]
"""An array (T, N, features) in memory, elements side by side: its address, and the bytes of a step and of a row."""
NOWHERE: Strided = (0, 0, 0)


class Wanted(NamedTuple):
    """Where gradients go: addresses, 0 for those that nobody wants, and whether to add to what is there.

    ``params`` are in the order of ``ParameterLayout.by_pass``; ``states`` are dh0 and dc0, 0 without a c.
    """

    x: Strided
    params: Sequence[int]
    states: tuple[int, int]
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False
