"""What machine code is told of a call: its records, made once for a plan, filled in at each call.

The names of what only the call knows: ``x``, ``y``, ``dy``, ``dx`` with ``_step`` and ``_row`` for their strides; the
states ``h0``, ``c0``, ``h_n``, ``c_n`` and their gradients ``dh_n`` and so on; the requests, ``add_x`` and the like;
``workspace``, ``reserve`` and ``weights`` for where these begin (weights are 0 if they come as they lie), ``parts`` for
the workspace if the input's gradient is wanted; ``tables`` for those of :mod:`fusedrnn.engines.cpu.varlen`, ``firsts``
for the first row of each time of a packed sequence; ``records``, ``spins`` and ``seed``. The gradient of each parameter
goes by the parameter's name, a parameter that comes as it lies by "unpacked" and its name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.dropout import scale, threshold
from fusedrnn.engines.cpu.kernels import backward_emitter as gradient_pass
from fusedrnn.engines.cpu.kernels import forward
from fusedrnn.engines.cpu.kernels.loop import UNPACKED_PARAMS
from fusedrnn.engines.cpu.kernels.tiling import round_up_to_cache_line
from fusedrnn.engines.cpu.launch.template import At, Template
from fusedrnn.engines.cpu.plan.backward import BackwardPlan
from fusedrnn.engines.cpu.plan.forward import ForwardPlan
from fusedrnn.engines.cpu.plan.partition import Plan
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.varlen import table_offsets
from fusedrnn.engines.cpu.weights.layout import PackedWeightsOffsets
from fusedrnn.jit.struct import Struct
from fusedrnn.layout import Kind
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Fields = dict[str, int | At]
FORWARD = (
    "x", "x_step", "x_row", "y", "y_step", "y_row", "h0", "c0", "h_n", "c_n", "weights", "reserve",
    "row_offsets", "seed", "tables", "spins",
)  # fmt: skip
BACKWARD = (
    "dy", "dy_step", "dy_row", "dx", "dx_step", "dx_row", "dh_n", "dc_n", "dh0", "dc0", "weights", "reserve",
    "row_offsets", "seed", "add_x", "add_params", "add_states", "tables", "spins",
)  # fmt: skip
_GRADIENTS: dict[str, Kind] = {
    "d_x_weights": "i2h_weight", "d_h_weights": "h2h_weight", "d_projection": "h2r_weight",
    "d_peepholes": "peephole_weight", "d_x_bias": "i2h_bias", "d_h_bias": "h2h_bias",
}  # fmt: skip
_MATRICES: dict[str, Kind] = dict(
    zip(UNPACKED_PARAMS, ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"), strict=True)
)
_PACKED = "x_weights", "h_weights", "projection", "peepholes", "x_bias", "h_bias"
SPARE = "params", "dparams", "nothing"
"""Values that no record refers to: bases of parameters as they lie and of their gradients, and one to be ignored."""
OBJECTS = 9
"""Arrays that a call may be given."""


class KernelArgs:
    """A plan's records, to be filled in at each call at the head of its workspace.

    Args:
        plan: What is planned.
        names: What the call will say, in this order.
        call: The record of the call.
        passes: Those of the passes.
        fields: How many fields all records have.
        constants: Arrays that the records refer to.

    Attributes:
        plan: The same.
        num_threads: Threads at work.
        place: The number of each value, of the spare ones too.
        objects_at: Where the workspace has room for the extents of a call's arrays.
        records_at: Where the records go.
        plan_at: Where the plan's own begins.
        template: What the records are filled in from.
        size: Bytes of a workspace.
    """

    def __init__(
        self,
        plan: Plan,
        names: Sequence[str],
        call: tuple[Struct, Fields],
        passes: Iterable[tuple[Struct, Fields]],
        fields: int,
        constants: Sequence[Array],
    ) -> None:
        self.plan, self.num_threads, self._constants = plan, plan.num_threads, constants
        known = (*names, "workspace", "records", "dx_partials")
        self.place = {name: number for number, name in enumerate((*known, *SPARE))}
        self._values = struct.Struct(f"{len(known)}q")
        self.objects_at = 8 * len(self.place)
        self.records_at = round_up_to_cache_line(self.objects_at + 16 * OBJECTS)
        head = self.records_at + 8 * fields
        # The barriers, where the workspace of the plan begins, are zero at the start of each call.
        zeros = (round_up_to_cache_line(head) - head + plan.scratch.zeroed) // 8
        # One row after the other: all of them at once would take much memory.
        self.template = Template(known, chain([call], passes), fields + zeros)
        self.plan_at = round_up_to_cache_line(head)
        self.size = self.plan_at + plan.size

    def bind(self, scratch: Scratch, values: Sequence[int], parts: bool = False) -> int:
        """Write the records into the scratch; where the call's begins."""
        records, workspace = scratch.address + self.records_at, scratch.address + self.plan_at
        self._values.pack_into(scratch.buffer.data, 0, *values, workspace, records, workspace if parts else 0)
        self.template.fill(scratch.address, records)
        return records


