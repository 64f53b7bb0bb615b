"""The cell that runs on the fused operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fusedrnn.mxnet.rnn.base import BaseRNNCell, Shapes, StateInfo
from fusedrnn.mxnet.rnn.checks import Layout, check_array, columns, require, take
from fusedrnn.mxnet.rnn.unfused import BidirectionalCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.scalars import positive_int
from fusedrnn.spec import DTYPES, Array, RNNSpec


class FusedRNNCell(BaseRNNCell):
    """A network of any depth, one or both ways, run as a whole on the fused operator.

    It runs over whole sequences only: calling it raises NotImplementedError, and :meth:`unfuse` gives cells that can
    be called. Its one parameter, ``{prefix}parameters``, is the flat vector of ``RNNSpec.layout``. Its states are
    (L·D, N, H), at index layer·D + direction.

    Args:
        num_hidden: H.
        num_layers: L.
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        bidirectional: Whether each layer runs both ways.
        dropout: Probability with which training would drop elements between layers; inference, which is what cells
            do, ignores it.
        get_next_state: Whether :meth:`unroll` returns the final states; otherwise it returns an empty list for them.
        prefix: What the parameters' names start with; None for the mode and an underscore.
        params: Passed to :meth:`set_params` if given.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have.
    """

    def __init__(
        self,
        num_hidden: int,
        num_layers: int = 1,
        mode: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        get_next_state: bool = False,
        prefix: str | None = None,
        params: Mapping[str, Array] | None = None,
    ) -> None:
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string or None; got {prefix!r}")
        if not isinstance(get_next_state, bool):
            raise TypeError(f"get_next_state must be True or False; got {get_next_state!r}")
        num_hidden = positive_int("num_hidden", num_hidden)
        # Input size and dtype are the parameters' to say; until they come, these stand in.
        self._spec = RNNSpec(mode, 1, num_hidden, num_layers, bidirectional, dropout)
        self._get_next_state = get_next_state
        self._prefix = f"{mode}_" if prefix is None else prefix
        self._flat: Array | None = None
        if params is not None:
            self.set_params(params)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The one prefix."""
        return (self._prefix,)

    @property
    def output_size(self) -> int:
        """D·H."""
        return self._spec.output_size

    @property
    def state_info(self) -> list[StateInfo]:
        """Shape (L·D, 0, H) for h and, in an LSTM, c."""
        return [{"shape": (rows, 0, size), "__layout__": "LNC"} for rows, _, size in self._spec.state_shape(1)]

    @property
    def params(self) -> dict[str, Array]:
        """The flat vector by its name; empty before :meth:`set_params`."""
        return {} if self._flat is None else {self._name: self._flat}

    def param_shapes(self, input_size: int) -> Shapes:
        """Name and shape of the flat vector for inputs of ``input_size`` features."""
        return {self._name: (replace(self._spec, input_size=input_size).layout.size,)}

    def set_params(self, params: Mapping[str, Array]) -> None:
        """Compute with ``{prefix}parameters`` from now on: float32 or float64; its length says the input size."""
        flat = self._own(params)
        if flat.dtype.name not in DTYPES or not flat.dtype.isnative:
            raise TypeError(f"{self._name} must have dtype {' or '.join(DTYPES)}; got {flat.dtype}")
        self._spec = replace(self._sized(flat), dtype=flat.dtype.name)
        self._flat = flat

    def unpack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Split the flat vector by layer, direction and gate: ``{prefix}l0_i2h_f_weight`` (H, I), as copies."""
        flat = self._own(params)
        unpacked = {name: array for name, array in params.items() if name != self._name}
        unpacked.update(self._by_layer(self._sized(flat), flat))
        return self._stack().unpack_weights(unpacked)

    def pack_weights(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of :meth:`unpack_weights`: a new flat vector."""
        stack = self._stack()
        packed = stack.pack_weights(params)
        input_size = columns(packed, f"{self._prefix}l0_i2h_weight")
        own = take(packed, stack.param_shapes(input_size))
        arrays = {name.removeprefix(self._prefix): packed.pop(name) for name in own}
        dtype = next(iter(own.values())).dtype
        packed[self._name] = replace(self._spec, input_size=input_size).layout.pack(arrays, dtype=dtype)
        return packed

    def unroll(
        self,
        length: int,
        inputs: Array | Sequence[Array],
        begin_state: Sequence[Array] | None = None,
        layout: Layout = "NTC",
        merge_outputs: bool | None = None,
    ) -> tuple[Array | list[Array], list[Array]]:
        """Run over a sequence; see :meth:`BaseRNNCell.unroll`. No states are returned unless ``get_next_state``."""
        outputs, states = super().unroll(length, inputs, begin_state, layout, merge_outputs)
        return outputs, states if self._get_next_state else []

    def unfuse(self) -> SequentialRNNCell:
        """The same network as a stack of cells that compute step by step.

        Layer 1's forward cell has the prefix ``{prefix}l1_``, its reverse one ``{prefix}r1_``. If this cell's
        parameters are set, so are theirs, as views of the same vector.
        """
        stack = self._stack()
        if self._flat is not None:
            stack.set_params(self._by_layer(self._spec, self._flat))
        return stack

    def _stack(self) -> SequentialRNNCell:
        stack = SequentialRNNCell()
        for layer in range(self._spec.num_layers):
            cells = [self._single(f"{self._prefix}{side}{layer}_") for side in "lr"[: self._spec.num_directions]]
            stack.add(BidirectionalCell(*cells) if len(cells) == 2 else cells[0])
        return stack

    def _single(self, prefix: str) -> BaseRNNCell:
        size = self._spec.hidden_size
        if self._spec.mode == "lstm":
            return LSTMCell(size, prefix)
        if self._spec.mode == "gru":
            return GRUCell(size, prefix)
        return RNNCell(size, "relu" if self._spec.mode == "rnn_relu" else "tanh", prefix)

    @property
    def _name(self) -> str:
        return f"{self._prefix}parameters"

    def _own(self, params: Mapping[str, Array]) -> Array:
        require(params, [self._name])
        return check_array(self._name, params[self._name], 1, "(size,)")

    def _sized(self, flat: Array) -> RNNSpec:
        """The spec with the input size that a flat vector of this length is for."""
        smallest = replace(self._spec, input_size=1)
        per_input = smallest.num_gates * smallest.hidden_size * smallest.num_directions
        more, rest = divmod(len(flat) - smallest.layout.size, per_input)
        if more < 0 or rest:
            raise ValueError(
                f"{self._name} must have {smallest.layout.size} elements for one input feature and {per_input} more "
                f"for each other; got {len(flat)}"
            )
        return replace(smallest, input_size=1 + more)

    def _by_layer(self, spec: RNNSpec, flat: Array) -> dict[str, Array]:
        """Views of the flat vector by the names of the unfused cells: ``{prefix}l0_i2h_weight``."""
        return {self._prefix + name: view for name, view in spec.layout.unpack(flat).items()}

    def _check_steps(self) -> None:
        raise NotImplementedError("FusedRNNCell runs over whole sequences; call unroll, or the cells of unfuse()")

    def _run(self, x: Array, states: list[Array]) -> tuple[Array, list[Array]]:
        if self._flat is None:
            raise ValueError(f"params of FusedRNNCell {self._prefix!r} are not set; call set_params")
        self._check_x(x, self._spec.input_size, self._flat.dtype)
        y, after, _ = RNNOp.get(self._spec).forward(x, self._flat, tuple(states))
        return y, list(after)
