"""Where the gradients of one call go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.operand_table import Request

Array = NDArray[Any]


@dataclass(frozen=True)
class Gradients:
    """Arrays for an engine to write gradients into, or to add them to; None for those that nobody wants.

    Attributes:
        x: (T, N, I), its last axis contiguous. Nothing is written behind a sequence's length.
        params: The flat vector, contiguous.
        states: One array (L·D, N, size) for each initial state, contiguous.
        add_x: Whether to add to ``x`` instead of overwriting it.
        add_params: Whether to add to ``params``.
        add_states: Whether to add to ``states``.
    """

    x: Array | None
    params: Array | None
    states: tuple[Array, ...] | None
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False

    @property
    def requests(self) -> tuple[Request, Request, Request]:
        """What was asked for of x, the parameters and the states."""
        return (
            _request(self.x, self.add_x), _request(self.params, self.add_params), _request(self.states, self.add_states)
        )  # fmt: skip


def _request(array: object, add: bool) -> Request:
    return "null" if array is None else "add" if add else "write"


def plain(request: object) -> object:
    """What a request for gradients says, to be compared with that of other calls; what is not plain equals nothing."""
    if type(request) is str:
        return request
    if type(request) is dict and all(type(name) is type(each) is str for name, each in request.items()):
        return tuple(sorted(request.items()))
    return object()


def clear_padding(array: Array, lengths: Array | None) -> None:
    """Zeros into an array (T, N, features) behind each sequence's length."""
    for row, length in enumerate(() if lengths is None else lengths):
        array[length:, row] = 0


def put(into: Array, gradient: Array, add: bool) -> None:
    """Write a gradient into its array, or add it."""
    if add:
        np.add(into, gradient, out=into)
    else:
        into[...] = gradient