def signed(seed: int) -> int:
    """A seed of 64 bits as a signed integer of as many."""
    return seed if seed < 1 << 63 else seed - (1 << 64)


def forward_args(
    spec: RNNSpec, plan: ForwardPlan, weights: Sequence[PackedWeightsOffsets], layout: ReserveLayout | None
) -> KernelArgs:
    """A forward plan's records; with a reserve's layout those of training."""
    bounds = _bounds(plan)
    call: Fields = {**_shared(spec, plan, layout, len(forward.CALL.names)), **_addresses(bounds)}
    passes = (
        (forward.LAYER_DIR, _forward_pass(spec, plan, weights[index], layout, index, layer, direction))
        for index, layer, direction in _each(spec)
    )
    fields = len(forward.CALL.names) + len(weights) * len(forward.LAYER_DIR.names)
    names = (*FORWARD, *_matrix_names(spec))
    return KernelArgs(plan, names, (forward.CALL, call), passes, fields, [*bounds.values()])


def backward_args(
    spec: RNNSpec, plan: BackwardPlan, weights: Sequence[PackedWeightsOffsets], layout: ReserveLayout
) -> KernelArgs:
    """A backward plan's records."""
    bounds = _bounds(plan)
    both = spec.num_directions > 1
    call: Fields = {
        **_shared(spec, plan, layout, len(gradient_pass.CALL.names)), **_addresses(bounds),
        "block": plan.block, "add_states": At("add_states"), "add_params": At("add_params"),
        "recompute": int(plan.recomputes and not layout.saved_row),
        "x_gradient": At("dx") if both else 0, "x_step": At("dx_step"), "x_row": At("dx_row"),
        "x_row_offsets": At("row_offsets"), "x_add": At("add_x"), "x_size": spec.input_size,
    }  # fmt: skip
    passes = (
        (gradient_pass.LAYER_DIR, _backward_pass(spec, plan, weights[index], layout, index, layer, direction))
        for index, layer, direction in _each(spec)
    )
    fields = len(gradient_pass.CALL.names) + len(weights) * len(gradient_pass.LAYER_DIR.names)
    names = (*BACKWARD, *_matrix_names(spec), *(entry.name for entry in spec.layout.by_layer_direction))
    return KernelArgs(plan, names, (gradient_pass.CALL, call), passes, fields, [*bounds.values()])


def _bounds(plan: Plan) -> dict[str, Array]:
    """Who has which rows and units."""
    return {name: np.array(bounds, np.int64) for name, bounds in plan.bounds.items()}


def _addresses(arrays: Mapping[str, Array]) -> Fields:
    return {name: array.ctypes.data for name, array in arrays.items()}


def _matrix_names(spec: RNNSpec) -> list[str]:
    """What the call says of the parameters as they lie."""
    return [f"unpacked {entry.name}" for entry in spec.layout.by_layer_direction]


def _matrices(spec: RNNSpec, layer: int, direction: int) -> Fields:
    """Those of a pass."""
    return {field: _parameter(spec, layer, direction, kind, "unpacked ") for field, kind in _MATRICES.items()}


def _parameter(spec: RNNSpec, layer: int, direction: int, kind: Kind, prefix: str = "") -> int | At:
    """What the call says of a parameter; 0 if there is none of that kind."""
    return At(prefix + spec.layout.entry(layer, direction, kind).name) if spec.layout.has(kind) else 0


