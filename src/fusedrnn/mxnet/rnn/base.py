"""The base class of all cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array
from fusedrnn.mxnet.rnn.checks import Layout, Shapes, check_array, check_like, require, unroll_inputs
from fusedrnn.scalars import check_bytes, positive_int
from fusedrnn.spec import RNNSpec

StateInfo = TypedDict("StateInfo", {"shape": tuple[int, ...], "__layout__": str})


class BaseRNNCell(ABC):
    """A recurrent cell, or a network of cells, that computes on NumPy arrays in inference.

    Parameters are a dict of named arrays. It may be the dict of a whole model: a cell finds its own arrays by its
    prefix. Arrays are neither copied nor converted, so inputs, states and parameters must have the same dtype.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has an invalid value.
    """

    _cells: Sequence[BaseRNNCell] = ()
    """The cells of a network of cells, in the order of their states and prefixes."""
    _get_next_state = True
    """Whether :meth:`unroll` returns the final states."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the parameters' names, one for each cell of the network."""
        return tuple(prefix for cell in self._cells for prefix in cell.prefixes)

    @property
    @abstractmethod
    def output_size(self) -> int:
        """S: features of the output at each step."""

    @property
    def state_info(self) -> list[StateInfo]:
        """For each state its ``"shape"``, with 0 for the batch, and its ``"__layout__"``."""
        return [info for cell in self._cells for info in cell.state_info]

    @property
    def params(self) -> dict[str, Array]:
        """The arrays this cell computes with, by full name; empty before :meth:`set_params`."""
        return {name: array for cell in self._cells for name, array in cell.params.items()}

    @abstractmethod
    def param_shapes(self, input_size: int) -> Shapes:
        """The name and the shape of every parameter, for inputs of ``input_size`` features."""

    def set_params(self, params: Mapping[str, Array]) -> None:
        """Compute with these arrays from now on. If there is an error, no cell changes.

        Args:
            params: Arrays by full name, of the shapes that :meth:`param_shapes` returns and of one floating dtype.
                Other names are ignored.

        Raises:
            TypeError: If ``params`` is not a mapping, or its values are not arrays of one floating dtype.
            ValueError: If a parameter is missing or has the wrong shape.
        """
        specs = [(cell, arrays, cell._to_run(spec, arrays)) for cell, arrays, spec in self._check_params(params)]
        for cell, arrays, spec in specs:
            cell._params, cell._spec = arrays, spec

    @property
    def _leaves(self) -> list[SpecCell]:
        """The cells that have parameters."""
        return [leaf for cell in self._cells for leaf in cell._leaves]

    def _check_params(self, params: Mapping[str, Array]) -> list[tuple[SpecCell, dict[str, Array], RNNSpec]]:
        """For each cell that has parameters its arrays and the spec that follows from them, checked."""
        require(params)
        checked = [(leaf, *leaf._take(params)) for leaf in self._leaves]
        if checked:
            # Each cell's arrays fit this cell; here, those of the first determine all the others.
            arrays = {name: array for _, own, _ in checked for name, array in own.items()}
            dtype = next(iter(arrays.values())).dtype
            for name, shape in self.param_shapes(checked[0][2].input_size).items():
                check_like(name, arrays[name], shape, dtype)
        return checked

    def unpack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """A new dict with copies of this cell's parameters, split by gate, and with all other entries of ``params``.

        Gates have MXNet's names, ``i f c o`` in an LSTM and ``r z o`` in a GRU: ``lstm_i2h_weight`` (4·H, I) becomes
        ``lstm_i2h_i_weight``, ``lstm_i2h_f_weight``, ``lstm_i2h_c_weight``, ``lstm_i2h_o_weight`` (H, I).

        Raises:
            TypeError: If ``params`` is not a mapping, or its values are not arrays of one floating dtype.
            ValueError: If a parameter is missing or has the wrong shape.
        """
        self._check_params(params)
        unpacked = dict(params)
        for cell in self._cells:
            unpacked = cell.unpack_weights(unpacked)
        return unpacked

    def pack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of :meth:`unpack_weights`, with the same errors."""
        require(params)
        packed = dict(params)
        for cell in self._cells:
            packed = cell.pack_weights(packed)
        self._check_params(packed)
        return packed

    @abstractmethod
    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        """Outputs (T, N, S) and new states, from inputs (T, N, I) and states. Inputs may have any size and dtype."""

    def _check_steps(self) -> None:
        """Raise a NotImplementedError if this cell cannot run step by step."""
        for cell in self._cells:
            cell._check_steps()

    def begin_state(self, batch_size: int, dtype: DTypeLike = "float32") -> list[Array]:
        """Zeros for every state, in the order and the layout of :attr:`state_info`.

        Raises:
            TypeError: If ``batch_size`` is not an integer, or ``dtype`` is not a floating type.
            ValueError: If ``batch_size`` is below 1, or too large for any memory.
        """
        batch_size = positive_int("batch_size", batch_size)
        if not np.issubdtype(dtype, np.floating):
            raise TypeError(f"dtype must be a floating type; got {dtype!r}")
        shapes = self._state_shapes(batch_size)
        check_bytes("batch_size", batch_size, shapes, dtype)
        return [np.zeros(shape, dtype) for shape in shapes]

    def __call__(self, inputs: Array, states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Run one step.

        Args:
            inputs: (N, I), in the parameters' dtype.
            states: The previous states, as :meth:`begin_state` or the last call returned them.

        Returns:
            The output (N, S) and the new states.

        Raises:
            NotImplementedError: If a cell runs only over whole sequences.
            TypeError: If an argument is not an array, or its dtype is not that of the parameters.
            ValueError: If an argument has the wrong shape, or :meth:`set_params` was never called.
        """
        self._check_steps()
        x = check_array("inputs", inputs, 2, "(N, I)")
        y, after = self._run(x[None], self._check_states("states", states, x))
        return y[0], after

    def unroll(
        self,
        length: int,
        inputs: Array | Sequence[Array],
        begin_state: Sequence[Array] | None = None,
        layout: Layout = "NTC",
        merge_outputs: bool | None = None,
    ) -> tuple[Array | list[Array], list[Array]]:
        """Run over a sequence.

        Args:
            length: T, the number of steps.
            inputs: One array in ``layout``, (N, T, I) or (T, N, I), or a list of T arrays (N, I).
            begin_state: The states before the first step; None for zeros.
            layout: The layout of an input array and of merged outputs, ``"NTC"`` or ``"TNC"``.
            merge_outputs: True for one output array in ``layout``, False for a list of T arrays (N, S), None for the
                form of ``inputs``.

        Returns:
            The outputs, and a list of the states after the last step in the order of :attr:`state_info`. A
            :class:`FusedRNNCell` without ``get_next_state`` returns an empty list instead.

        Raises:
            TypeError: If an argument is of the wrong type, or a dtype is not that of the parameters.
            ValueError: If an argument has the wrong shape or value, or :meth:`set_params` was never called.
        """
        x = unroll_inputs(length, inputs, layout)
        if merge_outputs is None:
            merge_outputs = isinstance(inputs, np.ndarray)
        elif not isinstance(merge_outputs, bool):
            raise TypeError(f"merge_outputs must be True, False or None; got {merge_outputs!r}")
        if begin_state is None:
            states = self.begin_state(x.shape[1], x.dtype)
        else:
            states = self._check_states("begin_state", begin_state, x[0])
        y, after = self._run(x, states)
        outputs = list(y) if not merge_outputs else y if layout == "TNC" else y.swapaxes(0, 1)
        return outputs, after if self._get_next_state else []

    def _state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        return [tuple(size or batch for size in info["shape"]) for info in self.state_info]

    def _check_states(self, name: str, states: object, x: Array) -> list[Array]:
        """``states`` as a list, checked: each has its shape for the batch of ``x`` (N, I), and the dtype of ``x``."""
        if not isinstance(states, (list, tuple)):
            raise TypeError(f"{name} must be a list of arrays; got {type(states).__name__}")
        shapes = self._state_shapes(len(x))
        if len(states) != len(shapes):
            raise ValueError(f"{name} must hold {len(shapes)} arrays; got {len(states)}")
        return [check_like(f"{name}[{i}]", states[i], shape, x.dtype) for i, shape in enumerate(shapes)]


