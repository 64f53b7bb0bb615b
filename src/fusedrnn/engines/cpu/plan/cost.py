"""The cost model: the predicted time of a call, for a division of its work among threads.

Everything is in seconds and bytes. A micro-kernel takes as long as its multiply-adds or as reading its panel, whichever
is longer; a call takes as long as the thread with the largest share.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from fusedrnn.engines.cpu.plan.sizes import ProblemSize, ThreadShare
from fusedrnn.engines.cpu.tuning import MachineModel

COST_TERMS = "input GEMM", "recurrent GEMM", "weights", "cell", "memory", "barriers", "call"


class Cost(dict[str, float]):
    """Seconds of each cost term, for the thread with the largest share."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COST_TERMS, 0.0))

    @property
    def total(self) -> float:
        """Seconds of all terms."""
        return sum(self.values())


def predict_cost(
    problem: ProblemSize, share: ThreadShare, machine: MachineModel, *, awake: bool = False
) -> Cost:
    """Predict the cost of a call; its threads are asleep when it comes, or ``awake``."""
    cost = Cost()
    rounds, meetings = _rounds_per_thread(problem, share)
    is_parallel = share.num_threads > 1
    layer_model = _BackwardLayer if problem.phase == "backward" else _ForwardLayer
    for count, features in _distinct_layers(problem):
        for term, seconds in layer_model(problem, share, machine, features).predict().items():
            cost[term] += count * rounds * seconds
        cost["barriers"] += count * is_parallel * meetings * machine.barrier
    cost["call"] += machine.call + (problem.phase != "inference") * machine.reserve
    cost["call"] += is_parallel * (machine.wake_spinning if awake else machine.wake_sleeping)
    return cost


def adjusted_cost(share: ThreadShare, cost: Cost, min_speedup: float) -> float:
    """The cost by which grids are compared: several threads must be so many times as fast as one."""
    return cost.total * (min_speedup if share.num_threads > 1 else 1.0)


