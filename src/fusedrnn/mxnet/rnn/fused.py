"""The cell that runs on the fused operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fusedrnn.arrays import Array
from fusedrnn.mxnet.rnn.base import BaseRNNCell, SpecCell, StateInfo
from fusedrnn.mxnet.rnn.checks import Shapes, check_array, require, take
from fusedrnn.mxnet.rnn.unfused import BidirectionalCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import as_number, check_choice, positive_int
from fusedrnn.spec import DTYPES, MODES, RNNSpec

_CELLS: dict[str, Callable[..., BaseRNNCell]] = {
    "rnn_relu": partial(RNNCell, activation="relu"), "rnn_tanh": RNNCell, "lstm": LSTMCell, "gru": GRUCell,
}  # fmt: skip


class FusedRNNCell(SpecCell):
    """A network of any depth, in one or both directions, that runs as a whole on the fused operator.

    It runs only over whole sequences: a call for one step raises NotImplementedError, but :meth:`unfuse` returns cells
    that can be called. Its only parameter, ``{prefix}parameters``, is the flat vector of ``RNNSpec.layout``, float32 or
    float64, whose length gives the input size. Its states are (L·D, N, H), with index layer·D + direction. See
    :class:`BaseRNNCell`.

    Args:
        num_hidden: H.
        num_layers: L.
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        bidirectional: Whether each layer runs in both directions.
        dropout: Probability with which training would drop elements between layers. Cells only run inference, and
            ignore it.
        get_next_state: Whether :meth:`unroll` returns the final states; else it returns an empty list instead.
        forget_bias: What MXNet's initializer gives the forget gate's bias. Cells get all values by :meth:`set_params`,
            and ignore it.
        prefix: The prefix of the parameters' names; None for the mode and an underscore.
        params: Passed to :meth:`set_params` if given.
    """

    def __init__(
        self,
        num_hidden: int,
        num_layers: int = 1,
        mode: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        get_next_state: bool = False,
        forget_bias: float = 1.0,
        prefix: str | None = None,
        params: Mapping[str, Array] | None = None,
    ) -> None:
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string or None; got {prefix!r}")
        if not isinstance(get_next_state, bool):
            raise TypeError(f"get_next_state must be True or False; got {get_next_state!r}")
        as_number("forget_bias", forget_bias)
        self._get_next_state = get_next_state
        # set_params sets the input size and the dtype.
        mode = check_choice("mode", mode, MODES)
        spec = RNNSpec(mode, 1, positive_int("num_hidden", num_hidden), num_layers, bidirectional, dropout)
        prefix = f"{mode}_" if prefix is None else prefix
        self._name = f"{prefix}parameters"
        super().__init__(spec, prefix, params)

    @property
    def state_info(self) -> list[StateInfo]:
        """The description of each state: h and, in an LSTM, c, with shape (L·D, 0, H)."""
        return [{"shape": (rows, 0, size), "__layout__": "LNC"} for rows, _, size in self._spec.state_shape(1)]

    def param_shapes(self, input_size: int) -> Shapes:
        """The name and the shape of the flat vector, for inputs of ``input_size`` features."""
        return {self._name: (replace(self._spec, input_size=input_size).layout.size,)}

    def _to_run(self, spec: RNNSpec, arrays: Mapping[str, Array]) -> RNNSpec:
        dtype = arrays[self._name].dtype
        if dtype.name not in DTYPES or not dtype.isnative:
            raise TypeError(f"{self._name} must have dtype {' or '.join(DTYPES)}; got {dtype}")
        return replace(spec, dtype=dtype.name)

    def unpack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Copies of the flat vector's parts, by layer, direction and gate: ``{prefix}l0_i2h_f_weight`` (H, I)."""
        own, spec = self._take(params)
        unpacked = {name: array for name, array in params.items() if name != self._name}
        return self.unfuse().unpack_weights(unpacked | self._by_layer(spec, own[self._name]))

    def pack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of :meth:`unpack_weights`: a new flat vector."""
        stack, first = self.unfuse(), f"{self._prefix}l0_i2h_weight"
        packed = stack.pack_weights(params)
        own = take(packed, first, stack.param_shapes)
        arrays = {name.removeprefix(self._prefix): packed.pop(name) for name in own}
        spec = replace(self._spec, input_size=own[first].shape[1])
        packed[self._name] = spec.layout.pack(arrays, dtype=own[first].dtype)
        return packed

    def unfuse(self) -> SequentialRNNCell:
        """The same network as a stack of cells that compute step by step.

        The forward cell of layer 1 has the prefix ``{prefix}l1_``, the reverse cell ``{prefix}r1_``. If this cell's
        parameters are set, the cells' parameters are set to views of the same vector.
        """
        stack, spec = SequentialRNNCell(), self._spec
        for layer in range(spec.num_layers):
            prefixes = [f"{self._prefix}{side}{layer}_" for side in "lr"[: spec.num_directions]]
            cells = [_CELLS[spec.mode_name](spec.hidden_size, prefix=prefix) for prefix in prefixes]
            stack.add(BidirectionalCell(cells[0], cells[1]) if len(cells) == 2 else cells[0])
        if self._params:
            stack.set_params(self._by_layer(spec, self._params[self._name]))
        return stack

    def _by_layer(self, spec: RNNSpec, flat: Array) -> dict[str, Array]:
        """Views of the flat vector by the names of the unfused cells: ``{prefix}l0_i2h_weight``."""
        return {self._prefix + name: view for name, view in spec.layout.unpack(flat).items()}

    def _take(self, params: Mapping[str, Array]) -> tuple[dict[str, Array], RNNSpec]:
        require(params, [self._name])
        flat = check_array(self._name, params[self._name], 1, "(size,)")
        smallest = replace(self._spec, input_size=1)
        per_input = smallest.num_gates * smallest.hidden_size * smallest.num_directions
        additional_inputs, remainder = divmod(len(flat) - smallest.layout.size, per_input)
        if additional_inputs < 0 or remainder:
            raise ValueError(
                f"{self._name} must have {smallest.layout.size} elements for one input feature and {per_input} more "
                f"for each other; got {len(flat)}"
            )
        return {self._name: flat}, replace(smallest, input_size=1 + additional_inputs)

    def _check_steps(self) -> None:
        raise NotImplementedError("FusedRNNCell runs over whole sequences; call unroll, or the cells of unfuse()")

    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        (flat,) = self._arrays_for(x)
        y, after, _ = RNNOp.get(self._spec).forward(x, flat, tuple(states))
        return y, list(after)