def _each(spec: RNNSpec) -> Iterator[tuple[int, int, int]]:
    """The index of each pass, its layer and its direction."""
    for index in range(spec.num_layers * spec.num_directions):
        yield index, *divmod(index, spec.num_directions)


def _shared(spec: RNNSpec, plan: Plan, layout: ReserveLayout | None, fields: int) -> Fields:
    """What both calls' records, of so many fields, begin with."""
    drops = layout is not None and spec.drops
    bits = struct.unpack("q", struct.pack("d", float(np.dtype(spec.dtype).type(scale(spec.dropout)))))[0]
    tables = table_offsets(plan.steps, plan.batch)
    return {
        "steps": plan.steps, "batch": plan.batch, "layers": spec.num_layers, "directions": spec.num_directions,
        "hidden": spec.hidden_size, "out": spec.state_size, "grid_layer_dirs": plan.grid[0], "grid_rows": plan.grid[1],
        "grid_units": plan.grid[2], "chunk": plan.chunk,
        **{name: At("tables", offset) for name, offset in tables.items()},
        **plan.scratch.fields,
        **{name: At("workspace", offset) for name, offset in plan.scratch.offsets.items()},
        "layer_dirs": At("records", 8 * fields), "spins": At("spins"), "seed": At("seed"),
        "saved_state_step": layout.state_step if layout else 0, "saved_state_row": layout.state_row if layout else 0,
        "saved_values_step": layout.saved_step if layout else 0, "saved_values_row": layout.saved_row if layout else 0,
        "threshold": threshold(spec.dropout) if drops else 0, "scale": bits,
    }  # fmt: skip


def _width(spec: RNNSpec, state: str = "h") -> int:
    """Bytes of a row of a state in one direction."""
    return spec.size_of(state) * np.dtype(spec.dtype).itemsize


def _states(plan: Plan, spec: RNNSpec, index: int, *names: str) -> Fields:
    """A pass's part of the caller's states."""
    return {name: At(name, index * plan.batch * _width(spec, "c" if "c" in name else "h")) for name in names}


def _kept(spec: RNNSpec, layout: ReserveLayout, index: int, layer: int, direction: int) -> Fields:
    """Where the reserve has what a pass keeps."""
    of_h, of_c = (direction * _width(spec, name) for name in ("h", "c"))
    states = len(spec.state_names)
    staged = layout.num_states > states
    return {
        "saved_h": At("reserve", layout.state_offset(layer, 0) + of_h),
        "saved_c": At("reserve", layout.state_offset(layer, 1) + of_c) if states > 1 else 0,
        "saved_operand": At("reserve", layout.state_offset(layer, states) + of_c) if staged else 0,
        "saved_values": At("reserve", layout.saved_offset(index)) if layout.saved_row else 0,
    }


def _from_below(spec: RNNSpec, layout: ReserveLayout, layer: int) -> Fields:
    """Where the reserve has what a layer above the first reads."""
    at = At("reserve", layout.state_offset(layer - 1, 0))
    return {"x": at, "x_step": layout.state_step, "x_row": layout.state_row}


def _forward_pass(
    spec: RNNSpec,
    plan: ForwardPlan,
    weights: PackedWeightsOffsets,
    layout: ReserveLayout | None,
    index: int,
    layer: int,
    direction: int,
) -> Fields:
    last = layer == spec.num_layers - 1
    offset = direction * _width(spec)
    row, outputs = plan.layer_output_row, plan.scratch.offsets["layer_outputs"]
    between = {"step": row * plan.batch, "row": row}
    source: Fields = {**{name: At(name) for name in ("x", "x_step", "x_row")}, "x_row_offsets": At("row_offsets")}
    into: Fields = {
        "y": At("y", offset), "y_step": At("y_step"), "y_row": At("y_row"), "y_row_offsets": At("row_offsets"),
    }  # fmt: skip
    if layout is not None:
        source = {**_from_below(spec, layout, layer), "x_row_offsets": 0} if layer else source
        into = into if last else dict.fromkeys(("y", "y_step", "y_row", "y_row_offsets"), 0)
        kept = {**_kept(spec, layout, index, layer, direction), "x_copy": 0 if layer or direction else At("reserve")}
    else:
        kept = dict.fromkeys(("x_copy", "saved_h", "saved_c", "saved_operand", "saved_values"), 0)
        if layer:
            at = At("workspace", outputs + (layer - 1) % 2 * plan.layer_output_size)
            source = {"x": at, **{f"x_{name}": size for name, size in between.items()}, "x_row_offsets": 0}
        if not last:
            at = At("workspace", outputs + layer % 2 * plan.layer_output_size + offset)
            into = {"y": at, **{f"y_{name}": size for name, size in between.items()}, "y_row_offsets": 0}
    return {
        **source, **into, **kept, "k": spec.layer_input_size(layer), "reverse": int(spec.reverses(direction)),
        **_states(plan, spec, index, "h0", "c0", "h_n", "c_n"), **_matrices(spec, layer, direction),
        **{name: At("weights", getattr(weights, name)) for name in _PACKED},
    }  # fmt: skip


