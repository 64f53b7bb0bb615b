"""The layout of packed weights, and the tasks that pack them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.scratch import round_up_to_cache_line
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.weights.pack_kernel import PACK, PACK_SUM, PACK_TRANSPOSED, PACK_ZEROS, PackTask
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


class PackedWeightsOffsets(NamedTuple):
    """The offsets of the packed weights and biases of a layer-direction; the last three are for backward.

    Of a cell of several stages, each matrix has the columns of the first stage's gates, then those of the next one's.
    Each stage begins with a new panel; in ``x_back``, the rows of all gates follow one another in every panel.
    """

    x_weights: int
    h_weights: int
    projection: int
    peepholes: int
    x_bias: int
    h_bias: int
    x_back: int
    h_back: int
    projection_back: int


class PackedLayout(NamedTuple):
    """The layout of a buffer of packed weights. Inference and training have the same offsets.

    Attributes:
        layer_dirs: The offsets of each layer-direction.
        backward_offset: The beginning of the weights for backward: the end of a buffer for inference.
        flat_offset: The beginning of a copy of the parameters.
        size: Bytes of a buffer for training.
    """

    layer_dirs: tuple[PackedWeightsOffsets, ...]
    backward_offset: int
    flat_offset: int
    size: int

    @classmethod
    def of(cls, spec: RNNSpec, tiling: Tiling) -> PackedLayout:
        """The layout of a spec's weights."""
        count = spec.num_layers * spec.num_directions
        features = [spec.layer_input_size(index // spec.num_directions) for index in range(count)]
        forward = [_forward_sizes(tiling, k) for k in features]
        backward = [_backward_sizes(tiling, k) for k in features]
        sizes = [round_up_to_cache_line(rows * tiling.panel_bytes) for part in forward + backward for rows in part]
        *offsets, end = accumulate(sizes, initial=0)
        num_forward, num_backward = len(forward[0]), len(backward[0])
        split = num_forward * count
        layer_dirs = tuple(
            PackedWeightsOffsets(
                *offsets[num_forward * index : num_forward * (index + 1)],
                *offsets[split + num_backward * index : split + num_backward * (index + 1)],
            )
            for index in range(count)
        )
        size = end + round_up_to_cache_line(spec.layout.size * tiling.item)
        return cls(layer_dirs, backward_offset=offsets[split], flat_offset=end, size=size)


def _forward_sizes(tiling: Tiling, features: int) -> list[int]:
    """Rows of panels of each matrix and bias for forward, in the order of :class:`PackedWeightsOffsets`."""
    recurrent = sum(tiling.num_panels(stage) * tiling.operand_size(stage) for stage in tiling.gate_stages)
    projection = sum(tiling.num_panels(stage) * tiling.hidden for stage in tiling.projections)
    panels = tiling.gate_panels
    return [features * panels, recurrent, projection, tiling.peephole_panels, panels, panels]


def _backward_sizes(tiling: Tiling, features: int) -> list[int]:
    """Rows of panels of each matrix for backward."""
    return [
        tiling.feature_panels(features) * tiling.gates_k_padded,
        sum(tiling.feature_panels(tiling.operand_size(stage)) * tiling.k_padded(stage) for stage in tiling.gate_stages),
        sum(tiling.feature_panels(tiling.hidden) * tiling.k_padded(stage) for stage in tiling.projections),
    ]


def packing_tasks(spec: RNNSpec, tiling: Tiling, layout: PackedLayout, training: bool) -> Array:
    """The tasks that pack a spec's flat parameter vector, for inference or for training: a row each."""
    tasks: list[PackTask] = []
    for index, packed in enumerate(layout.layer_dirs):
        layer, direction = divmod(index, spec.num_directions)
        source = {kind: spec.layout.entry(layer, direction, kind).offset * tiling.item for kind in spec.layout.kinds}
        features = spec.layer_input_size(layer)
        tasks += _forward_tasks(tiling, source, packed, features)
        if training:
            tasks += _backward_tasks(tiling, source, packed, features)
    return np.array(tasks, np.int64)


def _columns(tiling: Tiling, stage: StageKernel) -> tuple[int, int, int]:
    """A stage's gates, the units of each, and their vectors."""
    units = tiling.num_units(stage)
    return stage.num_gates, units, tiling.num_vectors(units)


def _gate_offset(tiling: Tiling, stage: StageKernel, k: int) -> int:
    """The offset of a stage's first gate in a matrix with rows of ``k`` elements."""
    return stage.first_gate * tiling.hidden * k * tiling.item


def _forward_tasks(
    tiling: Tiling, source: Mapping[Kind, int], packed: PackedWeightsOffsets, features: int
) -> list[PackTask]:
    tasks: list[PackTask] = []
    panel, h_weights = 0, packed.h_weights
    for stage in tiling.gate_stages:
        panels, k, columns = tiling.num_panels(stage), tiling.operand_size(stage), _columns(tiling, stage)
        x_source = source["i2h_weight"] + _gate_offset(tiling, stage, features)
        h_source = source["h2h_weight"] + _gate_offset(tiling, stage, k)
        bias, first = _gate_offset(tiling, stage, 1), panel * tiling.panel_bytes
        x_bias_kinds: tuple[Kind, ...] = ("i2h_bias", "h2h_bias") if stage.accumulates_in_place else ("i2h_bias",)
        tasks += [
            PackTask(PACK_TRANSPOSED, x_source, 0, features, panels, packed.x_weights + features * first, *columns),
            PackTask(PACK_TRANSPOSED, h_source, 0, k, panels, h_weights, *columns),
            _bias_task(source, x_bias_kinds, bias, panels, packed.x_bias + first, columns),
            _bias_task(source, ("h2h_bias",), bias, panels, packed.h_bias + first, columns),
        ]
        panel, h_weights = panel + panels, h_weights + k * panels * tiling.panel_bytes
    for stage in tiling.projections:
        matrix = source["h2r_weight"], 0, tiling.hidden, tiling.num_panels(stage)
        tasks.append(PackTask(PACK_TRANSPOSED, *matrix, packed.projection, *_columns(tiling, stage)))
    if tiling.num_peepholes:
        matrix = source["peephole_weight"], 0, 1, tiling.peephole_panels
        peepholes = tiling.num_peepholes, tiling.hidden, tiling.unit_vecs
        tasks.append(PackTask(PACK_TRANSPOSED, *matrix, packed.peepholes, *peepholes))
    return tasks


def _bias_task(
    source: Mapping[Kind, int],
    kinds: tuple[Kind, ...],
    offset: int,
    panels: int,
    dest: int,
    columns: tuple[int, int, int],
) -> PackTask:
    """The task that packs the sum of those of these biases that the spec has."""
    biases = [source[kind] + offset for kind in kinds if kind in source]
    kind = (PACK_ZEROS, PACK_TRANSPOSED, PACK_SUM)[len(biases)]
    first, second = (*biases, 0, 0)[:2]
    return PackTask(kind, first, second, 1, panels, dest, *columns)


def _backward_tasks(
    tiling: Tiling, source: Mapping[Kind, int], packed: PackedWeightsOffsets, features: int
) -> list[PackTask]:
    tasks: list[PackTask] = []
    row, h_back = 0, packed.h_back
    for stage in tiling.gate_stages:
        k, k_padded, columns = tiling.operand_size(stage), tiling.k_padded(stage), _columns(tiling, stage)
        x_source = source["i2h_weight"] + _gate_offset(tiling, stage, features)
        h_source = source["h2h_weight"] + _gate_offset(tiling, stage, k)
        x_panels, h_panels = tiling.feature_panels(features), tiling.feature_panels(k)
        x_back = packed.x_back + row * tiling.panel_bytes
        tasks += [
            PackTask(PACK, x_source, 0, features, x_panels, x_back, *columns, tiling.gates_k_padded),
            PackTask(PACK, h_source, 0, k, h_panels, h_back, *columns, k_padded),
        ]
        row, h_back = row + k_padded, h_back + h_panels * k_padded * tiling.panel_bytes
    for stage in tiling.projections:
        matrix = source["h2r_weight"], 0, tiling.hidden, tiling.feature_panels(tiling.hidden)
        tasks.append(
            PackTask(PACK, *matrix, packed.projection_back, *_columns(tiling, stage), tiling.k_padded(stage))
        )
    return tasks
