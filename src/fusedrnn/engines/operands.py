"""The operands of a call: what validation hands to an engine, and the rules that checked and cached calls share.

A checked call looks at every argument and raises the errors. A cached call repeats a checked one on other arrays of
the same kind, and leaves whatever it does not accept to the checked call. It accepts nothing that a checked call
refuses:

- Both unpack arguments with :func:`entries` and :func:`misplaced_buffer`, and take from the tables below how a call
  uses each array.
- What a checked call requires of an array depends on its type, dtype, shape, strides and flags alone. A cached call
  compares all of these with those of an array that has been checked.
- A checked call refuses a written array that shares memory with another. A cached call refuses one that may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np

from fusedrnn.arrays import Array

GradReq = Literal["write", "add", "null"]
GRAD_REQS: tuple[GradReq, ...] = ("write", "add", "null")


class ForwardOperands(NamedTuple):
    """The arrays of a forward call, checked.

    Attributes:
        x: Input (T, N, I), its last axis contiguous.
        params: The flat parameter vector, contiguous. With a ``compute`` that has int8 weights, it may also be
            :class:`fusedrnn.quantized_params.QuantizedParams`.
        states: ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size) and contiguous; None for zeros.
        lengths: Valid steps of each sequence, int64 (N,); None for T everywhere.
        y: Output (T, N, D·S), its last axis contiguous. An engine does not write its padding.
        resets: Bools (T, N), contiguous: whether the states of a sequence are replaced before a step. False in the
            padding. None for no resets.
        reset_states: What replaces the states, like ``states``; None for zeros.
        all_states: Where the other states of every step of the last layer go, (T, N, D·H) each and contiguous, in the
            order of ``RNNSpec.other_states``; an engine does not write their padding. Empty if they are not requested.
    """

    x: Array
    params: Any
    states: Sequence[Array] | None
    lengths: Array | None
    y: Array
    resets: Array | None = None
    reset_states: Sequence[Array] | None = None
    all_states: Sequence[Array] = ()


class GradBuffers(NamedTuple):
    """Arrays that an engine writes gradients into, or adds them to; None for gradients that are not computed.

    Attributes:
        x: (T, N, I), its last axis contiguous. An engine does not write its padding.
        params: The flat vector, contiguous.
        states: One array (L·D, N, size) for each initial state, contiguous.
        add_x: Whether to add to ``x`` instead of overwriting it.
        add_params: Whether to add to ``params``.
        add_states: Whether to add to ``states``.
        reset_states: Like ``states``, for the states of resets.
        add_reset_states: Whether to add to ``reset_states``.
    """

    x: Array | None
    params: Array | None
    states: tuple[Array, ...] | None
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False
    reset_states: tuple[Array, ...] | None = None
    add_reset_states: bool = False

    @property
    def grad_reqs(self) -> tuple[GradReq, ...]:
        """The requests for x, the parameters and the states that these buffers answer."""
        return requests_of(self)


def requests_of(grads: Any) -> tuple[GradReq, ...]:
    """The requests that these buffers answer; their first six fields are those of :class:`GradBuffers`."""
    pairs = zip(grads[:3], grads[3:6], strict=True)
    return tuple("null" if buffer is None else "add" if add else "write" for buffer, add in pairs)


class BackwardOperands(NamedTuple):
    """The arrays of a backward call, checked.

    Attributes:
        dy: Gradient of the output (T, N, D·S), its last axis contiguous; None for zero. Padding may hold anything.
        dstates: Gradient of each final state, (L·D, N, size) and contiguous; None for zero.
        grads: Where the gradients go.
        dall_states: Gradient of each of :attr:`ForwardOperands.all_states`, contiguous; None for zero. Padding may hold
            anything.
    """

    dy: Array | None
    dstates: Sequence[Array | None]
    grads: GradBuffers
    dall_states: Sequence[Array | None] = ()


class ArrayUse(NamedTuple):
    """How a call uses one of its arrays.

    Attributes:
        written: Whether the call writes it; else it reads it.
        contiguous: Whether it must be contiguous as a whole; else its last axis alone.
    """

    written: bool
    contiguous: bool


def forward_uses(letters: str) -> dict[str, ArrayUse]:
    """How a forward call uses its arrays, by name, in the order in which a cached call passes them to machine code.

    ``letters`` are the letters of the states, ``"hc"`` and further ones.
    """
    return {
        "x": ArrayUse(written=False, contiguous=False),
        "params": ArrayUse(written=False, contiguous=True),
        **{f"{letter}0": ArrayUse(written=False, contiguous=True) for letter in letters},
        "y": ArrayUse(written=True, contiguous=False),
        **{f"{letter}_n": ArrayUse(written=True, contiguous=True) for letter in letters},
    }


RESETS_USE = {"resets": ArrayUse(written=False, contiguous=True)}
"""The use of the last array of a call that has resets; backward reads those of the forward call."""


def backward_uses(letters: str) -> dict[str, ArrayUse]:
    """How a backward call uses its arrays, likewise."""
    return {
        "dy": ArrayUse(written=False, contiguous=False),
        **{f"d{letter}_n": ArrayUse(written=False, contiguous=True) for letter in letters},
        "dx": ArrayUse(written=True, contiguous=False),
        "dparams": ArrayUse(written=True, contiguous=True),
        **{f"d{letter}0": ArrayUse(written=True, contiguous=True) for letter in letters},
    }


FORWARD_USES, BACKWARD_USES = forward_uses("hc"), backward_uses("hc")
"""The uses of the arrays of calls with one or two states; a further state is used like these."""


def entries(value: object, count: int) -> Sequence[Any] | None:
    """``value`` if it is a sequence of ``count`` entries, as states and buffers are given; else None."""
    # The usual types first: isinstance of an abstract class takes longer.
    if type(value) is tuple or type(value) is list or is_sequence(value):
        return value if len(value) == count else None
    return None


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` can hold several operands; an array or a string cannot."""
    return isinstance(value, Sequence) and not isinstance(value, (np.ndarray, str, bytes))


def misplaced_buffer(grad_reqs: Sequence[GradReq], buffers: Sequence[object]) -> int | None:
    """The index of the first buffer that does not fit its request; None if all do.

    ``"add"`` needs a buffer, ``"null"`` must have none.
    """
    for index, grad_req in enumerate(grad_reqs):
        if grad_req != "write" and (buffers[index] is None) is (grad_req == "add"):
            return index
    return None


def comparable(grad_req: object) -> object:
    """A ``grad_req`` argument in a form to compare with another call's; one of unusual type equals no other."""
    if type(grad_req) is str:
        return grad_req
    if type(grad_req) is dict and all(type(name) is type(value) is str for name, value in grad_req.items()):
        return tuple(sorted(grad_req.items()))
    return object()


def clear_padding(array: Array, lengths: Array) -> None:
    """Set the padding of an array (T, N, features) to zero."""
    for index, length in enumerate(lengths):
        array[length:, index] = 0


def write_or_add(buffer: Array, gradient: Array, add: bool) -> None:
    """Write a gradient into its buffer, or add it."""
    if add:
        np.add(buffer, gradient, out=buffer)
    else:
        buffer[...] = gradient
