"""The fields of the structs that kernels read, for a plan: of a call, and of each layer-direction."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from fusedrnn.dropout import scale, threshold
from fusedrnn.engines.cpu.kernels import backward_emitter, forward
from fusedrnn.engines.cpu.kernels.loop import UNPACKED_PARAMS
from fusedrnn.engines.cpu.launch.kernel_args import (
    Fields,
    KernelArgs,
    Relocation,
    backward_symbols,
    forward_symbols,
)
from fusedrnn.engines.cpu.plan.backward import BackwardPlan
from fusedrnn.engines.cpu.plan.forward import ForwardPlan
from fusedrnn.engines.cpu.plan.partition import Plan
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
    "d_peepholes": "peephole_weight", "d_x_bias": "i2h_bias", "d_h_bias": "h2h_bias",
}  # fmt: skip
# Fields of the kernels, and the names that the layout of packed weights has for them.
_FORWARD_WEIGHTS = {
    name: name for name in ("x_weights", "h_weights", "projection", "peepholes", "x_bias", "h_bias")
}  # fmt: skip
_BACKWARD_WEIGHTS = {
    "x_weights": "x_back", "h_weights": "h_back", "projection": "projection_back", "peepholes": "peepholes",
    "forward_x_weights": "x_weights", "forward_h_weights": "h_weights", "x_bias": "x_bias", "h_bias": "h_bias",
}  # fmt: skip


def forward_args(
    spec: RNNSpec, plan: ForwardPlan, weights: Sequence[PackedWeightsOffsets], reserve: ReserveLayout | None
) -> KernelArgs:
    """The arguments of a forward plan; with a reserve those of training."""
    fields = _ForwardFields(spec, plan, reserve)
    return fields.kernel_args(forward.CALL, forward.LAYER_DIR, weights, forward_symbols(spec))


def backward_args(
    spec: RNNSpec, plan: BackwardPlan, weights: Sequence[PackedWeightsOffsets], reserve: ReserveLayout
) -> KernelArgs:
    """The arguments of a backward plan."""
    fields = _BackwardFields(spec, plan, reserve)
    return fields.kernel_args(backward_emitter.CALL, backward_emitter.LAYER_DIR, weights, backward_symbols(spec))


def _array(name: str, begin: int | Relocation, step: int, row: int) -> Fields:
    """The fields of an array (T, N, features) of ours."""
    return {name: begin, f"{name}_step": step, f"{name}_row": row, f"{name}_row_offsets": 0}


def _caller_array(name: str, offset: int = 0) -> Fields:
    """The fields of an array of the caller's, from so many bytes behind its beginning on."""
    strides: Fields = {stride: Relocation(stride) for stride in (f"{name}_step", f"{name}_row")}
    return {name: Relocation(name, offset), **strides, f"{name}_row_offsets": Relocation("row_offsets")}


