"""What machine code is told of a call: templates of its records, made once for a plan.

The names of what only the call knows: ``x``, ``y``, ``dy``, ``dx`` with ``_step`` and ``_row`` for their strides; the
states ``h0``, ``c0``, ``h_n``, ``c_n`` and their gradients ``dh_n`` and so on; ``dparams``; the requests, ``add_x`` and
the like; ``workspace``, ``reserve`` and ``weights`` for where these begin, ``parts`` for the workspace if the input's
gradient is wanted; the tables of :mod:`fusedrnn.engine.lengths`; and ``passes``, ``spins`` and ``seed``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.dropout import scale, threshold
from fusedrnn.engine import forward, gradient_pass
from fusedrnn.engine.backward_plan import BackwardPlan
from fusedrnn.engine.lengths import Tables
from fusedrnn.engine.pack import PackedPass
from fusedrnn.engine.plan import Plan
from fusedrnn.engine.reserve import ReserveLayout
from fusedrnn.engine.template import At, Template
from fusedrnn.gradients import Gradients
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Fields = dict[str, int | At]
_TABLES = ("order", "ranks", "falling", "alive", "totals", "lengths")
_PARAMETERS: Any = {
    "d_x_weights": "i2h_weight", "d_h_weights": "h2h_weight", "d_x_bias": "i2h_bias", "d_h_bias": "h2h_bias",
}  # fmt: skip


class Records:
    """A plan's records, to be filled in at each call."""

    def __init__(
        self, plan: Plan | BackwardPlan, passes: Template, call: Template, tables: Mapping[str, Array]
    ) -> None:
        self.plan = plan
        self._passes, self._call, self._tables = passes, call, tables

    def fill(self, values: dict[str, int], lengths: Array | None) -> tuple[Array, list[Any]]:
        """The record of a call, and what must live as long as it is used."""
        values.update({name: table.ctypes.data for name, table in self._tables.items()})
        tables = None if lengths is None else Tables.of(lengths, self.plan.row_starts, self.plan.steps)
        for name in _TABLES:
            values[name] = 0 if tables is None else getattr(tables, name).ctypes.data
        passes = self._passes.fill(values)
        values["passes"] = passes.ctypes.data
        return self._call.fill(values), [passes, tables]


def arrays(values: dict[str, int], named: Mapping[str, Array | None]) -> None:
    """Add where arrays are; 0 for those that are not there."""
    for name, array in named.items():
        values[name] = 0 if array is None else array.ctypes.data


def strided(values: dict[str, int], name: str, array: Array | None) -> None:
    """Add where an array (T, N, features) is, and how far apart its steps and rows are."""
    step, row = (0, 0) if array is None else array.strides[:2]
    values[name] = 0 if array is None else array.ctypes.data
    values[f"{name}_step"], values[f"{name}_row"] = step, row


def forward_records(
    spec: RNNSpec, plan: Plan, weights: Sequence[PackedPass], layout: ReserveLayout | None
) -> Records:
    """A forward plan's records; with a reserve's layout those of training."""
    tables = _shares(rows=plan.row_starts, units=plan.unit_starts)
    call: Fields = {
        **_shared(spec, plan, layout),
        "states": At("workspace", plan.states_at), "state_stride": plan.state_stride,
        "state_direction": plan.state_direction, "cell_at": plan.cell_at,
        "scratch": At("workspace", plan.scratch_at), "scratch_member": plan.scratch_member,
        "h_rows_at": plan.h_rows_at, "gates_at": plan.gates_at, "gates_stride": plan.gates_stride,
        "recurrent_at": plan.recurrent_at, "masked_at": plan.masked_at, "masked_row": plan.masked_row,
    }  # fmt: skip
    passes = [
        _forward_pass(spec, plan, weights[index], layout, index, layer, direction)
        for index, layer, direction in _each(spec)
    ]
    return Records(plan, Template(forward.PASS, passes), Template(forward.CALL, [call]), tables)


