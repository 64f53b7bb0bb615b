"""The operands of a call: what the checked call and the cached call are both made from.

A checked call looks at every argument and raises the errors. A cached call repeats a checked one on other arrays of
the same kind, and hands over to the checked call whatever it does not accept. It accepts nothing that a checked call
refuses:

- Both take arguments apart with :func:`entries` and :func:`misplaced`, and take from the tables what a call does with
  each array.
- What a checked call asks of an array depends on its type, dtype, shape, strides and flags alone. A cached call
  compares all of these with those of an array that has been checked.
- A checked call refuses arrays that share memory where one is written. A cached call refuses those that may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np

Request = Literal["write", "add", "null"]
REQUESTS: tuple[Request, ...] = ("write", "add", "null")


class Operand(NamedTuple):
    """An array of a call.

    Attributes:
        written: Whether the call writes to it; else it reads.
        contiguous: Whether it must be contiguous as a whole; else its last axis alone.
    """

    written: bool
    contiguous: bool


FORWARD = {
    "x": Operand(written=False, contiguous=False),
    "params": Operand(written=False, contiguous=True),
    "h0": Operand(written=False, contiguous=True),
    "c0": Operand(written=False, contiguous=True),
    "y": Operand(written=True, contiguous=False),
    "h_n": Operand(written=True, contiguous=True),
    "c_n": Operand(written=True, contiguous=True),
}
"""The operands of a forward call by name, in the order in which machine code is given them."""
BACKWARD = {
    "dy": Operand(written=False, contiguous=False),
    "dh_n": Operand(written=False, contiguous=True),
    "dc_n": Operand(written=False, contiguous=True),
    "dx": Operand(written=True, contiguous=False),
    "dparams": Operand(written=True, contiguous=True),
    "dh0": Operand(written=True, contiguous=True),
    "dc0": Operand(written=True, contiguous=True),
}
"""The same of a backward call."""


def entries(value: object, count: int) -> Sequence[Any] | None:
    """``value`` if it is a sequence of so many entries, as states and buffers come; else None."""
    # The usual types first: to ask an abstract class takes longer.
    if type(value) is tuple or type(value) is list or is_sequence(value):
        return value if len(value) == count else None
    return None


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether ``value`` holds operands one after the other; an array or a string does not."""
    return isinstance(value, Sequence) and not isinstance(value, (np.ndarray, str, bytes))


def misplaced(requests: Sequence[Request], buffers: Sequence[object]) -> int | None:
    """The first gradient whose buffer does not go with its request; None if all do.

    To add needs a buffer, and a gradient that is not computed must have none.
    """
    for number, request in enumerate(requests):
        if request != "write" and (buffers[number] is None) is (request == "add"):
            return number
    return None
