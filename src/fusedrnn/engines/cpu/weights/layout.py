"""Where packed weights lie, and what is to be packed from where to where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.engines.cpu.kernels.tiling import Tiling, round_up_to_cache_line
from fusedrnn.engines.cpu.weights import pack_kernel as packing
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Task = tuple[int, ...]


@dataclass(frozen=True)
class PackedWeightsOffsets:
    """Where one layer's and direction's packed weights and biases begin; the last three are for backward.

    Of a cell of several stages each has those of the first stage's gates, then those of the next one's, each stage
    beginning with a new panel; in ``x_back`` all gates' rows follow one another in every panel.
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


@dataclass(frozen=True)
class PackedLayout:
    """Where everything is in a packed buffer: what forward needs first, the same with or without what backward needs.

    Attributes:
        passes: Each pass's parts.
        back: What backward needs; inference ends here.
        flat: A copy of the parameters.
        size: Bytes of it all.
    """

    passes: tuple[PackedWeightsOffsets, ...]
    back: int
    flat: int
    size: int

    @classmethod
    def of(cls, spec: RNNSpec, g: Tiling) -> PackedLayout:
        """That of a spec's parameters."""
        forward, backward = [], []
        for number in range(spec.num_layers * spec.num_directions):
            features = spec.layer_input_size(number // spec.num_directions)
            columns = g.columns * g.panel_bytes
            recurrent = sum(g.columns_of(stage) * g.operand_size(stage) for stage in g.gate_stages) * g.panel_bytes
            projection = sum(g.columns_of(stage) for stage in g.projections) * spec.hidden_size * g.panel_bytes
            vectors = g.vector_panels * g.panel_bytes
            forward.append([features * columns, recurrent, projection, vectors, columns, columns])
            back = [
                g.panels_of(features) * g.depth,
                sum(g.panels_of(g.operand_size(stage)) * g.depth_of(stage) for stage in g.gate_stages),
                sum(g.panels_of(spec.hidden_size) * g.depth_of(stage) for stage in g.projections),
            ]
            backward.append([rows * g.panel_bytes for rows in back])
        sizes = [size for stage in (forward, backward) for one in stage for size in one]
        *places, end = (0, *accumulate(round_up_to_cache_line(size) for size in sizes))
        ahead, after = len(forward[0]), len(backward[0])
        behind = ahead * len(forward)
        passes = tuple(
            PackedWeightsOffsets(
                *places[ahead * n : ahead * (n + 1)], *places[behind + after * n : behind + after * (n + 1)]
            )
            for n in range(len(forward))
        )
        return cls(passes, back=places[behind], flat=end, size=end + round_up_to_cache_line(spec.layout.size * g.item))


def packing_tasks(spec: RNNSpec, tiling: Tiling, layout: PackedLayout, training: bool) -> Array:
    """Rows of :data:`fusedrnn.engines.cpu.weights.pack_kernel.TASK`, for inference or for training."""
    tasks: list[Task] = []
    for number, into in enumerate(layout.passes):
        layer, direction = divmod(number, spec.num_directions)
        kinds = spec.layout.kinds
        at = {kind: spec.layout.entry(layer, direction, kind).offset * tiling.item for kind in kinds}
        features = spec.layer_input_size(layer)
        tasks += _forward_tasks(tiling, at, into, features)
        if training:
            tasks += _backward_tasks(tiling, at, into, features)
    return np.array(tasks, np.int64)


def _rows(g: Tiling, stage: StageKernel) -> tuple[int, int, int]:
    """A stage's gates, the units of each, and their vectors."""
    size = g.size_of(stage)
    return stage.num_gates, size, g.vectors_of(size)


def _forward_tasks(g: Tiling, at: Mapping[Kind, int], into: PackedWeightsOffsets, features: int) -> list[Task]:
    tasks: list[Task] = []
    column, recurrent = 0, into.h_weights
    for stage in g.gate_stages:
        panels, k, own = g.columns_of(stage), g.operand_size(stage), (*_rows(g, stage), 0)
        x_row, h_row, bias = (stage.first_gate * g.hidden * size * g.item for size in (features, k, 1))
        beside = column * g.panel_bytes
        x_into = into.x_weights + features * beside
        together: tuple[Kind, ...] = ("i2h_bias", "h2h_bias") if stage.accumulates_in_place else ("i2h_bias",)
        tasks += [
            (packing.FORWARD, at["i2h_weight"] + x_row, 0, features, panels, x_into, *own),
            (packing.FORWARD, at["h2h_weight"] + h_row, 0, k, panels, recurrent, *own),
            _bias(at, together, bias, panels, into.x_bias + beside, own),
            _bias(at, ("h2h_bias",), bias, panels, into.h_bias + beside, own),
        ]
        column, recurrent = column + panels, recurrent + k * panels * g.panel_bytes
    for stage in g.projections:
        source = at["h2r_weight"], 0, g.hidden, g.columns_of(stage)
        tasks.append((packing.FORWARD, *source, into.projection, *_rows(g, stage), 0))
    if g.vectors:
        own = g.vectors, g.hidden, g.unit_vectors, 0
        tasks.append((packing.FORWARD, at["peephole_weight"], 0, 1, g.vector_panels, into.peepholes, *own))
    return tasks


def _bias(
    at: Mapping[Kind, int], kinds: tuple[Kind, ...], offset: int, panels: int, into: int, own: tuple[int, ...]
) -> Task:
    """The sum of the biases that are there."""
    there = [at[kind] + offset for kind in kinds if kind in at]
    kind = (packing.ZEROS, packing.FORWARD, packing.SUM)[len(there)]
    source, also = (*there, 0, 0)[:2]
    return kind, source, also, 1, panels, into, *own


def _backward_tasks(g: Tiling, at: Mapping[Kind, int], into: PackedWeightsOffsets, features: int) -> list[Task]:
    tasks: list[Task] = []
    row, recurrent = 0, into.h_back
    for stage in g.gate_stages:
        k, depth, own = g.operand_size(stage), g.depth_of(stage), _rows(g, stage)
        x_row, h_row = (stage.first_gate * g.hidden * size * g.item for size in (features, k))
        x_panels, h_panels = g.panels_of(features), g.panels_of(k)
        begin = into.x_back + row * g.panel_bytes
        tasks += [
            (packing.BACKWARD, at["i2h_weight"] + x_row, 0, features, x_panels, begin, *own, g.depth),
            (packing.BACKWARD, at["h2h_weight"] + h_row, 0, k, h_panels, recurrent, *own, depth),
        ]
        row, recurrent = row + depth, recurrent + h_panels * depth * g.panel_bytes
    for stage in g.projections:
        source = at["h2r_weight"], 0, g.hidden, g.panels_of(g.hidden)
        tasks.append((packing.BACKWARD, *source, into.projection_back, *_rows(g, stage), g.depth_of(stage)))
    return tasks