class _PlanFields:
    """The fields of a plan's structs that forward and backward have in common."""

    def __init__(self, spec: RNNSpec, plan: Plan, reserve: ReserveLayout | None) -> None:
        self.spec, self.reserve = spec, reserve
        self._plan, self.scratch = plan, plan.scratch
        self.item = np.dtype(spec.dtype).itemsize
        self.h_bytes, self.c_bytes = (spec.size_of(state) * self.item for state in ("h", "c"))

    def kernel_args(
        self, call: Struct, layer_dir: Struct, weights: Sequence[PackedWeightsOffsets], symbols: Sequence[str]
    ) -> KernelArgs:
        """Build the arguments: the struct of the call, then one for each layer-direction."""
        bounds = {name: np.array(bound, np.int64) for name, bound in self._plan.bounds.items()}
        pointers = {name: array.ctypes.data for name, array in bounds.items()}
        fields = {**self.call(), **pointers, "layer_dirs": Relocation("args", call.size)}
        # Made one at a time: all at once would take much memory.
        layer_dirs = ((layer_dir, self.layer_dir(index, offsets)) for index, offsets in enumerate(weights))
        num_fields = len(call.names) + len(weights) * len(layer_dir.names)
        return KernelArgs(self._plan, symbols, chain([(call, fields)], layer_dirs), num_fields, [*bounds.values()])

    def call(self) -> Fields:
        """The fields of a call."""
        spec, plan, reserve = self.spec, self._plan, self.reserve
        drops = reserve is not None and spec.drops
        factor = np.dtype(spec.dtype).type(scale(spec.dropout) if drops else 1)
        scale_bits = struct.unpack("q", struct.pack("d", float(factor)))[0]
        return {
            "steps": plan.steps, "batch": plan.batch, "layers": spec.num_layers, "directions": spec.num_directions,
            "hidden": spec.hidden_size, "out": spec.state_size, "chunk": plan.chunk,
            **dict(zip(("grid_layer_dirs", "grid_rows", "grid_units"), plan.grid, strict=True)),
            **{name: Relocation("tables", at) for name, at in table_offsets(plan.steps, plan.batch).items()},
            **{name: Relocation("workspace", at) for name, at in plan.scratch.offsets.items()}, **plan.scratch.fields,
            "saved_state_step": reserve.state_step if reserve else 0,
            "saved_state_row": reserve.state_row if reserve else 0,
            "saved_values_step": reserve.saved_step if reserve else 0,
            "saved_values_row": reserve.saved_row if reserve else 0,
            "threshold": threshold(spec.dropout) if drops else 0, "scale": scale_bits,
            "spins": Relocation("spins"), "seed": Relocation("seed"),
        }  # fmt: skip

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        raise NotImplementedError

    def common(self, index: int, weights: PackedWeightsOffsets, names: Mapping[str, str]) -> Fields:
        """Those of the fields of a layer-direction that are alike in forward and backward."""
        layer, direction = divmod(index, self.spec.num_directions)
        return {
            "k": self.spec.layer_input_size(layer), "reverse": int(self.spec.reverses(direction)),
            **{field: Relocation("weights", getattr(weights, name)) for field, name in names.items()},
            **self.parameters(_UNPACKED, layer, direction, "unpacked "),
        }  # fmt: skip

    def parameters(self, kinds: Mapping[str, Kind], layer: int, direction: int, prefix: str = "") -> Fields:
        """The fields of parameters or their gradients; 0 for those that the spec does not have."""
        layout = self.spec.layout
        return {
            field: Relocation(prefix + layout.entry(layer, direction, kind).name) if layout.has(kind) else 0
            for field, kind in kinds.items()
        }

    def states(self, index: int, *symbols: str) -> Fields:
        """The fields of the caller's states (L·D, N, size)."""
        offset = index * self._plan.batch
        return {
            symbol: Relocation(symbol, offset * (self.c_bytes if "c" in symbol else self.h_bytes)) for symbol in symbols
        }

    def saved(self, reserve: ReserveLayout, index: int) -> Fields:
        """The fields of what the reserve holds of a layer-direction."""
        layer, direction = divmod(index, self.spec.num_directions)
        num_states = len(self.spec.state_names)

        def state(number: int, row: int) -> Relocation:
            return Relocation("reserve", reserve.state_offset(layer, number) + direction * row)

        return {
            "saved_h": state(0, self.h_bytes),
            "saved_c": state(1, self.c_bytes) if num_states > 1 else 0,
            "saved_operand": state(num_states, self.c_bytes) if reserve.num_states > num_states else 0,
            "saved_values": Relocation("reserve", reserve.saved_offset(index)) if reserve.saved_row else 0,
        }

    def saved_input(self, reserve: ReserveLayout, layer: int) -> Fields:
        """The fields of the input of a layer above the first: h of the layer below."""
        below = Relocation("reserve", reserve.state_offset(layer - 1, 0))
        return _array("x", below, reserve.state_step, reserve.state_row)


