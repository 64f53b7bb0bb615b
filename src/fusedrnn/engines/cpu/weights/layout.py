"""The layout of packed weights, and the tasks that pack them."""

from __future__ import annotations

from itertools import accumulate, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.kernels.scratch import round_up_to_cache_line
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.weights.pack_kernel import PACK, PACK_SUM, PACK_TRANSPOSED, PACK_ZEROS, PackTask
from fusedrnn.layout import Kind

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


_FORWARD, _BACKWARD = PackedWeightsOffsets._fields[:6], PackedWeightsOffsets._fields[6:]


class PackedLayout(NamedTuple):
    """The layout of a buffer of packed weights. Inference and training have the same offsets.

    Attributes:
        layer_dirs: The offsets of each layer-direction.
        forward_tasks: The tasks that pack a flat parameter vector for inference, a row each.
        tasks: Those for training: the same, then those of the weights for backward.
        backward_offset: The beginning of the weights for backward: the end of a buffer for inference.
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
        matrices = [_matrices(tiling, layer, direction) for layer, direction in layer_dirs]
        offsets: list[dict[str, int]] = [{} for _ in matrices]
        tasks: list[PackTask] = []
        end = 0
        for names in _FORWARD, _BACKWARD:
            backward_offset, num_forward_tasks = end, len(tasks)
            for index, name in product(range(len(matrices)), names):
                offsets[index][name] = end
                tasks += [task._replace(dest=end + task.dest) for task in matrices[index][name]]
                rows = sum(task.panels * _rows(tiling, task) for task in matrices[index][name])
                end += round_up_to_cache_line(rows * tiling.panel_bytes)
        all_tasks = np.array(tasks, np.int64)
        return cls(
            tuple(PackedWeightsOffsets(**offsets_of) for offsets_of in offsets),
            all_tasks[:num_forward_tasks], all_tasks, backward_offset, flat_offset=end,
            size=end + round_up_to_cache_line(spec.layout.size * tiling.item),
        )  # fmt: skip


def _rows(tiling: Tiling, task: PackTask) -> int:
    """Rows that a task writes in each of its panels."""
    return task.unit_vecs * task.gates * tiling.lanes if task.kind == PACK else task.k


def _matrices(tiling: Tiling, layer: int, direction: int) -> dict[str, list[PackTask]]:
    """The tasks of each matrix and bias of a layer-direction; ``dest`` is relative to the matrix."""
    layout, hidden, gates = tiling.spec.layout, tiling.hidden, tiling.gate_stages
    features = tiling.spec.layer_input_size(layer)

    def offset_of(kind: Kind) -> int:
        return layout.entry(layer, direction, kind).offset * tiling.item

    def task(stage: StageKernel, k: int, *kinds: Kind) -> PackTask:
        """For forward: a stage's gates of a matrix, or of the sum of those of these biases that the spec has."""
        first_gate = 0 if stage.projects else stage.first_gate * hidden * k * tiling.item
        sources = [offset_of(kind) + first_gate for kind in kinds if layout.has(kind)]
        kind = (PACK_ZEROS, PACK_TRANSPOSED, PACK_SUM)[len(sources)]
        source, source2 = (*sources, 0, 0)[:2]
        units = tiling.num_units(stage)
        columns = stage.num_gates, units, tiling.num_vectors(units)
        return PackTask(kind, source, source2, k, tiling.num_panels(stage), 0, *columns)

    def back(stage: StageKernel, k: int, kind: Kind, panel_rows: int) -> PackTask:
        """For backward: a stage's gates of a matrix."""
        return task(stage, k, kind)._replace(kind=PACK, panels=tiling.feature_panels(k), panel_rows=panel_rows)

    peepholes = tiling.num_peepholes, hidden, tiling.unit_vecs
    matrices = {
        "x_weights": [task(stage, features, "i2h_weight") for stage in gates],
        "h_weights": [task(stage, tiling.operand_size(stage), "h2h_weight") for stage in gates],
        "projection": [task(stage, hidden, "h2r_weight") for stage in tiling.projections],
        "peepholes": [
            PackTask(PACK_TRANSPOSED, offset_of("peephole_weight"), 0, 1, tiling.peephole_panels, 0, *peepholes)
        ] if tiling.num_peepholes else [],
        "x_bias": [
            task(stage, 1, "i2h_bias", "h2h_bias") if stage.accumulates_in_place else task(stage, 1, "i2h_bias")
            for stage in gates
        ],
        "h_bias": [task(stage, 1, "h2h_bias") for stage in gates],
        "x_back": [back(stage, features, "i2h_weight", tiling.k_padded(*gates)) for stage in gates],
        "h_back": [back(stage, tiling.operand_size(stage), "h2h_weight", tiling.k_padded(stage)) for stage in gates],
        "projection_back": [back(stage, hidden, "h2r_weight", tiling.k_padded(stage)) for stage in tiling.projections],
    }  # fmt: skip
    for name, tasks in matrices.items():
        # Stages follow one another; in x_back they do so in every panel.
        sizes = [_rows(tiling, task) * (1 if name == "x_back" else task.panels) for task in tasks]
        offsets = accumulate(sizes, initial=0)
        matrices[name] = [task._replace(dest=tiling.panel_bytes * at) for task, at in zip(tasks, offsets, strict=False)]
    return matrices
