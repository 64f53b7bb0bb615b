"""The fields of the structs that kernels read, for a plan: one struct for the call, one for each layer-direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np

from fusedrnn.cell.trace import TracedCell
from fusedrnn.dropout import input_stream, scale, threshold
from fusedrnn.engines.cpu.kernels import backward_emitter, forward
from fusedrnn.engines.cpu.kernels.direction_emitter import UNPACKED_PARAMS
from fusedrnn.engines.cpu.kernels.lowered_cell import lowered_cell, state_letters
from fusedrnn.engines.cpu.launch.kernel_args import (
    Fields,
    KernelArgs,
    Relocation,
    array_fields,
    backward_symbols,
    caller_array_fields,
    forward_symbols,
    state_symbols,
)
from fusedrnn.engines.cpu.plan.plans import Plan
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.varlen import table_offsets
from fusedrnn.engines.cpu.weights.layout import PackedWeightsOffsets
from fusedrnn.jit.struct import Struct
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

_UNPACKED: dict[str, Kind] = dict(
    zip(UNPACKED_PARAMS, ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"), strict=True)
)
_GRADIENTS: dict[str, Kind] = {
    "d_x_weights": "i2h_weight", "d_h_weights": "h2h_weight", "d_projection": "h2r_weight",
    "d_x_bias": "i2h_bias", "d_h_bias": "h2h_bias",
}  # fmt: skip
# Fields of the kernels, and the names that the layout of packed weights has for them.
_FORWARD_WEIGHTS = {
    name: name for name in ("x_weights", "h_weights", "projection", "parameters", "x_bias", "h_bias", "ranges")
}  # fmt: skip
_BACKWARD_WEIGHTS = {
    "x_weights": "x_back", "h_weights": "h_back", "projection": "projection_back", "parameters": "parameters",
    "forward_x_weights": "x_weights", "forward_h_weights": "h_weights", "x_bias": "x_bias", "h_bias": "h_bias",
}  # fmt: skip
# Fields of a call that are attributes of the layout of the reserve.
_RESERVE_STRIDES = "saved_state_step", "saved_state_row", "saved_state_size", "saved_values_step", "saved_values_row"


def lay_out_args(
    spec: RNNSpec, plan: Plan, weights: Sequence[PackedWeightsOffsets], reserve: ReserveLayout | None,
    directions_apart: bool = False,
) -> KernelArgs:  # fmt: skip
    """The arguments of a plan's kernel; with ``directions_apart`` inference writes y as (T, D, N, S)."""
    fields = (_ForwardFields if plan.phase != "backward" else _BackwardFields)(spec, plan, reserve)
    fields.y_direction_bytes = fields.h_bytes * (plan.batch if directions_apart else 1)
    return fields.kernel_args(weights)


