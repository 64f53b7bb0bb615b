"""The base class of all recurrent layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypedDict, overload

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.mxnet.gluon.backward import LayerBackward, Layout, time_major
from fusedrnn.mxnet.gluon.initializers import Initializer, check_initializer
from fusedrnn.mxnet.gluon.parameter import ParameterDict, Parameters
from fusedrnn.mxnet.gluon.store import LOCK, Deferred, ParameterStore
from fusedrnn.mxnet.nd import Lengths, check_lengths
from fusedrnn.op import validation
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import as_bool, as_int, check_bytes, positive_int, shown
from fusedrnn.spec import RNNSpec

StateInfo = TypedDict("StateInfo", {"shape": tuple[int, ...], "__layout__": str, "dtype": str})
States = Array | Sequence[Array] | None
# The arguments of a layer that are fields of its spec.
_SPEC_FIELDS = (
    "hidden_size", "num_layers", "bidirectional", "dropout", "projection_size", "dtype",
    "state_clip_min", "state_clip_max", "state_clip_nan",
)  # fmt: skip
# From the names of arguments of RNNOp.forward to those of layers.
_NAMES = {"x": "inputs", "states: h0": "states[0]", "states: c0": "states[1]", "lengths": "sequence_length"}
# The number of the next prefix, by class name.
_counters: defaultdict[str, count[int]] = defaultdict(count)


class RNNLayer:
    """A network of recurrent layers with its parameters, as in MXNet's gluon: the base of ``RNN``, ``LSTM``, ``GRU``.

    :meth:`initialize` or :meth:`load_parameters` gives it parameters. A call runs in inference; :meth:`train` runs in
    training, and also returns a function that computes gradients. Each parameter is also an attribute, such as
    ``layer.l0_i2h_weight`` or ``layer.r1_h2h_bias``: l stands for the forward and r for the reverse direction, and the
    number is the layer.

    All layers take these arguments:

    - ``hidden_size``: H.
    - ``num_layers``: L.
    - ``layout``: ``"TNC"`` for inputs and outputs (T, N, C), ``"NTC"`` for (N, T, C).
    - ``dropout``: Probability with which training drops elements between layers.
    - ``bidirectional``: Whether each layer runs in both directions.
    - ``input_size``: I; 0 if the first call sets it.
    - ``i2h_weight_initializer``, ``h2h_weight_initializer``: The initializers of the input weights and the recurrent
      weights; None for the argument of :meth:`initialize`.
    - ``i2h_bias_initializer``, ``h2h_bias_initializer``: The initializers of the biases; None for zeros.
    - ``dtype``: ``"float32"`` or ``"float64"``, of parameters, inputs and states.
    - ``use_sequence_length``: Whether calls have the argument ``sequence_length``.
    - ``prefix``: The prefix of the parameters' full names; None for a new prefix, ``lstm0_``, ``lstm1_``.
    - ``params``: The parameters of another layer, to share them; they keep their names and initializers.
    - ``backend``: The engine, as in :class:`RNNOp`; None for the first that supports the call.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has an invalid value.
        NotImplementedError: If no engine supports the layer; the message says what is missing. This is only raised here
            if the input size is known.
    """

    def __init__(self, mode: str, arguments: Mapping[str, Any]) -> None:
        input_size, layout, prefix, params = (arguments[key] for key in ("input_size", "layout", "prefix", "params"))
        is_integer = isinstance(input_size, (int, np.integer)) and not isinstance(input_size, bool)
        input_size_known = not is_integer or input_size != 0
        options = {field: arguments[field] for field in _SPEC_FIELDS if field in arguments}
        spec = RNNSpec(mode, positive_int("input_size", input_size) if input_size_known else 1, **options)
        if layout not in ("TNC", "NTC"):
            raise ValueError(f"layout must be 'TNC' or 'NTC'; got {layout!r}")
        self._use_lengths = as_bool("use_sequence_length", arguments["use_sequence_length"])
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string or None; got {prefix!r}")
        initializers = {key.removesuffix("_initializer"): check_initializer(key, value)
                        for key, value in arguments.items() if key.endswith("_initializer")}  # fmt: skip
        self._spec, self._backend = spec, arguments["backend"]
        self._layout: Layout = layout
        self._op: RNNOp | None = None
        if params is None:
            name = type(self).__name__.lower()
            prefix = f"{name}{next(_counters[name])}_" if prefix is None else prefix
            self._params = ParameterDict(prefix, ParameterStore(spec, input_size_known), initializers)
        else:
            self._params = self._shared(params, input_size_known)
            if prefix not in (None, self.prefix):
                raise ValueError(f"prefix must be None or that of params ({self.prefix!r}); got {prefix!r}")
        for parameter in self._params.values():
            setattr(self, parameter.short_name, parameter)
        if input_size_known:
            self._op_for(input_size)
            store = self._params.store  # others may share it: nothing can fail from here
            store.spec, store.input_size_known = store.spec_for(input_size), True

    def _shared(self, params: object, input_size_known: bool) -> ParameterDict:
        """Another layer's parameters; an error unless their network has the same sizes."""
        if not isinstance(params, ParameterDict):
            raise TypeError(f"params must be what a layer's collect_params returns; got {type(params).__name__}")
        store, spec = params.store, self._spec
        if not input_size_known or not store.input_size_known:
            spec = replace(spec, input_size=store.spec.input_size)
        shapes, stored_shapes = ({(entry.name, entry.shape) for entry in s.layout} for s in (spec, store.spec))
        if shapes != stored_shapes or (spec.mode, spec.dtype) != (store.spec.mode, store.spec.dtype):
            raise ValueError(f"params must be those of a layer like {self._spec}; got those of {store.spec}")
        return params

    def __repr__(self) -> str:
        spec, store = self._spec, self._params.store
        size = store.spec.input_size if store.input_size_known else None
        options = f", num_layers={spec.num_layers}" if spec.num_layers != 1 else ""
        options += f", dropout={spec.dropout:g}" if spec.dropout else ""
        options += ", bidirectional" if spec.bidirectional else ""
        return f"{type(self).__name__}({size} -> {spec.hidden_size}, {self._layout}{options})"

    @property
    def prefix(self) -> str:
        """The prefix of the parameters' full names."""
        return self._params.prefix

    @property
    def params(self) -> ParameterDict:
        """The parameters by full name."""
        return self._params

    @overload
    def collect_params(self) -> ParameterDict: ...

    @overload
    def collect_params(self, select: str | None) -> Parameters: ...

    def collect_params(self, select: str | None = None) -> Parameters:
        """The parameters by full name: ``lstm0_l0_i2h_weight`` (G·H, I), ``lstm0_l0_h2h_bias`` (G·H,).

        ``select`` is a regular expression, such as ``".*weight"``, that must match the beginning of a full name; None
        for all parameters.

        Raises:
            TypeError: If ``select`` is neither a string nor None.
            ValueError: If it is no regular expression.
        """
        return self._params if select is None else self._params.matching(select)

    def initialize(self, init: Initializer = "uniform", force_reinit: bool = False, seed: int | None = None) -> None:
        """Give all parameters values; see :meth:`ParameterDict.initialize`."""
        self._params.initialize(init, force_reinit, seed)

    def cast(self, dtype: str) -> None:
        """Convert parameters, inputs and states to ``"float32"`` or ``"float64"``.

        Raises:
            ValueError: If ``dtype`` is neither.
        """
        self._params.store.cast(replace(self._spec, dtype=dtype).dtype)

    def state_info(self, batch_size: int = 0) -> list[StateInfo]:
        """The ``"shape"`` (L·D, N, size), the ``"__layout__"`` and the ``"dtype"`` of each state."""
        batch = as_int("batch_size", batch_size)
        if batch < 0:
            raise ValueError(f"batch_size must be at least 0; got {shown(batch_size)}")
        shapes, dtype = self._spec.state_shape(batch), self._params.store.spec.dtype
        check_bytes("batch_size", batch, shapes, dtype)
        return [{"shape": shape, "__layout__": "LNC", "dtype": dtype} for shape in shapes]

    def begin_state(self, batch_size: int = 0, func: Callable[..., Array] = np.zeros, **options: Any) -> list[Array]:
        """Initial states: for each state, the result of ``func`` for its shape, its ``dtype`` and the other options."""
        infos = self.state_info(batch_size)
        return [func(info["shape"], **{"dtype": info["dtype"], **options}) for info in infos]

    def load_parameters(
        self,
        params: Mapping[str, Array],
        allow_missing: bool = False,
        ignore_extra: bool = False,
        cast_dtype: bool = False,
        prefix: str = "",
    ) -> None:
        """Take values from a dict of arrays. If there is an error, no parameter changes.

        Args:
            params: Arrays by name. The name of an array is the full name (``lstm0_l0_i2h_weight``), the full name
                without the layer's prefix, or the name that ``Block.save_parameters`` gives it
                (``_unfused.0.i2h_weight``, in a bidirectional layer ``_unfused.0.l_cell.i2h_weight``).
            allow_missing: Whether parameters without an array keep their values, or the initialization that waits for
                the input size; else they are an error.
            ignore_extra: Whether arrays with other names are ignored; else they are an error.
            cast_dtype: Whether arrays of another floating dtype are converted; else they are an error.
            prefix: A prefix of all names in ``params``: the layer's index in a larger network, ``"1."``, or the prefix
                that the layer had in another process, ``"lstm3_"``.

        Raises:
            TypeError: If ``params`` is not a mapping, or a value is not an array of the right dtype.
            ValueError: If a parameter is missing, occurs twice or has the wrong shape, or there are other arrays.
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be a dict of named arrays; got {type(params).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string; got {prefix!r}")
        flags = {"allow_missing": allow_missing, "ignore_extra": ignore_extra, "cast_dtype": cast_dtype}
        missing, extra, cast = (as_bool(name, value) for name, value in flags.items())
        with LOCK:
            self._params.load(params, prefix, missing, extra, cast)

    def save_parameters(self) -> dict[str, Array]:
        """Copies of all values, by the names that ``Block.save_parameters`` gives them, so that MXNet can load them."""
        params = self._params
        layout = params.store.spec.layout
        return {params.block_name(entry): params[self.prefix + entry.name].data().copy() for entry in layout}

    def __call__(self, inputs: Array, states: States = None, sequence_length: Lengths = None) -> Any:
        """Run over whole sequences, in inference.

        Args:
            inputs: (T, N, I) or, with ``layout="NTC"``, (N, T, I), of the layer's dtype.
            states: Initial states: a list of one array (L·D, N, size) or, for an LSTM, of two; a single array needs no
                list. None for zeros.
            sequence_length: Valid steps of each sequence, integers (N,) from 0 to T. It is required with
                ``use_sequence_length=True``, and only allowed then.

        Returns:
            The output in ``layout``, with D·S features; if ``states`` are given, a pair of the output and a list of the
            final states.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or the layer has no parameters yet.
            NotImplementedError: If no engine supports the call; the message says what is missing.
        """
        output, final, _, _ = self._run(inputs, states, sequence_length, False, None)
        return output if states is None else (output, final)

    def train(
        self, inputs: Array, states: States = None, sequence_length: Lengths = None, *, seed: int | None = None
    ) -> tuple[Any, LayerBackward]:
        """Run over whole sequences, in training.

        The errors and all arguments except ``seed`` are those of a call. ``seed``, from 0 to 2**64 - 1, determines
        which elements are dropped; None for a new seed. ``backward.seed`` is the seed that was used.

        Returns:
            What a call returns, and a :class:`LayerBackward`.
        """
        output, final, op, reserve = self._run(inputs, states, sequence_length, True, seed)
        assert reserve is not None
        backward = LayerBackward(self._params, op, reserve, self._layout, states is not None)
        return (output if states is None else (output, final)), backward

    def _run(
        self, inputs: object, states: object, lengths: Lengths, training: bool, seed: int | None,
        deferred: Deferred | None = None,
    ) -> tuple[Array, list[Array], RNNOp, Reserve | None]:  # fmt: skip
        store = self._params.store
        if deferred is None and store.deferred is not None:
            with LOCK:  # store.deferred is None now if another thread has run the initialization meanwhile
                return self._run(inputs, states, lengths, training, seed, store.deferred)
        axes = ", ".join(self._layout.replace("C", "I"))
        if not isinstance(inputs, np.ndarray):
            raise TypeError(f"inputs must be a NumPy array; got {type(inputs).__name__}")
        if inputs.ndim != 3 or 0 in inputs.shape:
            raise ValueError(f"inputs must have shape ({axes}), each at least 1; got {inputs.shape}")
        if store.input_size_known and inputs.shape[2] != store.spec.input_size:
            raise ValueError(f"inputs must have {store.spec.input_size} features; got {inputs.shape[2]}")
        if inputs.dtype != np.dtype(store.spec.dtype):
            raise TypeError(f"inputs must have dtype {store.spec.dtype}; got {inputs.dtype}")
        check_lengths(self._use_lengths, lengths)
        initial: Any = [states] if isinstance(states, np.ndarray) else states
        spec, flat = self._params.for_call(inputs.shape[2], deferred)
        op = self._op_for(inputs.shape[2])
        y = np.empty((*inputs.shape[:2], op.spec.output_size), op.spec.dtype)
        with validation.renamed(_NAMES):
            _, final, reserve = op.forward(
                time_major(inputs, self._layout), flat, initial, training=training, lengths=lengths,
                out=time_major(y, self._layout), seed=seed,
            )  # fmt: skip
        # A call that failed leaves the layer as it was, and one whose initializer gave it other values keeps these.
        if deferred is not None and store.deferred is deferred:
            store.set_vector(spec, flat)
        return y, list(final), op, reserve

    def _op_for(self, input_size: int) -> RNNOp:
        """The layer's op; a new one when the input size becomes known or the dtype changes."""
        dtype = self._params.store.spec.dtype
        if self._op is None or (self._op.spec.input_size, self._op.spec.dtype) != (input_size, dtype):
            self._op = RNNOp(replace(self._spec, input_size=input_size, dtype=dtype), self._backend)
        return self._op
