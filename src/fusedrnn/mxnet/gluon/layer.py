"""The base class of all recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypedDict

import numpy as np

from fusedrnn.mxnet.gluon.backward import LayerBackward, Layout, time_major
from fusedrnn.mxnet.gluon.initializers import Initializer, checked
from fusedrnn.mxnet.gluon.parameter import ParameterDict, ParameterStore, short_names
from fusedrnn.mxnet.nd import Lengths, check_lengths
from fusedrnn.op import validation
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import as_bool, check_bytes, positive_int, shown
from fusedrnn.spec import Array, RNNSpec

StateInfo = TypedDict("StateInfo", {"shape": tuple[int, ...], "__layout__": str, "dtype": str})
States = Array | Sequence[Array] | None
# What the layers call the arguments of RNNOp.forward.
_NAMES = {"x": "inputs", "states: h0": "states[0]", "states: c0": "states[1]", "lengths": "sequence_length"}
# The numbers of the next prefixes, by class.
_counters: dict[str, count[int]] = {}


class RNNLayer:
    """A network of recurrent layers with its parameters, as MXNet's gluon has them: ``RNN``, ``LSTM``, ``GRU``.

    :meth:`initialize` or :meth:`load_parameters` gives it parameters; called, it infers; :meth:`train` gives gradients.
    Each parameter is an attribute too, ``layer.l0_i2h_weight``, ``layer.r1_h2h_bias``: l for the forward and r for the
    reverse direction, then the layer.
    """

    def __init__(
        self,
        mode: str,
        options: Mapping[str, Any],
        input_size: int,
        layout: Layout,
        initializers: Mapping[str, Initializer],
        use_sequence_length: bool,
        prefix: str | None,
        params: ParameterDict | None,
        backend: str | None,
    ) -> None:
        is_zero = isinstance(input_size, (int, np.integer)) and not isinstance(input_size, bool) and input_size == 0
        input_size_known = not is_zero
        spec = RNNSpec(mode, positive_int("input_size", input_size) if input_size_known else 1, **options)
        if layout not in ("TNC", "NTC"):
            raise ValueError(f"layout must be 'TNC' or 'NTC'; got {layout!r}")
        self._use_lengths = as_bool("use_sequence_length", use_sequence_length)
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string or None; got {prefix!r}")
        filled = {kind: checked(f"{kind}_initializer", one) for kind, one in initializers.items()}
        self._spec, self._layout, self._backend = spec, layout, backend
        self._op: RNNOp | None = None
        if params is None:
            own = self._new_prefix() if prefix is None else prefix
            self._params = ParameterDict(own, ParameterStore(spec, input_size_known), filled)
        else:
            self._params = self._shared(params, input_size_known)
            if prefix not in (None, self.prefix):
                raise ValueError(f"prefix must be None or that of params ({self.prefix!r}); got {prefix!r}")
        for one in self._params.values():
            setattr(self, one.short_name, one)
        if input_size_known:
            self._op_for(input_size)

    @classmethod
    def _new_prefix(cls) -> str:
        name = cls.__name__.lower()
        return f"{name}{next(_counters.setdefault(name, count()))}_"

    def _shared(self, params: object, input_size_known: bool) -> ParameterDict:
        """Another layer's parameters, if they are those of a network of the same sizes."""
        if not isinstance(params, ParameterDict):
            raise TypeError(f"params must be what a layer's collect_params returns; got {type(params).__name__}")
        theirs, ours = params.store, self._spec
        if not input_size_known or not theirs.input_size_known:
            ours = replace(ours, input_size=theirs.spec.input_size)
        own_shapes, their_shapes = ({(p.name, p.shape) for p in spec.layout} for spec in (ours, theirs.spec))
        if own_shapes != their_shapes or (ours.mode, ours.dtype) != (theirs.spec.mode, theirs.spec.dtype):
            raise ValueError(f"params must be those of a layer like {self._spec}; got those of {theirs.spec}")
        if input_size_known:
            theirs.infer_input_size(self._spec.input_size)
        return params

    def __repr__(self) -> str:
        spec = self._spec
        size = self._params.store.spec.input_size if self._params.store.input_size_known else None
        more = f", num_layers={spec.num_layers}" if spec.num_layers != 1 else ""
        more += f", dropout={spec.dropout:g}" if spec.dropout else ""
        more += ", bidirectional" if spec.bidirectional else ""
        return f"{type(self).__name__}({size} -> {spec.hidden_size}, {self._layout}{more})"

    @property
    def prefix(self) -> str:
        """What the parameters' full names start with."""
        return self._params.prefix

    @property
    def params(self) -> ParameterDict:
        """The parameters by full name."""
        return self._params

    def collect_params(self) -> ParameterDict:
        """The parameters by full name: ``lstm0_l0_i2h_weight`` (G·H, I), ``lstm0_l0_h2h_bias`` (G·H,)."""
        return self._params

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
        """For each state its ``"shape"`` (L·D, N, size), its ``"__layout__"`` and its ``"dtype"``."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
            raise TypeError(f"batch_size must be an integer; got {batch_size!r}")
        if batch_size < 0:
            raise ValueError(f"batch_size must be at least 0; got {shown(batch_size)}")
        shapes, dtype = self._spec.state_shape(int(batch_size)), self._params.store.spec.dtype
        check_bytes("batch_size", int(batch_size), shapes, dtype)
        return [{"shape": shape, "__layout__": "LNC", "dtype": dtype} for shape in shapes]

    def begin_state(self, batch_size: int = 0, func: Callable[..., Array] = np.zeros, **options: Any) -> list[Array]:
        """Initial states: for each, what ``func`` returns for its shape, its ``dtype`` and the further options."""
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
        """Take values from a dict of arrays; if anything is wrong with one of them, none is taken.

        Args:
            params: Arrays, each by its full name (``lstm0_l0_i2h_weight``), by that without the layer's prefix, or by
                the name that ``Block.save_parameters`` gives it (``_unfused.0.i2h_weight``, or both ways
                ``_unfused.0.l_cell.i2h_weight``).
            allow_missing: Whether parameters may keep the values they have.
            ignore_extra: Whether there may be other names.
            cast_dtype: Whether arrays of another floating dtype are converted.
            prefix: What stands before all names: the layer's place in a larger network, ``"1."``, or the prefix that
                another process gave it, ``"lstm3_"``.

        Raises:
            TypeError: Not a mapping, not arrays, or of another dtype.
            ValueError: A parameter is missing, there twice, or has the wrong shape; or there are others.
        """
        if not isinstance(params, Mapping):
            raise TypeError(f"params must be a dict of named arrays; got {type(params).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string; got {prefix!r}")
        flags = {"allow_missing": allow_missing, "ignore_extra": ignore_extra, "cast_dtype": cast_dtype}
        missing, extra, cast = (as_bool(name, value) for name, value in flags.items())
        keys = short_names(params, [one.short_name for one in self._params.values()], self.prefix, prefix)
        if not extra and (others := sorted(set(params) - set(keys.values()))):
            raise ValueError(f"params must hold no others unless ignore_extra is True; got {', '.join(others)}")
        self._params.load({name: params[key] for name, key in keys.items()}, missing, cast)

    def save_parameters(self) -> dict[str, Array]:
        """Copies of all values by the names that ``Block.save_parameters`` gives them: MXNet can load them."""
        both_ways = self._spec.bidirectional
        saved = {}
        for entry in self._params.store.spec.layout:
            place = f"{entry.layer}.{'lr'[entry.direction]}_cell" if both_ways else str(entry.layer)
            saved[f"_unfused.{place}.{entry.kind}"] = self._params[self.prefix + entry.name].data().copy()
        return saved

    def __call__(self, inputs: Array, states: States = None, sequence_length: Lengths = None) -> Any:
        """Run over whole sequences, in inference.

        Args:
            inputs: (T, N, I) or (N, T, I), as ``layout`` has it, of the layer's dtype.
            states: Initial states: a list of one or, for an LSTM, two arrays (L·D, N, size), or the one array alone;
                None for zeros.
            sequence_length: Valid steps of each sequence, integers (N,) from 0 to T, with
                ``use_sequence_length=True`` and only then.

        Returns:
            The output in ``layout``, with D·S features; if states were given, that and a list of the final states.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the layer has no parameters yet.
            NotImplementedError: Naming what no engine has.
        """
        output, final, _, _ = self._forward(inputs, states, sequence_length, False, None)
        return output if states is None else (output, final)

    def train(
        self, inputs: Array, states: States = None, sequence_length: Lengths = None, *, seed: int | None = None
    ) -> tuple[Any, LayerBackward]:
        """Run over whole sequences, in training.

        Args:
            inputs: As in a call.
            states: As in a call.
            sequence_length: As in a call.
            seed: From 0 to 2**64 - 1; says which elements are dropped. None for a new one, which ``backward.seed``
                tells.

        Returns:
            What a call returns, and a :class:`LayerBackward`.

        Raises:
            TypeError: As a call does.
            ValueError: As a call does.
            NotImplementedError: As a call does.
        """
        output, final, op, reserve = self._forward(inputs, states, sequence_length, True, seed)
        assert reserve is not None
        backward = LayerBackward(self._params, op, reserve, self._layout, states is not None)
        return (output if states is None else (output, final)), backward

    def _forward(
        self, inputs: object, states: object, lengths: Lengths, training: bool, seed: int | None
    ) -> tuple[Array, list[Array], RNNOp, Reserve | None]:
        axes = {"T": "T", "N": "N", "C": "I"}
        shape = f"({', '.join(axes[axis] for axis in self._layout)})"
        if not isinstance(inputs, np.ndarray):
            raise TypeError(f"inputs must be a NumPy array; got {type(inputs).__name__}")
        if inputs.ndim != 3 or 0 in inputs.shape:
            raise ValueError(f"inputs must have shape {shape}, each at least 1; got {inputs.shape}")
        store = self._params.store
        if store.input_size_known and inputs.shape[2] != store.spec.input_size:
            raise ValueError(f"inputs must have {store.spec.input_size} features; got {inputs.shape[2]}")
        if inputs.dtype != np.dtype(store.spec.dtype):
            raise TypeError(f"inputs must have dtype {store.spec.dtype}; got {inputs.dtype}")
        check_lengths(self._use_lengths, lengths)
        initial: Any = [states] if isinstance(states, np.ndarray) else states
        flat = self._params.infer_input_size(inputs.shape[2])
        op = self._op_for(inputs.shape[2])
        y = np.empty((*inputs.shape[:2], op.spec.output_size), op.spec.dtype)
        with validation.renamed(_NAMES):
            _, final, reserve = op.forward(
                time_major(inputs, self._layout), flat, initial, training=training, lengths=lengths,
                out=time_major(y, self._layout), seed=seed,
            )  # fmt: skip
        return y, list(final), op, reserve

    def _op_for(self, input_size: int) -> RNNOp:
        """The layer's op; a new one when the input size becomes known or the dtype changes."""
        dtype = self._params.store.spec.dtype
        if self._op is None or (self._op.spec.input_size, self._op.spec.dtype) != (input_size, dtype):
            self._op = RNNOp(replace(self._spec, input_size=input_size, dtype=dtype), self._backend)
        return self._op
