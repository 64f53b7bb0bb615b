"""What a backend reads of a Keras cell, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

Results = tuple[Any, tuple[Any, ...]]
"""The output (T, N, D·H) and the final states, each (D, N, H)."""


class Parameters(NamedTuple):
    """The tensors of a Keras cell.

    Attributes:
        kernel: (I, G·H).
        recurrent_kernel: (H, G·H).
        bias: (G·H,), of a GRU with ``reset_after`` (2, G·H), or None.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any

    @classmethod
    def of(cls, cell: Any) -> Parameters:
        """The current tensors of a cell, in the dtype in which the calling layer computes."""
        bias = None if cell.bias is None else cell.bias.value
        return cls(cell.kernel.value, cell.recurrent_kernel.value, bias)