def backward_records(
    spec: RNNSpec, plan: BackwardPlan, weights: Sequence[PackedPass], layout: ReserveLayout
) -> Records:
    """A backward plan's records."""
    tables = _shares(rows=plan.row_starts, units=plan.unit_starts, shares=plan.weight_starts)
    places = dict(plan.layout)
    both = spec.num_directions > 1
    call: Fields = {
        **places, **_shared(spec, plan, layout),
        "block": plan.block, "weight_starts": At("shares"),
        **{name: At(name) for name in ("ranks", "totals", "falling", "add_states", "add_params", "weight_gradients")},
        "recompute": int(bool(places["kept_size"]) and not layout.kept_row),
        "team": At("workspace", places["team"]), "scratch": At("workspace", places["scratch"]),
        "x_gradient": At("dx") if both else 0, "x_step": At("dx_step"), "x_row": At("dx_row"),
        "x_add": At("add_x"), "x_size": spec.input_size,
        "part": _part(spec, plan, 0, 0), "part_step": plan.part_row * plan.batch,
        "part_row": plan.part_row, "part_size": plan.part_size,
    }  # fmt: skip
    passes = [
        _backward_pass(spec, plan, weights[index], layout, index, layer, direction)
        for index, layer, direction in _each(spec)
    ]
    return Records(plan, Template(gradient_pass.PASS, passes), Template(gradient_pass.CALL, [call]), tables)


def requests(values: dict[str, int], gradients: Gradients) -> None:
    """Add what is to become of the gradients."""
    values["add_x"], values["add_params"] = int(gradients.add_x), int(gradients.add_params)
    values["add_states"] = int(gradients.add_states)
    values["weight_gradients"] = int(gradients.params is not None)


def _each(spec: RNNSpec) -> Iterator[tuple[int, int, int]]:
    """The index of each pass, its layer and its direction."""
    for index in range(spec.num_layers * spec.num_directions):
        yield index, *divmod(index, spec.num_directions)


def _shares(**starts: Sequence[int]) -> dict[str, Array]:
    return {name: np.array(value, np.int64) for name, value in starts.items()}


def _shared(spec: RNNSpec, plan: Plan | BackwardPlan, layout: ReserveLayout | None) -> Fields:
    """The fields that both calls begin with."""
    drops = layout is not None and spec.drops
    bits = struct.unpack("q", struct.pack("d", float(np.dtype(spec.dtype).type(scale(spec.dropout)))))[0]
    return {
        "steps": plan.steps, "batch": plan.batch, "layers": spec.num_layers, "directions": spec.num_directions,
        "hidden": spec.hidden_size, "grid_directions": plan.grid[0], "grid_rows": plan.grid[1],
        "grid_units": plan.grid[2], "row_starts": At("rows"), "unit_starts": At("units"), "chunk": plan.chunk,
        **{name: At(name) for name in ("order", "alive", "lengths", "passes", "spins", "seed")},
        "barriers": At("workspace"),
        "record_step": layout.record_step if layout else 0, "record_row": layout.record_row if layout else 0,
        "kept_step": layout.kept_step if layout else 0, "kept_row": layout.kept_row if layout else 0,
        "threshold": threshold(spec.dropout) if drops else 0, "scale": bits,
    }  # fmt: skip


def _width(spec: RNNSpec) -> int:
    """Bytes of a row of hidden units."""
    return spec.hidden_size * np.dtype(spec.dtype).itemsize


def _states(plan: Plan | BackwardPlan, spec: RNNSpec, index: int, *names: str) -> Fields:
    """A pass's part of the caller's states."""
    return {name: At(name, index * plan.batch * _width(spec)) for name in names}


def _kept(spec: RNNSpec, layout: ReserveLayout, index: int, layer: int, direction: int) -> Fields:
    """Where the reserve has what a pass keeps."""
    offset = direction * _width(spec)
    return {
        "h_record": At("reserve", layout.record(layer, 0) + offset),
        "c_record": At("reserve", layout.record(layer, 1) + offset) if layout.states > 1 else 0,
        "kept": At("reserve", layout.kept(index)) if layout.kept_row else 0,
    }


def _from_below(spec: RNNSpec, layout: ReserveLayout, layer: int) -> Fields:
    """Where the reserve has what a layer above the first reads."""
    at = At("reserve", layout.record(layer - 1, 0))
    return {"x": at, "x_step": layout.record_step, "x_row": layout.record_row}


