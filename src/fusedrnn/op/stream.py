"""A sequence that arrives in chunks: the state is carried from one chunk to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.frozen_array import frozen
from fusedrnn.op.resets import restarted
from fusedrnn.op.streamed_spec import States, streamed

_NO_OPTIONS: dict[str, Any] = {}


class ForwardOp(Protocol):
    """What a stream needs of an operator; ``spec`` is an RNNSpec or a NetworkSpec."""

    spec: Any

    def forward(
        self,
        x: Array,
        params: Any,
        states: Any = None,
        *,
        out: Array | None = None,
        resets: Any = None,
        reset_states: Any = None,
    ) -> tuple[Any, tuple[Any, ...], Any]:
        """See :meth:`RNNOp.forward`."""


class Stream:
    """Sequences that arrive in chunks of any length; call it with each chunk.

    :meth:`RNNOp.stream` and :meth:`NetworkOp.stream` make it.

    The outputs, joined, have the bits of one call on the joined chunks. Parameters are packed once. A chunk that fails
    leaves the state as it was. One thread at a time may use a stream; any number may use streams of one op.

    Attributes:
        op: The operator that runs the chunks.
        batch: N.
        states: The current states, each (L, N, H); of a network, a tuple of these for each layer. Do not write to them.

    Example:
    >>> import numpy as np
    >>> from fusedrnn import RNNOp, RNNSpec
    >>> op = RNNOp(RNNSpec("gru", input_size=3, hidden_size=5))
    >>> stream = op.stream(np.zeros(op.spec.layout.size, np.float32), batch=2)
    >>> for steps in 1, 1, 4:
    ...     y = stream(np.ones((steps, 2, 3), np.float32))
    >>> y.shape
    (4, 2, 5)
    """

    def __init__(self, op: ForwardOp, params: Array, batch: int, states: States) -> None:
        self.op, self.batch, self._spec = op, batch, streamed(op.spec)
        self._params = params
        self.states: tuple[Any, ...] = ()
        self.reset(states)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy freezes its own parameters."""
        self.__dict__.update(state, _params=frozen(state["_params"]))

    def __repr__(self) -> str:
        return f"<a stream of {self.batch} sequence(s), {self.op.spec!r}>"

    def __call__(
        self,
        x: Array,
        out: Array | None = None,
        *,
        resets: Array | Sequence[Sequence[bool]] | None = None,
        reset_states: States = None,
    ) -> Array:
        """Run the next chunk.

        Args:
            x: Input (T, N, I), any T from 1 up, of the spec's dtype, any strides.
            out: Where to write the output instead of a new array, as in :meth:`RNNOp.forward`.
            resets: Steps of the chunk at which a sequence begins anew, bools (T, N), as in :meth:`RNNOp.forward`.
            reset_states: The states after a reset, as in :meth:`RNNOp.forward`; None for zeros.

        Returns:
            The output (T, N, H).

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
        """
        if isinstance(x, np.ndarray) and x.ndim == 3 and x.shape[1] != self.batch:
            expected = f"(T, {self.batch}, {self.op.spec.input_size})"
            raise ValueError(f"x must have shape {expected}, with the stream's {self.batch} sequences; got {x.shape}")
        states, options = self.states, _NO_OPTIONS
        if resets is not None and reset_states is None and isinstance(x, np.ndarray) and x.shape[:1] == (1,):
            states = self._spec.nested(restarted(self._spec.flat(states), self.batch, resets))
        elif resets is not None or reset_states is not None:
            options = {"resets": resets, "reset_states": reset_states}
        y, self.states, _ = self.op.forward(x, self._params, states, out=out, **options)
        result: Array = y
        return result

    def reset(self, states: States = None) -> None:
        """Start over.

        Args:
            states: The states to start from, as in :meth:`RNNOp.forward` or :meth:`NetworkOp.forward`, which are
                copied; None for zeros.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
        """
        checked = self._spec.check_states(states, self.batch)
        shapes = self._spec.state_shapes(self.batch)
        initial = checked or (np.zeros(shape, self.op.spec.dtype) for shape in shapes)
        self.states = self._spec.nested(tuple([state.copy() for state in initial]))