class _PlanFields:
    """The fields of a plan's structs that forward and backward have in common."""

    call_struct: Struct
    layer_dir_struct: Struct
    extended_struct: Callable[[TracedCell], Struct]
    y_direction_bytes: int

    def __init__(self, spec: RNNSpec, plan: Plan, reserve: ReserveLayout | None) -> None:
        self.spec, self.plan, self.reserve, self.workspace = spec, plan, reserve, plan.workspace
        self.item = np.dtype(spec.dtype).itemsize
        self.h_bytes, self.c_bytes = spec.state_size * self.item, spec.hidden_size * self.item
        self.letters = state_letters(len(spec.state_names))
        self.reduces = lowered_cell(spec.variant).reduces

    def kernel_args(self, weights: Sequence[PackedWeightsOffsets]) -> KernelArgs:
        """Build the arguments: the struct of the call, then one for each layer-direction."""
        call, layer_dir = self.call_struct, self.layer_dir_struct
        if len(self.letters) > len(state_letters(0)) or self.spec.scalar_kinds or self.reduces:
            layer_dir = self.extended_struct(lowered_cell(self.spec.variant))
        bounds = {name: np.array(bound, np.int64) for name, bound in self.plan.bounds.items()}
        addresses = {name: array.ctypes.data for name, array in bounds.items()}
        fields = {**self.call(), **addresses, "layer_dirs": Relocation("args", call.size)}
        # Made one at a time: all at once would take much memory.
        layer_dirs = ((layer_dir, self.layer_dir(index, offsets)) for index, offsets in enumerate(weights))
        num_fields = len(call.names) + len(weights) * len(layer_dir.names)
        structs = chain([(call, fields)], layer_dirs)
        return KernelArgs(self.plan, self.symbols(), structs, num_fields, [*bounds.values()])

    def symbols(self) -> list[str]:
        """The symbols of a call, in the order in which it gives their values."""
        return [f"unpacked {entry.name}" for entry in self.spec.layout.by_layer_direction]

    def call(self) -> Fields:
        """The fields of a call."""
        spec, plan, reserve = self.spec, self.plan, self.reserve
        return {
            "steps": plan.steps, "batch": plan.batch, "layers": spec.num_layers, "directions": spec.num_directions,
            "hidden": spec.hidden_size, "out": spec.state_size,
            "heads": spec.heads, "head_size": spec.hidden_size // spec.heads, "chunk": plan.share.chunk,
            **{f"grid_{name}": number for name, number in plan.grid._asdict().items()},
            **{name: Relocation("tables", offset) for name, offset in table_offsets(plan.steps, plan.batch).items()},
            **{name: Relocation("workspace", offset) for name, offset in self.workspace.offsets.items()},
            **self.workspace.fields,
            **{stride: getattr(reserve, stride, 0) for stride in _RESERVE_STRIDES},
            "spins": Relocation("spins"), "seed": Relocation("seed"), "resets": Relocation("resets"),
        }  # fmt: skip

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        raise NotImplementedError

    def common(self, index: int, weights: PackedWeightsOffsets, names: Mapping[str, str]) -> Fields:
        """The fields of a layer-direction that forward and backward have in common."""
        layer, direction = divmod(index, self.spec.num_directions)
        return {
            **self._input(layer), "k": self.spec.layer_input_size(layer), "reverse": int(self.spec.reverses(direction)),
            **{field: Relocation("weights", getattr(weights, name)) for field, name in names.items()},
            **self.parameters(_UNPACKED, layer, direction, "unpacked "), **self.saved(index),
        }  # fmt: skip

    def _input(self, layer: int) -> Fields:
        """The fields that say how a layer reads its input; only training drops elements."""
        spec = self.spec
        fields: Fields = {"threshold": 0, "scale": 0, "stream": 0, "residual": int(spec.adds_input(layer))}
        p = 0.0 if self.reserve is None else spec.dropout_of(layer)
        if p > 0:
            factor = np.float64(np.dtype(spec.dtype).type(scale(p)))
            fields |= {"threshold": threshold(p), "scale": int(factor.view(np.int64)), "stream": input_stream(layer)}
        return fields

    def parameters(self, kinds: Mapping[str, Kind], layer: int, direction: int, prefix: str = "") -> Fields:
        """The fields of parameters or their gradients; 0 for those that the spec does not have."""
        layout = self.spec.layout
        return {
            field: Relocation(prefix + layout.entry(layer, direction, kind).name) if layout.has(kind) else 0
            for field, kind in kinds.items()
        }

    def states(self, index: int, *symbols: str) -> Fields:
        """The fields of the caller's states (L·D, N, size)."""
        offset = index * self.plan.batch
        return {
            symbol: Relocation(symbol, offset * (self.h_bytes if "h" in symbol else self.c_bytes)) for symbol in symbols
        }

    def all_states(self, index: int, *symbols: str) -> Fields:
        """The fields of the caller's arrays of the last layer's states of every step; 0 in other layers."""
        layer, direction = divmod(index, self.spec.num_directions)
        is_last = layer == self.spec.num_layers - 1
        sizes = {symbol: self.h_bytes if symbol.endswith("_h") else self.c_bytes for symbol in symbols}
        return {symbol: Relocation(symbol, direction * sizes[symbol]) if is_last else 0 for symbol in symbols}

    def saved(self, index: int) -> Fields:
        """The fields of what the reserve holds of a layer-direction; zeros without a reserve."""
        reserve, num_states = self.reserve, len(self.spec.state_names)
        fields: Fields = dict.fromkeys(("saved_h", "saved_c", "saved_operand", "saved_values"), 0)
        if self.reduces:
            fields["moments"] = 0
        if reserve is None:
            return fields
        layer, direction = divmod(index, self.spec.num_directions)
        states = [("saved_h", 0, self.h_bytes)]
        if num_states > 1:
            states.append(("saved_c", 1, self.c_bytes))
        if reserve.num_states > num_states:
            states.append(("saved_operand", num_states, self.c_bytes))
        for name, number, row in states:
            fields[name] = Relocation("reserve", reserve.state_offset(layer, number) + direction * row)
        begin = reserve.saved_offset(index)
        if reserve.values_size:
            fields["saved_values"] = Relocation("reserve", begin)
        if self.reduces:
            fields["moments"] = Relocation("reserve", begin + reserve.values_size)
        return fields

    def saved_output(self, name: str, layer: int, offset: int = 0) -> Fields:
        """The fields of the output, in the reserve, of a layer below the last: of its h, if h is the output."""
        reserve = self.reserve
        assert reserve is not None
        begin = reserve.state_offset(layer, 0) if self.spec.output_is_state else reserve.output_offset(layer)
        strides = reserve.saved_state_step, reserve.saved_state_row
        return array_fields(name, Relocation("reserve", begin + offset), *strides)


