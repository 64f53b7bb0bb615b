"""The methods of ops that make streams: one for a fixed batch, one for sequences that come and go."""

from __future__ import annotations

from typing import Any

from fusedrnn.frozen_array import frozen
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op.inference_calls import SelectsEngine
from fusedrnn.op.stream import ForwardOp, Stream
from fusedrnn.op.streamed_spec import States, streamed
from fusedrnn.op.streams import Streams
from fusedrnn.quantized_params import Params
from fusedrnn.scalars import check_bytes, positive_int
from fusedrnn.spec import RNNSpec


class MakesStreams:
    """An operator with the methods :meth:`stream` and :meth:`streams`."""

    def stream(self: ForwardOp, params: Params, batch: int = 1, states: States = None) -> Stream:
        """Make a stream of sequences that arrive in chunks: the state is carried from one chunk to the next.

        Args:
            params: The flat parameter vector, which is copied; or frozen parameters or those of :meth:`RNNOp.quantize`,
                which streams share.
            batch: N.
            states: Initial states as in :meth:`forward`, which are copied.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or the network has a reverse direction, which
                starts at a sequence's end.
        """
        return Stream(self, *_frozen_params_and_size("batch", batch, params, self.spec), states)

    def streams(self: SelectsEngine, params: Params, capacity: int) -> Streams:
        """Make a set of streams that come and go: each call advances any of them.

        Args:
            params: The flat parameter vector, which is copied; or frozen parameters or those of :meth:`RNNOp.quantize`.
            capacity: How many streams there may be at a time. Memory for the states of all is allocated now.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or the network has a reverse direction, which
                starts at a sequence's end.
        """
        return Streams(self, *_frozen_params_and_size("capacity", capacity, params, self.spec))


def _frozen_params_and_size(name: str, size: object, params: object, spec: RNNSpec | NetworkSpec) -> tuple[Any, int]:
    """Parameters that cannot change and a number of sequences, checked. The network must run forward alone."""
    streamed_spec = streamed(spec)
    streamed_spec.check_direction()
    checked = positive_int(name, size)
    check_bytes(name, checked, streamed_spec.state_shapes(checked), spec.dtype)
    return frozen(streamed_spec.check_params(params)), checked