def _rounds_per_thread(problem: ProblemSize, share: ThreadShare) -> tuple[float, float]:
    """A thread's part of the time of one direction of all layers, and barriers of all threads per layer."""
    groups = share.grid.layer_dirs
    if problem.directions > 1 or groups == 1:
        return -(-problem.directions // groups), 1.0
    layers, chunks = len(problem.inputs), -(-problem.steps // share.chunk)
    own_layers = -(-layers // groups)
    # The last group of a pipeline begins when each of the others has finished a chunk.
    return (own_layers + (groups - 1) / chunks) / layers, own_layers * chunks / layers


def _distinct_layers(problem: ProblemSize) -> Iterator[tuple[int, int]]:
    """How many layers read how many features."""
    for features in dict.fromkeys(problem.inputs):
        yield problem.inputs.count(features), features


class _Layer:
    """The cost of one direction of a layer with so many input features."""

    def __init__(
        self, problem: ProblemSize, share: ThreadShare, machine: MachineModel, features: int
    ) -> None:
        self.problem, self.share, self.machine, self.features = problem, share, machine, features
        self.cost = Cost()
        self.rows = problem.steps * share.rows
        self.chunks = -(-problem.steps // share.chunk)

    def predict(self) -> Cost:
        """Predict the cost; called once."""
        raise NotImplementedError

    def cell(self) -> None:
        """Add the cell's maths and the overheads of rows, steps and the layer."""
        problem, machine = self.problem, self.machine
        row = self.share.unit_vecs * problem.instructions * machine.instruction + machine.row
        self.cost["cell"] = self.rows * row
        self.cost["cell"] += problem.steps * machine.step + machine.layer

    def gemm(
        self, term: str, count: int, rows: float, k: int, col_vecs: int, l2_fraction: float, bandwidth: float
    ) -> None:
        """Add GEMMs of so many rows. This fraction of their weights is in L2, the rest comes at this bandwidth."""
        problem, machine = self.problem, self.machine
        panels = count * (col_vecs / problem.vectors_per_panel)
        panel_vectors = problem.vectors_per_panel * k
        panel_bytes = k * problem.vectors_per_panel * problem.vector_bytes
        rate = 1 / (l2_fraction / machine.l2_bandwidth + (1 - l2_fraction) / bandwidth)
        self.panels(term, panels, rows, problem.rows_per_tile, panel_vectors, panel_bytes, rate)

    def panels(
        self, term: str, panels: float, rows: float, rows_per_tile: int, panel_vectors: float, panel_bytes: float,
        bandwidth: float,
    ) -> None:  # fmt: skip
        """Add rows times panels. A panel's first tiles prefetch the next panel; all tiles read their panel from L2."""
        machine = self.machine
        tiles = ceil(rows / rows_per_tile)
        fma = rows / tiles * panel_vectors / machine.fma_rate
        l2_stall = max(0.0, panel_bytes / machine.l2_bandwidth - fma)
        extra_fetch = panel_bytes / bandwidth - panel_bytes / machine.l2_bandwidth
        hidden = min(tiles, machine.prefetching_tiles) * (fma + l2_stall)
        first_stall = l2_stall + max(machine.exposed_latency * extra_fetch, panel_bytes / bandwidth - hidden)
        self.cost[term] += panels * tiles * (fma + machine.tile)
        self.cost["weights"] += panels * (first_stall + (tiles - 1) * l2_stall)

    def recurrent_l2_fraction(self, weights: int, other: int) -> float:
        """The fraction of the recurrent weights that is in L2, in the mean over all steps; the first finds none."""
        machine = self.machine
        room = (machine.usable_l2 * machine.l2_bytes - other) / weights
        return min(1.0, max(0.0, room)) * (1 - 1 / self.problem.steps)

    def weights_bandwidth(self, features: int) -> float:
        """Bandwidth of weights beyond L2: L3 if those of all active directions fit, else memory."""
        problem = self.problem
        rows = features + problem.stages[0].k
        size = rows * problem.unit_vecs * problem.gates * problem.vector_bytes * self.share.grid.layer_dirs
        return self.machine.l3_bandwidth if size <= self.machine.l3_bytes else self.machine.memory_bandwidth

    def streaming_bandwidth(self, vectors: int) -> float:
        """Bandwidth for streaming data of so many vectors per unit vector: L3 if it fits, else memory."""
        problem, machine = self.problem, self.machine
        size = problem.steps * problem.batch * problem.unit_vecs * problem.vector_bytes * vectors
        size *= problem.directions * len(problem.inputs)
        fits_l3 = size <= machine.l3_bytes // 2
        return machine.l3_bandwidth if fits_l3 else machine.memory_bandwidth / machine.stream_trips


class _ForwardLayer(_Layer):
    """A layer of inference or training."""

    def predict(self) -> Cost:
        """Predict the cost; called once."""
        problem, share, machine, cost = self.problem, self.share, self.machine, self.cost
        col_vecs = share.unit_vecs * problem.gates
        gates_bytes = share.chunk * share.rows * col_vecs * problem.vector_bytes
        stages = [(stage.k, stage.col_vecs * share.unit_vecs_of(stage)) for stage in problem.stages]
        recurrent_bytes = sum(k * width for k, width in stages) * problem.vector_bytes
        in_l2 = self.recurrent_l2_fraction(recurrent_bytes, gates_bytes)
        for k, width in stages:
            bandwidth = self.weights_bandwidth(0)
            self.gemm("recurrent GEMM", problem.steps, share.rows, k, width, in_l2, bandwidth)
        input_bytes = self.features * col_vecs * problem.vector_bytes
        fits_l2 = input_bytes + recurrent_bytes + gates_bytes < machine.usable_l2 * machine.l2_bytes
        self.gemm(
            "input GEMM", self.chunks, self.rows / self.chunks, self.features, col_vecs, float(fits_l2),
            self.weights_bandwidth(self.features),
        )  # fmt: skip
        self.cell()
        # The output, and in training the reserve.
        written = 1 + (problem.phase == "training") * (problem.states + problem.saved)
        written_bytes = self.rows * share.unit_vecs * problem.vector_bytes * written
        cost["memory"] = written_bytes / self.streaming_bandwidth(written)
        cost["barriers"] = problem.steps * len(problem.stages) * (share.grid.units > 1) * machine.barrier
        return cost


class _BackwardLayer(_Layer):
    """A layer of backward."""

    def predict(self) -> Cost:
        """Predict the cost; called once."""
        problem, share = self.problem, self.share
        gates_bytes = share.rows * problem.unit_vecs * problem.gates * problem.vector_bytes
        stages = [self._recurrent_gemm_shape(index) for index in range(len(problem.stages))]
        recurrent_bytes = sum(k * width for k, width in stages) * problem.vector_bytes
        in_l2 = self.recurrent_l2_fraction(recurrent_bytes, 2 * gates_bytes)
        for k, width in stages:
            bandwidth = self.weights_bandwidth(0)
            self.gemm("recurrent GEMM", problem.steps, share.rows, k, width, in_l2, bandwidth)
        x_vecs = -(-self.features // problem.lanes)
        self.gemm(
            "input GEMM", self.chunks, self.rows / self.chunks, problem.unit_vecs * problem.gates * problem.lanes,
            -(-x_vecs // share.grid.units), 0.0, self.weights_bandwidth(self.features),
        )  # fmt: skip
        self.cell()
        self._weight_gradients(x_vecs)
        return self.cost

    def _recurrent_gemm_shape(self, index: int) -> tuple[int, int]:
        """K and vectors of columns of a stage's transposed GEMM."""
        problem, stage = self.problem, self.problem.stages[index]
        unit_vecs = -(-problem.stages[0].k // problem.lanes) if stage.projects else problem.unit_vecs
        return unit_vecs * stage.col_vecs * problem.lanes, self.share.unit_vecs if index else self.share.out_unit_vecs

    def _weight_gradients(self, x_vecs: int) -> None:
        """Add the GEMMs of the weight gradients, the memory that all of backward streams, and the barriers."""
        problem, share, machine, cost = self.problem, self.share, self.machine, self.cost
        all_rows = problem.steps * problem.batch
        # A projection's rows are H long, but there are fewer of them.
        operand_vecs = sum(stage.k * stage.col_vecs for stage in problem.stages) / problem.gates / problem.lanes
        panels = (x_vecs + operand_vecs) / problem.vectors_per_panel
        row_panels = problem.gates * share.weight_unit_vecs * panels
        blocks = -(-all_rows // share.block)
        panel_vectors = problem.vectors_per_panel * (all_rows / blocks)
        self.panels(
            "weights", row_panels * blocks, problem.lanes, problem.rows_per_tile, panel_vectors,
            panel_vectors * problem.vector_bytes, machine.l2_bandwidth,
        )  # fmt: skip
        # Each thread packs the operands for itself, and adds up the gradients of its biases.
        packed_bytes = all_rows * panels * problem.vectors_per_panel * problem.vector_bytes
        cost["weights"] += packed_bytes / self.streaming_bandwidth(1)
        cost["weights"] += all_rows * share.weight_unit_vecs * problem.pre_act_grads * 4 * machine.instruction
        read = 2 * problem.states + problem.saved + problem.pre_act_grads
        read_bytes = self.rows * share.unit_vecs * problem.vector_bytes * read
        sums_bytes = row_panels * problem.lanes * problem.vectors_per_panel * problem.vector_bytes
        cost["memory"] = (read_bytes + (2 * blocks - 1) * sums_bytes) / self.streaming_bandwidth(read)
        meetings = problem.steps * len(problem.stages) * (share.grid.units > 1)
        meetings += 2 * blocks * (share.num_threads > share.grid.layer_dirs)
        cost["barriers"] = meetings * machine.barrier
