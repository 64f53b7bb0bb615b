"""What a backend reads of a Keras cell, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

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
        bias = None if cell.bias is None else _tensor_of(cell.bias)
        return cls(_tensor_of(cell.kernel), _tensor_of(cell.recurrent_kernel), bias)


def _tensor_of(weight: Any) -> Any:
    """The tensor of a variable, or of what a user has put in its place, as weight normalization and weight drop do."""
    return weight.value if isinstance(weight, keras.Variable) else keras.ops.convert_to_tensor(weight)
