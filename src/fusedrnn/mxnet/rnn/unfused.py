"""Cells that compute step by step on the reference, and networks of cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Literal
from weakref import WeakSet

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.trace import traced_cell
from fusedrnn.engines.reference import forward as reference
from fusedrnn.mxnet.rnn.base import BaseRNNCell, SpecCell, StateInfo
from fusedrnn.mxnet.rnn.checks import Shapes, take
from fusedrnn.scalars import as_number, positive_int
from fusedrnn.spec import RNNSpec

# MXNet's names of the gates, as in its checkpoints, in our order. Its c is our g of an LSTM, its o our n of a GRU.
_GATE_NAMES = {"rnn_relu": ("",), "rnn_tanh": ("",), "lstm": ("_i", "_f", "_c", "_o"), "gru": ("_r", "_z", "_o")}


class _SingleCell(SpecCell):
    """A cell of one layer and direction; it runs :func:`fusedrnn.engines.reference.forward.step`."""

    def __init__(self, mode: str, num_hidden: int, prefix: str, params: Mapping[str, Array] | None) -> None:
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string; got {prefix!r}")
        super().__init__(RNNSpec(mode, 1, positive_int("num_hidden", num_hidden)), prefix, params)

    @property
    def state_info(self) -> list[StateInfo]:
        return [{"shape": (0, self._spec.hidden_size), "__layout__": "NC"} for _ in self._spec.state_names]

    def param_shapes(self, input_size: int) -> Shapes:
        shapes = replace(self._spec, input_size=input_size).parameter_shapes(0)
        return {self._prefix + kind: shape for kind, shape in shapes.items()}

    def _take(self, params: Mapping[str, Array]) -> tuple[dict[str, Array], RNNSpec]:
        name = f"{self._prefix}i2h_weight"
        own = take(params, name, self.param_shapes)
        return own, replace(self._spec, input_size=own[name].shape[1])

    def unpack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        own, _ = self._take(params)
        unpacked = {name: array for name, array in params.items() if name not in own}
        for name, array in own.items():
            gates = np.split(array, self._spec.num_gates)
            unpacked.update(zip(self._gate_names(name), map(np.copy, gates), strict=True))
        return unpacked

    def pack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        gate_names = {name: self._gate_names(name) for name in self.param_shapes(1)}
        own = take(params, gate_names[f"{self._prefix}i2h_weight"][0], self._gate_shapes)
        packed = {name: array for name, array in params.items() if name not in own}
        return packed | {name: np.concatenate([own[gate] for gate in gates]) for name, gates in gate_names.items()}

    def _gate_shapes(self, input_size: int) -> Shapes:
        """The name and the shape of each gate's part of each parameter."""
        shapes, size = self.param_shapes(input_size), self._spec.hidden_size
        return {gate: (size, *shape[1:]) for name, shape in shapes.items() for gate in self._gate_names(name)}

    def _gate_names(self, name: str) -> list[str]:
        """The names of the gates' parts of a parameter, such as ``lstm_i2h_i_weight`` of ``lstm_i2h_weight``."""
        source, _, group = name.rpartition("_")
        return [f"{source}{gate}_{group}" for gate in _GATE_NAMES[self._spec.mode_name]]

    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        i2h_weight, h2h_weight, i2h_bias, h2h_bias = self._arrays_for(x)
        y = np.empty((*x.shape[:2], self.output_size), x.dtype)
        cell, recurrent = traced_cell(self._spec.variant), {"h2h_weight": h2h_weight, "h2h_bias": h2h_bias}
        for t in range(len(x)):
            x_gates = x[t] @ i2h_weight.T + i2h_bias
            y[t], after = reference.step(cell, x_gates, states, recurrent)
            states = list(after)
        return y, states


class RNNCell(_SingleCell):
    """The vanilla cell, h = act(W_i x + b_i + W_h h + b_h), with one state (N, H). See :class:`BaseRNNCell`.

    Its parameters are ``rnn_i2h_weight`` (H, I), ``rnn_h2h_weight`` (H, H), ``rnn_i2h_bias`` and ``rnn_h2h_bias`` (H,).

    Args:
        num_hidden: H.
        activation: ``"tanh"`` or ``"relu"``.
        prefix: The prefix of the parameters' names.
        params: Passed to :meth:`set_params` if given.
    """

    def __init__(
        self,
        num_hidden: int,
        activation: Literal["tanh", "relu"] = "tanh",
        prefix: str = "rnn_",
        params: Mapping[str, Array] | None = None,
    ) -> None:
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation must be 'tanh' or 'relu'; got {activation!r}")
        super().__init__(f"rnn_{activation}", num_hidden, prefix, params)


class LSTMCell(_SingleCell):
    """The LSTM cell, with states h and c (N, H).

    Its parameters are ``lstm_i2h_weight`` (4·H, I), ``lstm_h2h_weight`` (4·H, H), ``lstm_i2h_bias`` and
    ``lstm_h2h_bias`` (4·H,), gates i f g o. The forget gate's bias has no additional constant. Its arguments are those
    of :class:`RNNCell`, without ``activation``, and ``forget_bias``: what MXNet's initializer gives the forget gate's
    bias. Cells get all values by :meth:`set_params`, and ignore it.
    """

    def __init__(
        self,
        num_hidden: int,
        prefix: str = "lstm_",
        params: Mapping[str, Array] | None = None,
        forget_bias: float = 1.0,
    ) -> None:
        as_number("forget_bias", forget_bias)
        super().__init__("lstm", num_hidden, prefix, params)