def _forward_pass(
    spec: RNNSpec,
    plan: Plan,
    weights: PackedPass,
    layout: ReserveLayout | None,
    index: int,
    layer: int,
    direction: int,
) -> Fields:
    last = layer == spec.num_layers - 1
    offset = direction * _width(spec)
    between = {"step": plan.between_row * plan.batch, "row": plan.between_row}
    source: Fields = {name: At(name) for name in ("x", "x_step", "x_row")}
    into: Fields = {"y": At("y", offset), "y_step": At("y_step"), "y_row": At("y_row")}
    if layout is not None:
        source = _from_below(spec, layout, layer) if layer else source
        into = into if last else {"y": 0, "y_step": 0, "y_row": 0}
        kept = {**_kept(spec, layout, index, layer, direction), "x_copy": 0 if layer or direction else At("reserve")}
    else:
        kept = dict.fromkeys(("x_copy", "h_record", "c_record", "kept"), 0)
        if layer:
            at = At("workspace", plan.between_at[(layer - 1) % 2])
            source = {"x": at, **{f"x_{name}": size for name, size in between.items()}}
        if not last:
            at = At("workspace", plan.between_at[layer % 2] + offset)
            into = {"y": at, **{f"y_{name}": size for name, size in between.items()}}
    return {
        **source, **into, **kept, "k": spec.layer_input_size(layer), "reverse": direction,
        **_states(plan, spec, index, "h0", "c0", "h_n", "c_n"),
        **{name: At("weights", getattr(weights, name)) for name in ("x_weights", "h_weights", "x_bias", "h_bias")},
    }  # fmt: skip


def _backward_pass(
    spec: RNNSpec,
    plan: BackwardPlan,
    weights: PackedPass,
    layout: ReserveLayout,
    index: int,
    layer: int,
    direction: int,
) -> Fields:
    item = np.dtype(spec.dtype).itemsize
    row = spec.input_size * item
    first: Fields = {"x": At("reserve"), "x_step": layout.batch * row, "x_row": row}
    parameters = {
        name: At("dparams", spec.layout.entry(layer, direction, kind).offset * item)
        for name, kind in _PARAMETERS.items()
    }
    packed = {
        "x_weights": weights.x_back, "h_weights": weights.h_back,
        "forward_x_weights": weights.x_weights, "forward_h_weights": weights.h_weights,
        "x_bias": weights.x_bias, "h_bias": weights.h_bias,
    }  # fmt: skip
    return {
        "reverse": direction, "k": spec.layer_input_size(layer),
        **(_from_below(spec, layout, layer) if layer else first),
        **_from_above(spec, plan, layer, direction), **_below(spec, plan, layer, direction),
        **{name: At("weights", offset) for name, offset in packed.items()},
        **_states(plan, spec, index, "dh_n", "dc_n", "dh0", "dc0"),
        **_kept(spec, layout, index, layer, direction), **parameters,
    }  # fmt: skip


def _part(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int, offset: int = 0) -> At:
    """What a direction of a layer makes of its input's gradient, where it is but a part of it."""
    place = layer % 2 * spec.num_directions + direction
    return At("workspace", plan.parts_at + place * plan.part_size + offset)


def _from_above(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int) -> Fields:
    """Where a pass finds the gradient of its output."""
    offset = direction * _width(spec)
    if layer == spec.num_layers - 1:
        return {"dy": At("dy", offset), "dy_too": 0, "dy_step": At("dy_step"), "dy_row": At("dy_row")}
    too = _part(spec, plan, layer + 1, 1, offset) if spec.num_directions > 1 else 0
    step = plan.part_row * plan.batch
    return {"dy": _part(spec, plan, layer + 1, 0, offset), "dy_too": too, "dy_step": step, "dy_row": plan.part_row}


def _below(spec: RNNSpec, plan: BackwardPlan, layer: int, direction: int) -> Fields:
    """Where a pass leaves the gradient of its input."""
    if layer == 0 and spec.num_directions == 1:
        return {"dx": At("dx"), "dx_step": At("dx_step"), "dx_row": At("dx_row"), "add_x": At("add_x")}
    part = _part(spec, plan, layer, direction)
    at = part if layer else At("parts", part.offset)
    return {"dx": at, "dx_step": plan.part_row * plan.batch, "dx_row": plan.part_row, "add_x": 0}