class SpecCell(BaseRNNCell):
    """A cell with its own spec, prefix and parameters. The spec's input size follows from the parameters."""

    def __init__(self, spec: RNNSpec, prefix: str, params: Mapping[str, Array] | None) -> None:
        self._spec, self._prefix = spec, prefix
        self._params: dict[str, Array] = {}
        if params is not None:
            self.set_params(params)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The only prefix."""
        return (self._prefix,)

    @property
    def _leaves(self) -> list[SpecCell]:
        return [self]

    @abstractmethod
    def _take(self, params: Mapping[str, Array]) -> tuple[dict[str, Array], RNNSpec]:
        """This cell's arrays, checked, and the spec with the input size that follows from them."""

    def _to_run(self, spec: RNNSpec, arrays: Mapping[str, Array]) -> RNNSpec:
        """The spec for a computation with these arrays; an error if this cell cannot compute in their dtype."""
        return spec

    @property
    def output_size(self) -> int:
        """D·H."""
        return self._spec.output_size

    @property
    def params(self) -> dict[str, Array]:
        """The arrays by full name; empty before :meth:`set_params`."""
        return dict(self._params)

    def _arrays_for(self, x: Array) -> tuple[Array, ...]:
        """The parameters; an error unless inputs (T, N, I) match their input size and dtype."""
        cell, features = f"{type(self).__name__} {self._prefix!r}", x.shape[2]
        if not self._params:
            raise ValueError(f"params of {cell} are not set; call set_params")
        arrays = tuple(self._params.values())
        if features != self._spec.input_size:
            expected = f"{self._spec.input_size} features"
            raise ValueError(f"inputs of {cell} must have {expected}, as its parameters do; got {features}")
        if x.dtype != arrays[0].dtype:
            raise TypeError(f"inputs of {cell} must have dtype {arrays[0].dtype}, as its parameters do; got {x.dtype}")
        return arrays