class GRUCell(_SingleCell):
    """The GRU cell, reset-after as in MXNet, cuDNN and PyTorch, with one state (N, H).

    Its parameters are ``gru_i2h_weight`` (3·H, I), ``gru_h2h_weight`` (3·H, H), ``gru_i2h_bias`` and ``gru_h2h_bias``
    (3·H,), gates r z n. Its arguments are those of :class:`RNNCell`, without ``activation``.
    """

    def __init__(self, num_hidden: int, prefix: str = "gru_", params: Mapping[str, Array] | None = None) -> None:
        super().__init__("gru", num_hidden, prefix, params)


class _CellGroup(BaseRNNCell):
    """A network of cells with distinct prefixes."""

    def __init__(self) -> None:
        self._cells: list[BaseRNNCell] = []
        # Weak: a part must neither keep an unused network alive nor be pickled with it.
        self._owners: WeakSet[_CellGroup] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_owners"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A shallow copy has a list of its own, since what is added to it is not checked against the original.
        vars(self).update(state, _cells=list(state["_cells"]), _owners=WeakSet())
        self._own_cells()

    def _adopt(self, name: str, cell: BaseRNNCell) -> None:
        if not isinstance(cell, BaseRNNCell):
            raise TypeError(f"{name} must be a cell; got {type(cell).__name__}")
        groups = self._with_owners()
        if any(cell is group for group in groups):
            raise ValueError(f"{name} must be another cell; got the one that it is added to, or one that holds it")
        self._cells.append(cell)
        # Two cells with the same prefix would silently share their weights.
        taken = {prefix for group in groups for prefix, times in Counter(group.prefixes).items() if times > 1}
        if taken:
            self._cells.pop()
            raise ValueError(f"{name} must have a prefix of its own; {', '.join(map(repr, sorted(taken)))} is taken")

    def _own_cells(self) -> None:
        """Let the networks among the cells know that they are a part of this one."""
        for cell in self._cells:
            if isinstance(cell, _CellGroup):
                cell._owners.add(self)

    def _with_owners(self) -> list[_CellGroup]:
        """This network and all that it is a part of: a cell that is added to it becomes a part of them too."""
        return [self, *(group for owner in self._owners for group in owner._with_owners())]


class SequentialRNNCell(_CellGroup):
    """Stacked cells: each reads the output of the one below. Its states are those of its cells, in order.

    >>> stack = SequentialRNNCell()
    >>> stack.add(GRUCell(8, prefix="bottom_"))
    >>> stack.add(LSTMCell(4, prefix="top_"))
    >>> [info["shape"] for info in stack.state_info]
    [(0, 8), (0, 4), (0, 4)]
    """

    def add(self, cell: BaseRNNCell) -> None:
        """Put a cell on top.

        Raises:
            TypeError: If ``cell`` is not a cell.
            ValueError: If one of its prefixes is taken in the stack, or in a network that the stack is a part of; or if
                ``cell`` is the stack or such a network.
        """
        self._adopt("cell", cell)
        self._own_cells()

    @property
    def output_size(self) -> int:
        """The features of the output of the cell on top."""
        return self._filled()[-1].output_size

    def param_shapes(self, input_size: int) -> Shapes:
        """The name and the shape of every cell's parameters, for inputs of ``input_size`` features at the bottom."""
        shapes: Shapes = {}
        for cell in self._filled():
            shapes.update(cell.param_shapes(input_size))
            input_size = cell.output_size
        return shapes

    def _filled(self) -> list[BaseRNNCell]:
        if not self._cells:
            raise ValueError("SequentialRNNCell must hold at least one cell; call add")
        return self._cells

    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        after: list[Array] = []
        remaining = iter(states)
        for cell in self._filled():
            x, final = cell._run(x, list(islice(remaining, len(cell.state_info))))
            after += final
        return x, after


class BidirectionalCell(_CellGroup):
    """Two cells over the same sequence, one from each end, with concatenated outputs.

    It runs only over whole sequences: a call for one step raises NotImplementedError. Its states are those of
    ``l_cell``, then those of ``r_cell``, whose last step is the first of the sequence.

    Args:
        l_cell: The cell that runs forward.
        r_cell: The cell that runs in reverse.
        params: Passed to :meth:`set_params` if given.

    Raises:
        TypeError: If ``l_cell`` or ``r_cell`` is not a cell.
        ValueError: If the cells have a prefix in common.
    """

    def __init__(self, l_cell: BaseRNNCell, r_cell: BaseRNNCell, params: Mapping[str, Array] | None = None) -> None:
        super().__init__()
        self._adopt("l_cell", l_cell)
        self._adopt("r_cell", r_cell)
        if params is not None:
            self.set_params(params)
        self._own_cells()  # last, so that a constructor that fails takes no prefixes

    @property
    def output_size(self) -> int:
        """The features of both cells' outputs together."""
        return sum(cell.output_size for cell in self._cells)

    def param_shapes(self, input_size: int) -> Shapes:
        """The name and the shape of both cells' parameters, for inputs of ``input_size`` features."""
        left, right = self._cells
        return left.param_shapes(input_size) | right.param_shapes(input_size)

    def _check_steps(self) -> None:
        raise NotImplementedError("BidirectionalCell reads the sequence from both ends; call unroll")

    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        left, right = self._cells
        count = len(left.state_info)
        l_y, l_after = left._run(x, states[:count])
        r_y, r_after = right._run(x[::-1], states[count:])
        return np.concatenate((l_y, r_y[::-1]), axis=2), l_after + r_after