class _ForwardFields(_PlanFields):
    call_struct, layer_dir_struct = forward.CALL, forward.LAYER_DIR
    extended_struct = staticmethod(forward.layer_dir_struct)

    def symbols(self) -> list[str]:
        """The symbols of a forward call."""
        return [*forward_symbols(self.letters), *super().symbols()]

    def call(self) -> Fields:
        """The fields of a call."""
        return {**super().call(), "nontemporal_output": int(self.plan.nontemporal_output)}

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        layer, direction = divmod(index, self.spec.num_directions)
        reserve, offset = self.reserve, direction * self.h_bytes
        if layer == 0:
            x = caller_array_fields("x")
        elif reserve is not None:
            x = self.saved_output("x", layer - 1)
        else:
            x = self._layer_output("x", layer - 1)
        if layer == self.spec.num_layers - 1:
            y = caller_array_fields("y", direction * self.y_direction_bytes)
        elif reserve is None:
            y = self._layer_output("y", layer, offset)
        else:
            y = array_fields("y", 0, 0, 0) if self.spec.output_is_state else self.saved_output("y", layer, offset)
        return {
            **self.common(index, weights, _FORWARD_WEIGHTS),
            **self.states(index, *state_symbols(self.letters, "{}0", "{}_n", "{}_reset")),
            **self.all_states(index, *state_symbols(self.letters, "all_{}")),
            **x, **y, "x_copy": 0 if reserve is None or index else Relocation("reserve"),
        }  # fmt: skip

    def _layer_output(self, name: str, layer: int, offset: int = 0) -> Fields:
        """The fields of a layer's output in the workspace, where layers take turns with two buffers."""
        plan = self.plan
        begin = self.workspace.offsets["layer_outputs"] + layer % 2 * plan.layer_output_size + offset
        row = plan.layer_output_row
        return array_fields(name, Relocation("workspace", begin), plan.batch * row, row)


class _BackwardFields(_PlanFields):
    call_struct, layer_dir_struct = backward_emitter.CALL, backward_emitter.LAYER_DIR
    extended_struct = staticmethod(backward_emitter.layer_dir_struct)

    def symbols(self) -> list[str]:
        """The symbols of a backward call."""
        gradients = [entry.name for entry in self.spec.layout.by_layer_direction]
        return [*backward_symbols(self.letters), *super().symbols(), *gradients]

    @property
    def _gradients(self) -> dict[str, Kind]:
        """The gradients of parameters; those of vectors follow one another, and so do those of scalars."""
        vectors, scalars = self.spec.vector_kinds, self.spec.scalar_kinds
        return _GRADIENTS | {"d_param_vectors": [*vectors, ""][0], "d_param_scalars": [*scalars, ""][0]}

    def call(self) -> Fields:
        """The fields of a call."""
        fields, plan, reserve = super().call(), self.plan, self.reserve
        assert reserve is not None
        return {
            **fields, "block": plan.share.block, "recompute": int(plan.recomputes and not reserve.values_size),
            "add_states": Relocation("add_states"), "add_params": Relocation("add_params"),
            "x_gradient": Relocation("dx") if self.spec.num_directions > 1 else 0,
            "x_step": Relocation("dx_step"), "x_row": Relocation("dx_row"),
            "x_row_offsets": Relocation("row_offsets"), "x_add": Relocation("add_x"), "x_size": self.spec.input_size,
        }  # fmt: skip

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        spec, reserve = self.spec, self.reserve
        assert reserve is not None
        layer, direction = divmod(index, spec.num_directions)
        row = spec.input_size * self.item
        x = array_fields("x", Relocation("reserve"), reserve.batch * row, row)
        if layer:
            x = self.saved_output("x", layer - 1)
        return {
            **self.common(index, weights, _BACKWARD_WEIGHTS),
            **self.states(index, *state_symbols(self.letters, "d{}_n", "d{}0", "d{}_reset")),
            **self.all_states(index, *state_symbols(self.letters, "dall_{}")),
            **x, **self._dy(layer, direction), **self._dx(layer, direction),
            # The first direction adds the output gradients of both to the gradient of the input.
            "residual": int(spec.adds_input(layer) and direction == 0),
            **self.parameters(self._gradients, layer, direction),
        }  # fmt: skip

    def _dx_partial(self, name: str, layer: int, direction: int, offset: int = 0, symbol: str = "workspace") -> Fields:
        """The fields of a direction's part of the gradient of a layer's input."""
        fields, number = self.workspace.fields, layer % 2 * self.spec.num_directions + direction
        begin = self.workspace.offsets["dx_partials"] + number * fields["dx_partial_size"] + offset
        return array_fields(name, Relocation(symbol, begin), fields["dx_partial_step"], fields["dx_partial_row"])

    def _dy(self, layer: int, direction: int) -> Fields:
        """The fields of the gradient of a layer's output: one part from each direction of the layer above."""
        offset = direction * self.h_bytes
        if layer == self.spec.num_layers - 1:
            return {**caller_array_fields("dy", offset), "dy_second": 0}
        second = self._dx_partial("dy", layer + 1, 1, offset)["dy"] if self.spec.num_directions > 1 else 0
        return {**self._dx_partial("dy", layer + 1, 0, offset), "dy_second": second}

    def _dx(self, layer: int, direction: int) -> Fields:
        """The fields of the gradient of a layer's input."""
        if layer == 0 and self.spec.num_directions == 1:
            return {**caller_array_fields("dx"), "add_x": Relocation("add_x")}
        symbol = "workspace" if layer else "dx_partials"
        return {**self._dx_partial("dx", layer, direction, symbol=symbol), "add_x": 0}
