"""The layout of packed weights, and the tasks that pack them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.kernels.lowered_cell import LoweredStage
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.weights.pack_kernel import (
    PACK,
    PACK_SUM,
    PACK_TRANSPOSED,
    PACK_VECTOR,
    PACK_ZEROS,
    PackTask,
)
from fusedrnn.layout import Kind
from fusedrnn.quantized_params import num_operands
from fusedrnn.runtime.buffers import round_up_to_cache_line


class PackedWeightsOffsets(NamedTuple):
    """The offsets of the packed weights, biases and ranges of a layer-direction; the last three are for backward.

    If a cell has several stages, each matrix has the columns of the gates of the first stage, then those of the next
    one. Each stage begins with a new panel. In ``x_back`` the rows of all gates follow one another in every panel.
    """

    x_weights: int
    h_weights: int
    projection: int
    parameters: int
    x_bias: int
    h_bias: int
    ranges: int
    x_back: int
    h_back: int
    projection_back: int


_MATRICES = "x_weights", "h_weights", "projection"
_FORWARD, _BACKWARD = PackedWeightsOffsets._fields[:7], PackedWeightsOffsets._fields[7:]


class PackedLayout(NamedTuple):
    """The layout of a buffer of packed weights. Inference and training have the same offsets.

    Attributes:
        layer_dirs: The offsets of each layer-direction.
        forward_tasks: The tasks that pack a flat parameter vector for inference, one in each row.
        tasks: The tasks for training: those for inference, then those of the weights for backward.
        backward_offset: The beginning of the weights for backward, which is the end of a buffer for inference.
        flat_offset: The beginning of a copy of the parameters.
        size: Bytes of a buffer for training.
    """

    layer_dirs: tuple[PackedWeightsOffsets, ...]
    forward_tasks: Array
    tasks: Array
    backward_offset: int
    flat_offset: int
    size: int

    @classmethod
    def of(cls, tiling: Tiling) -> PackedLayout:
        """The layout of a spec's weights."""
        spec = tiling.spec
        layer_dirs = product(range(spec.num_layers), range(spec.num_directions))
        matrices = [_LayerDirTasks(tiling, layer, direction).matrices() for layer, direction in layer_dirs]
        offsets: list[dict[str, int]] = [{} for _ in matrices]
        tasks: list[PackTask] = []
        end = 0
        for names in _FORWARD, _BACKWARD:
            backward_offset, num_forward_tasks = end, len(tasks)
            for index, name in product(range(len(matrices)), names):
                # The offset is that of the matrix, which follows its scales.
                scales = [task for task in matrices[index][name] if name in _MATRICES and task.kind == PACK_VECTOR]
                offsets[index][name] = end + sum(_bytes(tiling, task) for task in scales)
                tasks += [task._replace(dest=end + task.dest) for task in matrices[index][name]]
                end += round_up_to_cache_line(sum(_bytes(tiling, task) for task in matrices[index][name]))
        all_tasks = np.array(tasks, np.int64)
        return cls(
            tuple(PackedWeightsOffsets(**offsets_of) for offsets_of in offsets),
            all_tasks[:num_forward_tasks], all_tasks, backward_offset, flat_offset=end,
            size=end + round_up_to_cache_line(spec.layout.size * tiling.item),
        )  # fmt: skip


def _panel_bytes(tiling: Tiling, task: PackTask) -> int:
    """Bytes that a task writes in each of its panels."""
    if task.kind not in (PACK, PACK_TRANSPOSED):
        return tiling.panel_bytes
    k = task.unit_vecs * task.gates * tiling.lanes if task.kind == PACK else task.k
    return tiling.packed_bytes(k)


def _bytes(tiling: Tiling, task: PackTask) -> int:
    """Bytes that a task writes."""
    return task.panels * _panel_bytes(tiling, task)


