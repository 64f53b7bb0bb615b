"""The methods of an op that make streams: of a batch that stays, and of sequences that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedrnn.frozen_array import frozen
from fusedrnn.op.inference_calls import SelectsEngine
from fusedrnn.op.stream import ForwardOp, Stream
from fusedrnn.op.streams import Streams
from fusedrnn.op.validation import check_params
from fusedrnn.quantized_params import Params
from fusedrnn.scalars import check_bytes, positive_int
from fusedrnn.spec import Array, RNNSpec


class MakesStreams:
    """An operator with the methods :meth:`stream` and :meth:`streams`."""

    def stream(self: ForwardOp, params: Params, batch: int = 1, states: Sequence[Array | None] | None = None) -> Stream:
        """Sequences that arrive in chunks: the state is carried from one to the next.

        Args:
            params: The flat parameter vector, which is copied; or frozen or quantized ones, which many streams share.
            batch: N.
            states: Initial states as in :meth:`forward`, which are copied.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the network has a reverse direction, which starts at a sequence's end.
        """
        batch = _checked_size("batch", batch, self.spec)
        return Stream(self, _checked_params(params, self.spec), batch, states)

    def streams(self: SelectsEngine, params: Params, capacity: int) -> Streams:
        """Streams that come and go, up to a number of them: each call advances any of them.

        Args:
            params: The flat parameter vector, which is copied; or frozen or quantized ones.
            capacity: How many streams there may be at a time. Memory for the states of all is allocated now.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the network has a reverse direction, which starts at a sequence's end.
        """
        capacity = _checked_size("capacity", capacity, self.spec)
        return Streams(self, _checked_params(params, self.spec), capacity)


def _checked_size(name: str, size: object, spec: RNNSpec) -> int:
    """A number of sequences, of a network that can be streamed."""
    for direction in ("bidirectional", "reverse"):
        if getattr(spec, direction):
            raise ValueError(f"a stream must be of a network that runs forward alone; got {direction}=True")
    checked = positive_int(name, size)
    check_bytes(name, checked, spec.state_shape(checked), spec.dtype)
    return checked


def _checked_params(params: Params, spec: RNNSpec) -> Any:
    return frozen(check_params(params, spec))
