"""Steps that are not masked: moved to the front for the operator, and their outputs moved back.

At a masked step Keras keeps the states. The operator does the same in the padding after the end of a sequence. So a
batch with any mask is a batch of right-padded sequences, once masked steps have been moved behind the others.

All steps here are in the order in which the layer reads them: reversed with ``go_backwards``.
"""

from __future__ import annotations

from typing import Any

from keras import ops


class MaskedSteps:
    """A mask, with the operations that it requires.

    Args:
        mask: Bools (T, N), False for steps to leave out.
        is_padding: Whether all masked steps are known to come after the others.

    Attributes:
        lengths: The number of steps of each sequence that are not masked, integers (N,).
    """

    def __init__(self, mask: Any, is_padding: bool) -> None:
        self._mask, self._is_padding = mask, is_padding
        self.lengths = ops.sum(ops.cast(mask, "int32"), axis=0)

    def to_front(self, x: Any) -> Any:
        """The input (T, N, I) with the masked steps of each sequence behind the others."""
        if self._is_padding:
            return x
        steps = x.shape[0]
        keys = ops.where(self._mask, 0, steps) + ops.arange(steps, dtype="int32")[:, None]
        return _steps_of(x, ops.argsort(keys, axis=0))

    def outputs(self, y: Any, before: Any, are_zero: bool) -> Any:
        """The output (T, N, H) of every step, from the output of the operator.

        Args:
            y: The output of the operator, zero in the padding.
            before: The output of masked steps that precede all others, (N, H); None for zeros.
            are_zero: Whether the output of masked steps is zero; else it is that of the last step that is not masked.
        """
        if are_zero and self._is_padding:
            return y
        counts = ops.cumsum(ops.cast(self._mask, "int32"), axis=0)
        y = _steps_of(y, ops.maximum(counts - 1, 0))
        if are_zero:
            return ops.where(self._mask[..., None], y, ops.zeros_like(y))
        return ops.where(counts[..., None] > 0, y, ops.zeros_like(y) if before is None else before)

    def last_output(self, h: Any, before: Any, are_zero: bool) -> Any:
        """The output of the last step (N, H), from the final state; ``before`` and ``are_zero`` as above."""
        if are_zero:
            return ops.where(self._mask[-1][:, None], h, ops.zeros_like(h))
        return ops.where(self.lengths[:, None] > 0, h, ops.zeros_like(h) if before is None else before)


def _steps_of(x: Any, steps: Any) -> Any:
    """Row (steps[t, n], n) of a tensor (T, N, features) for each t and n."""
    count, batch, features = x.shape
    rows = ops.cast(steps, "int32") * batch + ops.arange(batch, dtype="int32")
    return ops.take(ops.reshape(x, (count * batch, features)), rows, axis=0)