class _LayerDirTasks:
    """The tasks of one layer-direction."""

    def __init__(self, tiling: Tiling, layer: int, direction: int) -> None:
        self._tiling, self._layer, self._direction = tiling, layer, direction
        self._layout, self._hidden = tiling.spec.layout, tiling.hidden

    def matrices(self) -> dict[str, list[PackTask]]:
        """The tasks of each matrix and bias; ``dest`` is relative to the matrix, or to its scales if it has any."""
        tiling, gates, projections = self._tiling, self._tiling.input_groups, self._tiling.projections
        recurrent, heads = tiling.recurrent_stages, self._heads
        features, size = tiling.spec.layer_input_size(self._layer), tiling.gemm_k
        matrices = {
            "x_weights": self._scales("i2h_weight", gates) + [self._gates(s, features, "i2h_weight") for s in gates],
            "h_weights": self._scales("h2h_weight", recurrent)
            + [task for s in recurrent for task in heads(self._gates(s, size(s), "h2h_weight"))],
            "projection": self._scales("h2r_weight", projections)
            + [self._gates(s, size(s), "h2r_weight") for s in projections],
            "parameters": self._parameters(),
            "x_bias": [
                self._bias(s, "i2h_bias", "h2h_bias") if s.accumulates_in_place else self._bias(s, "i2h_bias")
                for s in gates
            ],
            "h_bias": [task for s in recurrent for task in heads(self._bias(s, "h2h_bias"))],
            "ranges": self._ranges(),
            "x_back": [self._back(s, features, "i2h_weight", tiling.k_padded(*gates)) for s in gates],
            "h_back": [
                task for s in recurrent for task in heads(self._back(s, size(s), "h2h_weight", tiling.k_padded(s)))
            ],
            "projection_back": [self._back(s, size(s), "h2r_weight", tiling.k_padded(s)) for s in projections],
        }
        for name, tasks in matrices.items():
            # Stages follow one another; in x_back they do so in every panel.
            sizes = [_panel_bytes(tiling, task) if name == "x_back" else _bytes(tiling, task) for task in tasks]
            offsets = accumulate(sizes, initial=0)
            matrices[name] = [task._replace(dest=at) for task, at in zip(tasks, offsets, strict=False)]
        return matrices

    def _heads(self, task: PackTask) -> list[PackTask]:
        """A task of recurrent weights, head by head; each head begins a panel."""
        tiling, heads = self._tiling, self._tiling.spec.heads
        if heads == 1:
            return [task]
        units, unit_vecs = task.units // heads, task.unit_vecs // heads
        panels = task.panels if task.kind == PACK else -(-unit_vecs * task.gates // tiling.panel_vectors)
        of_head = task._replace(
            panels=panels, units=units, unit_vecs=unit_vecs, panel_rows=task.panel_rows // heads, gate_units=task.units
        )
        row_bytes = units * task.k * tiling.item
        return [of_head._replace(source=task.source + head * row_bytes) for head in range(heads)]

    def _task(self, stage: LoweredStage, kind: int, k: int, sources: Mapping[Kind, int]) -> PackTask:
        """The task of a stage's gates of the matrices or vectors that begin at these offsets, by kind."""
        tiling = self._tiling
        units, row_bytes = tiling.num_units(stage), k * tiling.item
        first_gates = {"i2h": stage.first_x_gate, "h2h": stage.first_h_gate, "h2r": 0}
        starts = [at + first_gates[of[:3]] * self._hidden * row_bytes for of, at in sources.items()]
        source, source2 = (*starts, 0, 0)[:2]
        columns = stage.num_gates, units, tiling.num_vectors(units)
        return PackTask(kind, source, source2, k, tiling.num_panels(stage), 0, *columns)

    def _offset(self, kind: Kind) -> int:
        return self._layout.entry(self._layer, self._direction, kind).offset * self._tiling.item

    def _gates(self, stage: LoweredStage, k: int, kind: Kind) -> PackTask:
        """The task of a stage's gates of a matrix, for forward."""
        return self._task(stage, PACK_TRANSPOSED, k, {kind: self._offset(kind)})

    def _back(self, stage: LoweredStage, k: int, kind: Kind, panel_rows: int) -> PackTask:
        """The task of a stage's gates of a matrix, for backward."""
        task = self._task(stage, PACK, k, {kind: self._offset(kind)})
        return task._replace(panels=self._tiling.feature_panels(k), panel_rows=panel_rows)

    def _bias(self, stage: LoweredStage, *kinds: Kind) -> PackTask:
        """The task of a stage's gates of a bias: the sum of the ``kinds`` that the spec has."""
        sources = {kind: self._offset(kind) for kind in kinds if self._layout.has(kind)}
        return self._task(stage, (PACK_ZEROS, PACK_VECTOR, PACK_SUM)[len(sources)], 1, sources)

    def _scales(self, kind: Kind, stages: Sequence[LoweredStage]) -> list[PackTask]:
        """The tasks of the scales of the rows of a quantized matrix; none for other matrices."""
        offset = self._tiling.scale_offsets.get((self._layer, self._direction, kind))
        return [] if offset is None else [self._task(stage, PACK_VECTOR, 1, {kind: offset}) for stage in stages]

    def _ranges(self) -> list[PackTask]:
        """The task of the ranges of the operands, in formats that quantize them."""
        tiling, begin = self._tiling, self._tiling.ranges_offset
        if begin is None:
            return []
        count = num_operands(tiling.spec)
        index = self._layer * tiling.spec.num_directions + self._direction
        vectors = tiling.num_vectors(count)
        panels = -(-vectors // tiling.panel_vectors)
        return [PackTask(PACK_VECTOR, begin + index * count * tiling.item, 0, 1, panels, 0, 1, count, vectors)]

    def _parameters(self) -> list[PackTask]:
        """The tasks of the cell's own parameters: scalars, each in a vector, then the vectors."""
        tiling, spec, tasks = self._tiling, self._tiling.spec, []
        for kinds, count, units in (
            (spec.scalar_kinds, len(spec.scalar_kinds), 1),
            (spec.vector_kinds, tiling.num_param_vectors, self._hidden),
        ):
            if kinds:
                vectors = tiling.num_vectors(units)
                panels = -(-vectors * count // tiling.panel_vectors)
                source = self._offset(kinds[0])
                tasks.append(PackTask(PACK_VECTOR, source, 0, 1, panels, 0, count, units, vectors))
        return tasks
