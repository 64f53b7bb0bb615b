"""A call's arguments as the records of integers that machine code reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen.build import Record
from fusedrnn.codegen.sync import BARRIER_BYTES
from fusedrnn.dropout import scale, threshold
from fusedrnn.engine import forward, gradient_pass
from fusedrnn.engine.backward_plan import BackwardPlan
from fusedrnn.engine.lengths import Tables
from fusedrnn.engine.pack import Packed
from fusedrnn.engine.plan import Plan
from fusedrnn.engine.reserve import Kept
from fusedrnn.gradients import Gradients
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


def barrier_bytes(plan: BackwardPlan) -> int:
    """What of backward's workspace must be zero at its start."""
    return plan.barriers * BARRIER_BYTES


def _table(*values: Sequence[int]) -> list[Array]:
    return [np.array(value, np.int64) for value in values]


def _call(record: Record, fields: dict[str, int]) -> Array:
    return np.array([fields[name] for name in record.names], np.int64)


def _dropout(spec: RNNSpec, seed: int) -> dict[str, int]:
    """Dropout's fields; no threshold if nothing is dropped."""
    drops = spec.dropout > 0 and spec.num_layers > 1
    bits = struct.unpack("q", struct.pack("d", float(np.dtype(spec.dtype).type(scale(spec.dropout)))))[0]
    signed = struct.unpack("q", struct.pack("Q", seed))[0]
    return {"threshold": threshold(spec.dropout) if drops else 0, "scale": bits, "seed": signed}


def _address(arrays: Sequence[Array | None] | None, place: int, offset: int) -> int:
    """Where a pass's part of a state begins; 0 if there is none."""
    if arrays is None or place >= len(arrays):
        return 0
    array = arrays[place]
    return 0 if array is None else array.ctypes.data + offset


def forward_passes(
    spec: RNNSpec,
    plan: Plan,
    base: int,
    x: Array,
    packed: Packed,
    states: Sequence[Array] | None,
    final: Sequence[Array],
    y: Array,
    kept: Kept | None,
) -> Array:
    """A record for each layer and direction of a forward call."""
    width = spec.hidden_size * x.itemsize
    rows = []
    source = (x.ctypes.data, x.strides[0], x.strides[1], spec.input_size)
    for layer in range(spec.num_layers):
        into, below = _outputs(spec, plan, base, y, kept, layer)
        for direction in range(spec.num_directions):
            index = layer * spec.num_directions + direction
            weights = packed.passes[index]
            offset = index * plan.batch * width
            fields = {
                **dict(zip(("x", "x_step", "x_row", "k"), source, strict=True)),
                "y": into[0] and into[0] + direction * width, "y_step": into[1], "y_row": into[2],
                "reverse": direction,
                "x_weights": weights.x_weights, "h_weights": weights.h_weights,
                "x_bias": weights.x_bias, "h_bias": weights.h_bias,
                "h0": _address(states, 0, offset), "c0": _address(states, 1, offset),
                "h_n": _address(final, 0, offset), "c_n": _address(final, 1, offset),
                "x_copy": 0, "h_record": 0, "c_record": 0, "kept": 0,
            }  # fmt: skip
            if kept is not None:
                fields.update(_kept_fields(kept, layer, direction, index, width))
            rows.append([fields[name] for name in forward.PASS.names])
        source = (*below, spec.output_size)
    return np.array(rows, np.int64)