class _ForwardFields(_PlanFields):
    def __init__(self, spec: RNNSpec, plan: ForwardPlan, reserve: ReserveLayout | None) -> None:
        super().__init__(spec, plan, reserve)
        self.plan = plan

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        layer, direction = divmod(index, self.spec.num_directions)
        is_first, is_last = layer == 0, layer == self.spec.num_layers - 1
        reserve, offset = self.reserve, direction * self.h_bytes
        if reserve is not None:
            saved = {**self.saved(reserve, index), "x_copy": Relocation("reserve") if index == 0 else 0}
            x = _caller_array("x") if is_first else self.saved_input(reserve, layer)
            y = _caller_array("y", offset) if is_last else _array("y", 0, 0, 0)
        else:
            saved = dict.fromkeys(("x_copy", "saved_h", "saved_c", "saved_operand", "saved_values"), 0)
            x = _caller_array("x") if is_first else self._layer_output("x", layer - 1)
            y = _caller_array("y", offset) if is_last else self._layer_output("y", layer, offset)
        return {
            **self.common(index, weights, _FORWARD_WEIGHTS), **self.states(index, "h0", "c0", "h_n", "c_n"),
            **x, **y, **saved,
        }  # fmt: skip

    def _layer_output(self, name: str, layer: int, offset: int = 0) -> Fields:
        """The fields of a layer's output in the workspace, where layers take turns with two buffers."""
        plan = self.plan
        begin = self.scratch.offsets["layer_outputs"] + layer % 2 * plan.layer_output_size + offset
        return _array(name, Relocation("workspace", begin), plan.batch * plan.layer_output_row, plan.layer_output_row)


class _BackwardFields(_PlanFields):
    def __init__(self, spec: RNNSpec, plan: BackwardPlan, reserve: ReserveLayout) -> None:
        super().__init__(spec, plan, reserve)
        self.plan, self.saved_layout = plan, reserve

    def call(self) -> Fields:
        """The fields of a call."""
        dx = {f"x_{name}": Relocation(f"dx_{name}") for name in ("step", "row")}
        return {
            **super().call(), "block": self.plan.block,
            "recompute": int(self.plan.recomputes and not self.saved_layout.saved_row),
            "add_states": Relocation("add_states"), "add_params": Relocation("add_params"),
            "x_gradient": Relocation("dx") if self.spec.num_directions > 1 else 0, **dx,
            "x_row_offsets": Relocation("row_offsets"), "x_add": Relocation("add_x"), "x_size": self.spec.input_size,
        }  # fmt: skip

    def layer_dir(self, index: int, weights: PackedWeightsOffsets) -> Fields:
        """The fields of a layer-direction."""
        spec, reserve = self.spec, self.saved_layout
        layer, direction = divmod(index, spec.num_directions)
        row = spec.input_size * self.item
        x = self.saved_input(reserve, layer) if layer else _array("x", Relocation("reserve"), reserve.batch * row, row)
        return {
            **self.common(index, weights, _BACKWARD_WEIGHTS), **self.states(index, "dh_n", "dc_n", "dh0", "dc0"),
            **x, **self._dy(layer, direction), **self._dx(layer, direction), **self.saved(reserve, index),
            **self.parameters(_GRADIENTS, layer, direction),
        }  # fmt: skip

    def _dx_partial(self, layer: int, direction: int, offset: int = 0) -> int:
        """The offset in the workspace of a direction's part of the gradient of a layer's input."""
        number = layer % 2 * self.spec.num_directions + direction
        return self.scratch.offsets["dx_partials"] + number * self.scratch.fields["dx_partial_size"] + offset

    def _partial_array(self, name: str, begin: Relocation) -> Fields:
        return _array(name, begin, *(self.scratch.fields[f"dx_partial_{stride}"] for stride in ("step", "row")))

    def _dy(self, layer: int, direction: int) -> Fields:
        """The fields of the gradient of a layer's output: the parts that both directions of the layer above made."""
        offset = direction * self.h_bytes
        if layer == self.spec.num_layers - 1:
            return {**_caller_array("dy", offset), "dy_second": 0}
        first, second = (Relocation("workspace", self._dx_partial(layer + 1, each, offset)) for each in (0, 1))
        return {**self._partial_array("dy", first), "dy_second": second if self.spec.num_directions > 1 else 0}

    def _dx(self, layer: int, direction: int) -> Fields:
        """The fields of the gradient of a layer's input."""
        if layer == 0 and self.spec.num_directions == 1:
            return {**_caller_array("dx"), "add_x": Relocation("add_x")}
        symbol = "workspace" if layer else "dx_partials"
        return {**self._partial_array("dx", Relocation(symbol, self._dx_partial(layer, direction))), "add_x": 0}
