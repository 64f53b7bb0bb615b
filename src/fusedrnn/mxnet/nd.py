"""MXNet's RNN operator on NumPy arrays: ``RNN``, also called ``rnn``, in inference; ``train_rnn`` with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedrnn.mxnet.backward import Backward
from fusedrnn.op import validation
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import as_bool
from fusedrnn.spec import DTYPES, Array, RNNSpec

Lengths = Array | Sequence[int] | None
# What MXNet's operator calls the arguments of RNNSpec and RNNOp.forward.
_NAMES = {
    "x": "data", "params": "parameters", "states: h0": "state", "states: c0": "state_cell",
    "lengths": "sequence_length", "hidden_size": "state_size", "dropout": "p",
    **{f"state_clip_{end}": f"lstm_state_clip_{end}" for end in ("min", "max", "nan")},
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """One call's op and arrays, checked as far as the op itself does not."""

    op: RNNOp
    data: Array
    parameters: Array
    states: tuple[Array, ...]
    lengths: Lengths
    with_states: bool

    def infer(self) -> Array | tuple[Array, ...]:
        """The outputs that were asked for."""
        with validation.renamed(_NAMES):
            y, final, _ = self.op.forward(self.data, self.parameters, self.states, lengths=self.lengths)
        return (y, *final) if self.with_states else y

    def train(self, seed: int | None) -> tuple[Array | tuple[Array, ...], Backward]:
        """The same, and what gives gradients."""
        with validation.renamed(_NAMES):
            y, final, reserve = self.op.forward(
                self.data, self.parameters, self.states, training=True, lengths=self.lengths, seed=seed
            )
        assert reserve is not None
        return (y, *final) if self.with_states else y, Backward(self.op, reserve, self.with_states)


def rnn(
    data: Array,
    parameters: Array,
    state: Array,
    state_cell: Array | None = None,
    sequence_length: Lengths = None,
    *,
    state_size: int,
    num_layers: int,
    mode: str,
    bidirectional: bool = False,
    p: float = 0.0,
    state_outputs: bool = False,
    projection_size: int | None = None,
    lstm_state_clip_min: float | None = None,
    lstm_state_clip_max: float | None = None,
    lstm_state_clip_nan: bool = False,
    use_sequence_length: bool = False,
    backend: str | None = None,
) -> Array | tuple[Array, ...]:
    """MXNet's RNN operator on NumPy arrays, in inference.

    Args:
        data: Input (T, N, I), float32 or float64; the other arrays have its dtype.
        parameters: The flat parameter vector: all weights, then all biases, as in ``RNNSpec.layout``.
        state: Initial h (L·D, N, S); S is ``projection_size`` if given, else H.
        state_cell: Initial c (L·D, N, H), for an LSTM and only for it.
        sequence_length: Valid steps of each sequence, integers (N,) from 0 to T, with ``use_sequence_length=True``
            and only then. The output is zero in padding, and final states are those of the last valid step.
        state_size: H.
        num_layers: L.
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        bidirectional: Whether each layer runs both ways.
        p: Probability with which training drops elements between layers; inference drops nothing.
        state_outputs: Whether to return the final states too.
        projection_size: P, below H: the size to which an LSTM's output is projected; None for no projection.
        lstm_state_clip_min: Lower bound of an LSTM's cell state after each step; given if the upper one is.
        lstm_state_clip_max: Upper bound.
        lstm_state_clip_nan: Whether clipping replaces NaN in the cell state, by the lower bound.
        use_sequence_length: Whether ``sequence_length`` counts.
        backend: The engine to run it, as in :class:`RNNOp`; None for the first that can.

    Returns:
        The output (T, N, D·S), or with ``state_outputs`` the tuple (output, h_n) or, for an LSTM, (output, h_n, c_n).

    Raises:
        TypeError: Naming the argument, what was given and what was expected.
        ValueError: Likewise.
        NotImplementedError: Naming what the call needs and no engine has.
    """
    options = (
        mode, state_size, num_layers, bidirectional, p, projection_size,
        lstm_state_clip_min, lstm_state_clip_max, lstm_state_clip_nan,
    )  # fmt: skip
    arrays = data, parameters, state, state_cell, sequence_length
    return _call(arrays, options, state_outputs, use_sequence_length, backend).infer()


RNN = rnn


