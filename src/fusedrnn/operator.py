"""The operator: made once for a spec, cached, called with arrays; and MXNet's RNN operator as a function."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fusedrnn import arguments
from fusedrnn.codegen.target import Target, current
from fusedrnn.engine.cpu import CPUEngine
from fusedrnn.engine.locks import Lock
from fusedrnn.spec import DTYPES, RNNSpec

Array = NDArray[Any]
# What rnn, after MXNet, calls the arguments of RNNSpec and RNNOp.forward.
_RNN_NAMES = {
    "x": "data", "params": "parameters", "states: h0": "state", "states: c0": "state_cell",
    "lengths": "sequence_length", "hidden_size": "state_size", "dropout": "p",
    **{f"state_clip_{end}": f"lstm_state_clip_{end}" for end in ("min", "max", "nan")},
}  # fmt: skip
# Ops kept by RNNOp.get; each holds packed weights and a workspace.
_MOST_OPS = 64


class RNNOp:
    """A recurrent network ready to run: kernels, packed weights and workspace for one spec.

    Any number of threads may call the same op at once. Parameters are packed at the first call and again whenever
    their content has changed; those from :func:`frozen` are not even looked at twice.

    Args:
        spec: What to run.

    Raises:
        TypeError: If ``spec`` is not an :class:`RNNSpec`.
        NotImplementedError: Naming what the spec asks for and no engine has.

    Example:
    >>> import numpy as np
    >>> from fusedrnn import RNNOp, RNNSpec
    >>> op = RNNOp(RNNSpec("gru", input_size=3, hidden_size=5))
    >>> x = np.zeros((7, 2, 3), np.float32)
    >>> params = np.zeros(op.spec.layout.size, np.float32)
    >>> y, (h_n,), reserve = op.forward(x, params)
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    """

    _kept: ClassVar[OrderedDict[tuple[RNNSpec, Target], RNNOp]] = OrderedDict()
    _lock = Lock()

    def __init__(self, spec: RNNSpec) -> None:
        if not isinstance(spec, RNNSpec):
            raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
        self.spec = spec
        self._engine = CPUEngine(spec)

    @classmethod
    def get(cls, spec: RNNSpec) -> RNNOp:
        """The op for that spec: the one made before, while it is among those most recently asked for."""
        if not isinstance(spec, RNNSpec):
            raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
        key = spec, current()
        with cls._lock:
            op = cls._kept.get(key)
            if op is None:
                op = cls._kept[key] = cls(spec)
                if len(cls._kept) > _MOST_OPS:
                    cls._kept.popitem(last=False)
            cls._kept.move_to_end(key)
            return op

    def __repr__(self) -> str:
        return f"RNNOp({self.spec!r})"

    def __reduce__(self) -> tuple[type[RNNOp], tuple[RNNSpec]]:
        return RNNOp, (self.spec,)

    def compile(self) -> RNNOp:
        """Compile the kernels now, or fetch them from the disk, rather than at the first call."""
        self._engine.compile()
        return self

    def forward(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array] | None = None,
        *,
        training: bool = False,
        lengths: Array | Sequence[int] | None = None,
        out: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...], None]:
        """Run the network over whole sequences.

        Args:
            x: Input (T, N, I), time-major, of the spec's dtype; any strides, never written to.
            params: The flat parameter vector of ``spec.layout``, of the spec's dtype.
            states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, H) with index layer·D + direction; None
                for zeros.
            training: Whether to keep what backward needs.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T; None for T everywhere. Padding yields
                zeros in the output; final states are those of the last valid step; the reverse direction starts at
                each sequence's own end.
            out: Where to write the output instead of a new array: (T, N, D·H), last axis contiguous, apart from the
                inputs' memory.

        Returns:
            The triple (y, states, reserve): the output (T, N, D·H), the last layer's h at each step with directions
            side by side; the final states, a tuple like ``states``; and None, for there is no training yet.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: If ``training`` is asked for.
        """
        if arguments.flag("training", training):
            raise NotImplementedError("training is not supported yet")
        spec = self.spec
        given: dict[str, Sequence[Array]] = {"x": (x,), "params": (params,)}
        x = arguments.sequence(x, spec)
        steps, batch = x.shape[:2]
        params = arguments.parameters(params, spec)
        initial = arguments.states(states, spec, batch)
        valid = arguments.lengths(lengths, steps, batch)
        if out is not None:
            y = arguments.output(out, spec, x.shape, given | {"states": states or ()})
        else:
            y = np.empty((steps, batch, spec.output_size), spec.dtype)
        if valid is not None:
            for row, length in enumerate(valid):
                y[length:, row] = 0
        return y, self._engine.forward(x, params, initial, valid, y), None


def frozen(params: Array) -> Array:
    """A copy of a parameter vector that no one can ever write to, so that an op need not look for changes.

    Finding out whether parameters have changed takes as long as reading them: most of the time of a call that runs
    one step of one sequence, nothing beside one that runs a few dozen.

    Args:
        params: A NumPy array of floating-point numbers.

    Raises:
        TypeError: If ``params`` is not one.
    """
    if not isinstance(params, np.ndarray) or params.dtype.kind != "f":
        kind = params.dtype if isinstance(params, np.ndarray) else type(params).__name__
        raise TypeError(f"params must be a NumPy array of floating-point numbers; got {kind}")
    return np.frombuffer(params.tobytes(), params.dtype).reshape(params.shape)


def rnn(
    data: Array,
    parameters: Array,
    state: Array,
    state_cell: Array | None = None,
    sequence_length: Array | Sequence[int] | None = None,
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
) -> Array | tuple[Array, ...]:
    """MXNet's RNN operator on NumPy arrays, in inference.

    Args:
        data: Input (T, N, I), float32 or float64; the other arrays have its dtype.
        parameters: The flat parameter vector: all weights, then all biases.
        state: Initial h (L·D, N, H).
        state_cell: Initial c (L·D, N, H), for an LSTM and only for it.
        sequence_length: Valid steps of each sequence (N,), with ``use_sequence_length=True`` and only then.
        state_size: H.
        num_layers: L.
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        bidirectional: Whether each layer runs both ways.
        p: Dropout between layers; no effect in inference.
        state_outputs: Whether to return the final states too.
        projection_size: Not supported yet.
        lstm_state_clip_min: Not supported yet.
        lstm_state_clip_max: Not supported yet.
        lstm_state_clip_nan: Not supported yet.
        use_sequence_length: Whether ``sequence_length`` counts.

    Returns:
        The output (T, N, D·H), or with ``state_outputs`` the tuple (output, h_n) or, for an LSTM, (output, h_n, c_n).

    Raises:
        TypeError: Naming the argument, what was given and what was expected.
        ValueError: Likewise.
        NotImplementedError: Naming an option that is not supported yet.
    """
    if not isinstance(data, np.ndarray):
        raise TypeError(f"data must be a NumPy array; got {type(data).__name__}")
    if data.ndim != 3 or 0 in data.shape:
        raise ValueError(f"data must have shape (T, N, I), each at least 1; got {data.shape}")
    if data.dtype not in DTYPES:
        raise TypeError(f"data must have dtype {' or '.join(DTYPES)}; got {data.dtype}")
    use_lengths = arguments.flag("use_sequence_length", use_sequence_length)
    with_states = arguments.flag("state_outputs", state_outputs)
    with arguments.renamed(_RNN_NAMES):
        spec = RNNSpec(
            mode, data.shape[2], state_size, num_layers, bidirectional, p, projection_size, data.dtype.name,
            lstm_state_clip_min, lstm_state_clip_max, lstm_state_clip_nan,
        )  # fmt: skip
    if (state_cell is None) == (mode == "lstm"):
        wanted = "must be given in mode 'lstm'" if mode == "lstm" else f"must be None in mode {mode!r}"
        raise ValueError(f"state_cell {wanted}; got {'None' if state_cell is None else type(state_cell).__name__}")
    if use_lengths != (sequence_length is not None):
        raise ValueError(
            "sequence_length must be given if, and only if, use_sequence_length is True; "
            f"got use_sequence_length={use_lengths} and "
            f"{'no' if sequence_length is None else 'a'} sequence_length"
        )
    states = (state,) if state_cell is None else (state, state_cell)
    with arguments.renamed(_RNN_NAMES):
        y, final, _ = RNNOp.get(spec).forward(data, parameters, states, lengths=sequence_length)
    return (y, *final) if with_states else y
