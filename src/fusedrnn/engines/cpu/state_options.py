"""What a call does with states other than the initial and the final ones: resets, and every state of every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.interface import StateAddresses


class StateOptions(NamedTuple):
    """The operands of a call that concern states inside sequences.

    Attributes:
        resets: Where sequences begin anew, bools (T, N), contiguous, False in the padding; None for nowhere.
        reset_states: The addresses of the states that replace the current ones there, () for zeros; in backward, the
            addresses of their gradients, which kernels add to.
        all_states: For each state, the address of the array of its values at every step of the last layer; 0 or () if
            this is not requested. In backward, the addresses of the gradients of these arrays.
    """

    resets: NDArray[np.bool_] | None = None
    reset_states: StateAddresses = ()
    all_states: StateAddresses = ()

    def values(self, num_letters: int) -> tuple[int, ...]:
        """The values of their symbols, for structs with fields for so many states."""
        marks: Any = self.resets
        address = 0 if marks is None else marks.ctypes.data
        return (*_padded(self.reset_states, num_letters), *_padded(self.all_states, num_letters), address)


def _padded(addresses: StateAddresses, count: int) -> StateAddresses:
    return (*addresses, *(0,) * (count - len(addresses)))