def train_rnn(
    data: Array,
    parameters: Array,
    state: Array,
    state_cell: Array | None = None,
    sequence_length: Lengths = None,
    *,
    state_size: int,
    num_layers: int,
    mode: str,
    bidirectional: bool = False,
    p: float = 0.0,
    state_outputs: bool = False,
    projection_size: int | None = None,
    lstm_state_clip_min: float | None = None,
    lstm_state_clip_max: float | None = None,
    lstm_state_clip_nan: bool = False,
    use_sequence_length: bool = False,
    backend: str | None = None,
    seed: int | None = None,
) -> tuple[Array | tuple[Array, ...], Backward]:
    """MXNet's RNN operator in training: what it returns, and a function that gives the gradients.

    Args:
        data: As in :func:`rnn`, as are all arguments but the last. None is needed again in backward: later changes
            of these arrays do not matter.
        parameters: As in :func:`rnn`.
        state: As in :func:`rnn`.
        state_cell: As in :func:`rnn`.
        sequence_length: As in :func:`rnn`.
        state_size: As in :func:`rnn`.
        num_layers: As in :func:`rnn`.
        mode: As in :func:`rnn`.
        bidirectional: As in :func:`rnn`.
        p: As in :func:`rnn`; here it counts.
        state_outputs: As in :func:`rnn`.
        projection_size: As in :func:`rnn`.
        lstm_state_clip_min: As in :func:`rnn`. Gradients pass where the state was within the bounds before clipping.
        lstm_state_clip_max: As in :func:`rnn`.
        lstm_state_clip_nan: As in :func:`rnn`. No gradient passes where NaN was replaced.
        use_sequence_length: As in :func:`rnn`.
        backend: As in :func:`rnn`.
        seed: From 0 to 2**64 - 1; says which elements are dropped. None for a new one, which ``backward.seed`` tells.

    Returns:
        What :func:`rnn` returns, and a :class:`Backward`.

    Raises:
        TypeError: Naming the argument, what was given and what was expected.
        ValueError: Likewise.
        NotImplementedError: Naming what the call needs and no engine has.
    """
    options = (
        mode, state_size, num_layers, bidirectional, p, projection_size,
        lstm_state_clip_min, lstm_state_clip_max, lstm_state_clip_nan,
    )  # fmt: skip
    arrays = data, parameters, state, state_cell, sequence_length
    return _call(arrays, options, state_outputs, use_sequence_length, backend).train(seed)


def _call(
    arrays: tuple[Array, Array, Array, Array | None, Lengths],
    options: tuple[Any, ...],
    state_outputs: object,
    use_sequence_length: object,
    backend: str | None,
) -> _Call:
    data, parameters, state, state_cell, sequence_length = arrays
    if not isinstance(data, np.ndarray):
        raise TypeError(f"data must be a NumPy array; got {type(data).__name__}")
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(f"data must have shape (T, N, I), each at least 1; got {data.shape}")
    if data.dtype not in DTYPES:
        raise TypeError(f"data must have dtype {' or '.join(DTYPES)}; got {data.dtype}")
    if state is None:  # RNNOp takes None for zeros, MXNet does not
        raise TypeError("state must be a NumPy array; got NoneType")
    use_lengths = as_bool("use_sequence_length", use_sequence_length)
    with_states = as_bool("state_outputs", state_outputs)
    mode, size, layers, both_ways, p, projection, low, high, nan = options
    with validation.renamed(_NAMES):
        spec = RNNSpec(
            mode, data.shape[2], size, layers, both_ways, p, projection, data.dtype.name, low, high, nan
        )  # fmt: skip
    if (state_cell is None) == (mode == "lstm"):
        rule = "must be given in mode 'lstm'" if mode == "lstm" else f"must be None in mode {mode!r}"
        raise ValueError(f"state_cell {rule}; got {'None' if state_cell is None else type(state_cell).__name__}")
    check_lengths(use_lengths, sequence_length)
    with validation.renamed(_NAMES):
        op = RNNOp.get(spec, backend)
    states = (state,) if state_cell is None else (state, state_cell)
    return _Call(op, data, parameters, states, sequence_length, with_states)


def check_lengths(used: bool, sequence_length: Lengths) -> None:
    """Raise unless there are lengths just where they count: MXNet ignores them, or the lack of them, in silence."""
    if used != (sequence_length is not None):
        raise ValueError(
            "sequence_length must be given if, and only if, use_sequence_length is True; "
            f"got use_sequence_length={used} and {'no' if sequence_length is None else 'a'} sequence_length"
        )