def _backward_pass(
    spec: RNNSpec,
    plan: BackwardPlan,
    weights: PackedWeightsOffsets,
    layout: ReserveLayout,
    index: int,
    layer: int,
    direction: int,
) -> Fields:
    row = spec.input_size * np.dtype(spec.dtype).itemsize
    first: Fields = {"x": At("reserve"), "x_step": layout.batch * row, "x_row": row}
    parameters = {field: _parameter(spec, layer, direction, kind) for field, kind in _GRADIENTS.items()}
    packed = {
        "x_weights": weights.x_back, "h_weights": weights.h_back,
        "projection": weights.projection_back, "peepholes": weights.peepholes,
        "forward_x_weights": weights.x_weights, "forward_h_weights": weights.h_weights,
        "x_bias": weights.x_bias, "h_bias": weights.h_bias,
    }  # fmt: skip
    return {
        "reverse": int(spec.reverses(direction)), "k": spec.layer_input_size(layer),
        **(_from_below(spec, layout, layer) if layer else first),
        **_from_above(spec, plan, layer, direction), **_below(spec, plan, layer, direction),
        **{name: At("weights", offset) for name, offset in packed.items()},
        **_states(plan, spec, index, "dh_n", "dc_n", "dh0", "dc0"), **_matrices(spec, layer, direction),
        **_kept(spec, layout, index, layer, direction), **parameters,
    }  # fmt: skip


def _part(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int, offset: int = 0) -> At:
    """What a direction of a layer makes of its input's gradient, where it is but a part of it."""
    place = layer % 2 * spec.num_directions + direction
    partials = plan.scratch.offsets["dx_partials"]
    return At("workspace", partials + place * plan.scratch.fields["dx_partial_size"] + offset)


def _from_above(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int) -> Fields:
    """Where a pass finds the gradient of its output."""
    offset = direction * _width(spec)
    if layer == spec.num_layers - 1:
        last: Fields = {"dy_step": At("dy_step"), "dy_row": At("dy_row"), "dy_row_offsets": At("row_offsets")}
        return {"dy": At("dy", offset), "dy_too": 0, **last}
    too = _part(spec, plan, layer + 1, 1, offset) if spec.num_directions > 1 else 0
    step, row = (plan.scratch.fields[f"dx_partial_{name}"] for name in ("step", "row"))
    strides: Fields = {"dy_step": step, "dy_row": row, "dy_row_offsets": 0}
    return {"dy": _part(spec, plan, layer + 1, 0, offset), "dy_too": too, **strides}


def _below(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int) -> Fields:
    """Where a pass leaves the gradient of its input."""
    if layer == 0 and spec.num_directions == 1:
        strides = {"dx_step": At("dx_step"), "dx_row": At("dx_row"), "dx_row_offsets": At("row_offsets")}
        return {"dx": At("dx"), **strides, "add_x": At("add_x")}
    part = _part(spec, plan, layer, direction)
    at = part if layer else At("dx_partials", part.offset)
    step, row = (plan.scratch.fields[f"dx_partial_{name}"] for name in ("step", "row"))
    return {"dx": at, "dx_step": step, "dx_row": row, "dx_row_offsets": 0, "add_x": 0}
