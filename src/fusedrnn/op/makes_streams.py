"""The methods of an op that make streams: one for a fixed batch, one for sequences that come and go."""

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
        """Make a stream of sequences that arrive in chunks: the state is carried from one chunk to the next.

        Args:
            params: The flat parameter vector, which is copied; or frozen or quantized parameters, which streams share.
            batch: N.
            states: Initial states as in :meth:`forward`, which are copied.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or the network has a reverse direction, which
                starts at a sequence's end.
        """
        batch = _checked_size("batch", batch, self.spec)
        return Stream(self, _checked_params(params, self.spec), batch, states)

    def streams(self: SelectsEngine, params: Params, capacity: int) -> Streams:
        """Make a set of streams that come and go: each call advances any of them.

        Args:
            params: The flat parameter vector, which is copied; or frozen or quantized parameters.
            capacity: How many streams there may be at a time. Memory for the states of all is allocated now.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or the network has a reverse direction, which
                starts at a sequence's end.
        """
        capacity = _checked_size("capacity", capacity, self.spec)
        return Streams(self, _checked_params(params, self.spec), capacity)


def _checked_size(name: str, size: object, spec: RNNSpec) -> int:
    """A number of sequences, checked; the network must run forward alone."""
    for direction in ("bidirectional", "reverse"):
        if getattr(spec, direction):
            raise ValueError(f"a stream must be of a network that runs forward alone; got {direction}=True")
    checked = positive_int(name, size)
    check_bytes(name, checked, spec.state_shape(checked), spec.dtype)
    return checked


def _checked_params(params: Params, spec: RNNSpec) -> Any:
    return frozen(check_params(params, spec))