def _outputs(
    spec: RNNSpec, plan: Plan, base: int, y: Array, kept: Kept | None, layer: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Where a layer writes its output besides the reserve, and where the next one reads it: address and strides."""
    if layer == spec.num_layers - 1:
        own = (y.ctypes.data, y.strides[0], y.strides[1])
    elif kept is None:
        own = (base + plan.between_at[layer % 2], plan.between_row * plan.batch, plan.between_row)
    else:
        own = (0, 0, 0)
    if kept is None:
        return own, own
    layout = kept.layout
    return own, (kept.lease.address + layout.record(layer, 0), layout.record_step, layout.record_row)


def _kept_fields(kept: Kept, layer: int, direction: int, index: int, width: int) -> dict[str, int]:
    """What forward and backward need of a reserve for a pass."""
    layout, start = kept.layout, kept.lease.address
    return {
        "x_copy": start if layer == 0 and direction == 0 else 0,
        "h_record": start + layout.record(layer, 0) + direction * width,
        "c_record": start + layout.record(layer, 1) + direction * width if layout.states > 1 else 0,
        "kept": start + layout.kept(index) if layout.kept_row else 0,
    }


def forward_call(
    spec: RNNSpec, plan: Plan, base: int, spins: int, passes: Array, lengths: Array | None, kept: Kept | None
) -> tuple[Array, list[Array]]:
    """The record of a forward call, and the arrays that it points to."""
    rows, units = _table(plan.row_starts, plan.unit_starts)
    tables = None if lengths is None else Tables.of(lengths, plan.row_starts, plan.steps)
    fields = {
        **_shared(spec, plan, base, spins, passes, rows, units, tables, kept),
        "chunk": plan.chunk,
        "states": base + plan.states_at, "state_stride": plan.state_stride,
        "state_direction": plan.state_direction, "cell_at": plan.cell_at,
        "scratch": base + plan.scratch_at, "scratch_member": plan.scratch_member,
        "h_rows_at": plan.h_rows_at, "gates_at": plan.gates_at, "gates_stride": plan.gates_stride,
        "recurrent_at": plan.recurrent_at, "masked_at": plan.masked_at, "masked_row": plan.masked_row,
    }  # fmt: skip
    arrays = [passes, rows, units]
    if tables is not None:
        arrays += [tables.order, tables.alive, tables.lengths]
    return _call(forward.CALL, fields), arrays


def _shared(
    spec: RNNSpec,
    plan: Plan | BackwardPlan,
    base: int,
    spins: int,
    passes: Array,
    rows: Array,
    units: Array,
    tables: Tables | None,
    kept: Kept | None,
) -> dict[str, int]:
    """The fields that both calls begin with."""
    layout = None if kept is None else kept.layout
    return {
        "steps": plan.steps, "batch": plan.batch, "layers": spec.num_layers, "directions": spec.num_directions,
        "hidden": spec.hidden_size, "grid_directions": plan.grid[0], "grid_rows": plan.grid[1],
        "grid_units": plan.grid[2], "row_starts": rows.ctypes.data, "unit_starts": units.ctypes.data,
        "chunk": plan.chunk,
        "order": tables.order.ctypes.data if tables else 0, "alive": tables.alive.ctypes.data if tables else 0,
        "lengths": tables.lengths.ctypes.data if tables else 0,
        "passes": passes.ctypes.data, "barriers": base, "spins": spins,
        "record_step": layout.record_step if layout else 0, "record_row": layout.record_row if layout else 0,
        "kept_step": layout.kept_step if layout else 0, "kept_row": layout.kept_row if layout else 0,
        **_dropout(spec, 0 if kept is None else kept.seed),
    }  # fmt: skip


def backward_passes(
    spec: RNNSpec,
    plan: BackwardPlan,
    base: int,
    kept: Kept,
    dy: Array | None,
    dstates: Sequence[Array | None],
    gradients: Gradients,
) -> Array:
    """A record for each layer and direction of a backward call."""
    item = np.dtype(spec.dtype).itemsize
    width = spec.hidden_size * item
    rows = []
    for layer in range(spec.num_layers):
        for direction in range(spec.num_directions):
            index = layer * spec.num_directions + direction
            offset = index * plan.batch * width
            weights = kept.packed.passes[index]
            fields = {
                "reverse": direction, "k": spec.layer_input_size(layer),
                **_layer_input(spec, kept, layer),
                **_from_above(spec, plan, base, dy, layer, direction * width),
                **_below(spec, plan, base, gradients, layer, direction),
                "x_weights": weights.x_back, "h_weights": weights.h_back,
                "forward_x_weights": weights.x_weights, "forward_h_weights": weights.h_weights,
                "x_bias": weights.x_bias, "h_bias": weights.h_bias,
                "dh_n": _address(dstates, 0, offset), "dc_n": _address(dstates, 1, offset),
                "dh0": _address(gradients.states, 0, offset), "dc0": _address(gradients.states, 1, offset),
                **_kept_fields(kept, layer, direction, index, width),
            }  # fmt: skip
            for name, kind in _PARAMETERS:
                entry = spec.layout.entry(layer, direction, kind)
                at = gradients.params
                fields[name] = 0 if at is None else at.ctypes.data + entry.offset * item
            rows.append([fields[name] for name in gradient_pass.PASS.names])
    return np.array(rows, np.int64)


_PARAMETERS: Any = (
    ("d_x_weights", "i2h_weight"), ("d_h_weights", "h2h_weight"), ("d_x_bias", "i2h_bias"), ("d_h_bias", "h2h_bias"),
)  # fmt: skip


def _layer_input(spec: RNNSpec, kept: Kept, layer: int) -> dict[str, int]:
    """Where a layer's input is in the reserve."""
    layout, start = kept.layout, kept.lease.address
    if layer:
        return {"x": start + layout.record(layer - 1, 0), "x_step": layout.record_step, "x_row": layout.record_row}
    row = spec.input_size * np.dtype(spec.dtype).itemsize
    return {"x": start, "x_step": layout.batch * row, "x_row": row}


def _part(spec: RNNSpec, plan: BackwardPlan, base: int, layer: int, direction: int) -> int:
    """What a direction of a layer makes of its input's gradient, where it is but a part of it."""
    return base + plan.parts_at + (layer % 2 * spec.num_directions + direction) * plan.part_size


def _from_above(
    spec: RNNSpec, plan: BackwardPlan, base: int, dy: Array | None, layer: int, offset: int
) -> dict[str, int]:
    """Where a pass finds the gradient of its output."""
    if layer < spec.num_layers - 1:
        parts = [_part(spec, plan, base, layer + 1, direction) + offset for direction in range(spec.num_directions)]
        step = plan.part_row * plan.batch
        return {"dy": parts[0], "dy_too": (*parts, 0)[1], "dy_step": step, "dy_row": plan.part_row}
    if dy is None:
        return {"dy": 0, "dy_too": 0, "dy_step": 0, "dy_row": 0}
    return {"dy": dy.ctypes.data + offset, "dy_too": 0, "dy_step": dy.strides[0], "dy_row": dy.strides[1]}


def _below(
    spec: RNNSpec, plan: BackwardPlan, base: int, gradients: Gradients, layer: int, direction: int
) -> dict[str, int]:
    """Where a pass leaves the gradient of its input."""
    if layer == 0 and gradients.x is None:
        return {"dx": 0, "dx_step": 0, "dx_row": 0, "add_x": 0}
    if layer == 0 and spec.num_directions == 1:
        dx = gradients.x
        assert dx is not None
        return {"dx": dx.ctypes.data, "dx_step": dx.strides[0], "dx_row": dx.strides[1], "add_x": int(gradients.add_x)}
    part = _part(spec, plan, base, layer, direction)
    return {"dx": part, "dx_step": plan.part_row * plan.batch, "dx_row": plan.part_row, "add_x": 0}


def backward_call(
    spec: RNNSpec, plan: BackwardPlan, base: int, spins: int, passes: Array, kept: Kept, gradients: Gradients
) -> tuple[Array, list[Array]]:
    """The record of a backward call, and the arrays that it points to."""
    rows, units, shares = _table(plan.row_starts, plan.unit_starts, plan.weight_starts)
    tables = None if kept.lengths is None else Tables.of(kept.lengths, plan.row_starts, plan.steps)
    layout = dict(plan.layout)
    dx = gradients.x if spec.num_directions > 1 else None
    fields = {
        **layout,
        **_shared(spec, plan, base, spins, passes, rows, units, tables, kept),
        "block": plan.block, "weight_starts": shares.ctypes.data,
        "ranks": tables.ranks.ctypes.data if tables else 0, "totals": tables.totals.ctypes.data if tables else 0,
        "falling": tables.falling.ctypes.data if tables else 0,
        "add_states": int(gradients.add_states), "add_params": int(gradients.add_params),
        "recompute": int(bool(layout["kept_size"]) and not kept.layout.kept_row),
        "weight_gradients": int(gradients.params is not None),
        "team": base + layout["team"], "scratch": base + layout["scratch"],
        "x_gradient": 0 if dx is None else dx.ctypes.data,
        "x_step": 0 if dx is None else dx.strides[0], "x_row": 0 if dx is None else dx.strides[1],
        "x_add": int(gradients.add_x), "x_size": spec.input_size,
        "part": _part(spec, plan, base, 0, 0), "part_step": plan.part_row * plan.batch,
        "part_row": plan.part_row, "part_size": plan.part_size,
    }  # fmt: skip
    arrays = [passes, rows, units, shares]
    if tables is not None:
        arrays += [tables.order, tables.ranks, tables.falling, tables.alive, tables.totals, tables.lengths]
    return _call(gradient_pass.CALL, fields), arrays
