"""MXNet's RNN operator on NumPy arrays: ``RNN`` or ``rnn`` for inference, ``train_rnn`` for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.mxnet.backward import Backward
from fusedrnn.op import validation
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import as_bool, check_choice
from fusedrnn.spec import DTYPES, MODES, RNNSpec

Lengths = Array | Sequence[int] | None
# From the fields of RNNSpec to the names in MXNet's operator.
_OPTIONS = {
    "mode": "mode", "hidden_size": "state_size", "num_layers": "num_layers", "bidirectional": "bidirectional",
    "dropout": "p", "projection_size": "projection_size",
    **{f"state_clip_{end}": f"lstm_state_clip_{end}" for end in ("min", "max", "nan")},
}  # fmt: skip
# From the names of arguments in errors of RNNSpec and RNNOp.forward to the names in MXNet's operator.
_NAMES = {
    "x": "data", "params": "parameters", "states: h0": "state", "states: c0": "state_cell",
    "lengths": "sequence_length", **_OPTIONS,
}  # fmt: skip


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
        state_cell: Initial c (L·D, N, H). An LSTM requires it; other modes do not allow it.
        sequence_length: Valid steps of each sequence, integers (N,) from 0 to T. It is required with
            ``use_sequence_length=True``, and only allowed then. The output is zero in padding, and final states are
            those of the last valid step.
        state_size: H.
        num_layers: L.
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        bidirectional: Whether each layer runs in both directions.
        p: Probability with which training drops elements between layers; inference drops nothing.
        state_outputs: Whether to return the final states too.
        projection_size: P, below H: the size to which an LSTM's output is projected; None for no projection.
        lstm_state_clip_min: Lower bound of an LSTM's cell state after each step. Give both bounds or neither.
        lstm_state_clip_max: Upper bound of the cell state.
        lstm_state_clip_nan: Whether clipping also replaces NaN in the cell state, by the lower bound.
        use_sequence_length: Whether ``sequence_length`` is given.
        backend: The engine, as in :class:`RNNOp`; None for the first that supports the call.

    Returns:
        The output (T, N, D·S); with ``state_outputs`` the tuple (output, h_n), or for an LSTM (output, h_n, c_n).

    Raises:
        TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
        ValueError: If an argument has the wrong shape or value; the message is of the same form.
        NotImplementedError: If no engine supports what the call needs; the message says what.
    """
    return _run(**locals(), training=False)[0]


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
    """MXNet's RNN operator in training: what :func:`rnn` returns, and a function that computes the gradients.

    The errors and all arguments except ``seed`` are those of :func:`rnn`. Later changes of the arrays do not affect the
    gradients. Where clipping has changed an LSTM's cell state or replaced NaN in it, no gradient flows through it.
    ``seed``, from 0 to 2**64 - 1, determines which elements training drops; None for a new seed. ``backward.seed`` is
    the seed that was used.

    Returns:
        What :func:`rnn` returns, and a :class:`Backward`.
    """
    outputs, op, reserve = _run(**locals(), training=True)
    assert reserve is not None
    return outputs, Backward(op, reserve, state_outputs)


def _run(
    data: Array,
    parameters: Array,
    state: Array,
    state_cell: Array | None,
    sequence_length: Lengths,
    *,
    state_outputs: bool,
    use_sequence_length: bool,
    backend: str | None,
    training: bool,
    seed: int | None = None,
    **options: Any,
) -> tuple[Array | tuple[Array, ...], RNNOp, Reserve | None]:
    """What a call of :func:`rnn` with these arguments returns, its op, and in training its reserve."""
    if not isinstance(data, np.ndarray):
        raise TypeError(f"data must be a NumPy array; got {type(data).__name__}")
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(f"data must have shape (T, N, I), each at least 1; got {data.shape}")
    if data.dtype not in DTYPES:
        raise TypeError(f"data must have dtype {' or '.join(DTYPES)}; got {data.dtype}")
    if state is None:  # RNNOp accepts None for zeros, MXNet does not
        raise TypeError("state must be a NumPy array; got NoneType")
    use_lengths = as_bool("use_sequence_length", use_sequence_length)
    with_states = as_bool("state_outputs", state_outputs)
    check_choice("mode", options["mode"], MODES)
    with validation.renamed(_NAMES):
        fields = {field: options[name] for field, name in _OPTIONS.items()}
        spec = RNNSpec(input_size=data.shape[2], dtype=data.dtype.name, **fields)
    if (state_cell is None) == (spec.mode == "lstm"):
        rule = "must be given in mode 'lstm'" if spec.mode == "lstm" else f"must be None in mode {spec.mode!r}"
        raise ValueError(f"state_cell {rule}; got {'None' if state_cell is None else type(state_cell).__name__}")
    check_lengths(use_lengths, sequence_length)
    states = (state,) if state_cell is None else (state, state_cell)
    with validation.renamed(_NAMES):
        op = RNNOp.get(spec, backend)
        y, final, reserve = op.forward(
            data, parameters, states, training=training, lengths=sequence_length, seed=seed
        )  # fmt: skip
    return ((y, *final) if with_states else y), op, reserve


def check_lengths(used: bool, sequence_length: Lengths) -> None:
    """Raise an error if lengths are given but not used, which MXNet ignores silently, or used but not given."""
    if used != (sequence_length is not None):
        raise ValueError(
            "sequence_length must be given if, and only if, use_sequence_length is True; "
            f"got use_sequence_length={used} and {'no' if sequence_length is None else 'a'} sequence_length"
        )
