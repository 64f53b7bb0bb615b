"""The cost model: the predicted time of a call, for a division of its work among threads.

Everything is in seconds and bytes. A micro-kernel takes as long as its multiply-adds or as reading its panel, whichever
is longer; a call takes as long as the thread with the largest share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

from fusedrnn.engines.cpu.plan.sizes import LargestShare, ProblemSize
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
    problem: ProblemSize, share: LargestShare, machine: MachineModel, *, spinning: bool = False
) -> Cost:
    """Predict the cost of a call; its threads are asleep when it comes, or ``spinning``."""
    cost = Cost()
    rounds, meetings = _rounds_per_thread(problem, share)
    is_parallel = share.num_threads > 1
    layer_model = _BackwardLayer if problem.phase == "backward" else _ForwardLayer
    for features, count in Counter(problem.inputs).items():
        for term, seconds in layer_model(problem, share, machine, features).predict().items():
            cost[term] += count * rounds * seconds
        cost["barriers"] += count * is_parallel * meetings * machine.barrier
    cost["call"] += machine.call + (problem.phase != "inference") * machine.reserve
    cost["call"] += is_parallel * (machine.wake_spinning if spinning else machine.wake_sleeping)
    return cost


def adjusted_cost(share: LargestShare, cost: Cost, min_speedup: float) -> float:
    """The cost by which grids are compared: several threads must be so many times as fast as one."""
    return cost.total * (min_speedup if share.num_threads > 1 else 1.0)


def _rounds_per_thread(problem: ProblemSize, share: LargestShare) -> tuple[float, float]:
    """A thread's part of the time of one direction of all layers, and barriers of all threads per layer."""
    groups = share.grid.layer_dirs
    if problem.spec.num_directions > 1 or groups == 1:
        return -(-problem.spec.num_directions // groups), 1.0
    layers, chunks = len(problem.inputs), -(-problem.steps // share.chunk)
    own_layers = -(-layers // groups)
    # The last group of a pipeline begins when each of the others has finished a chunk.
    return (own_layers + (groups - 1) / chunks) / layers, own_layers * chunks / layers


class _Layer:
    """The cost of one direction of a layer with so many input features."""

    def __init__(
        self, problem: ProblemSize, share: LargestShare, machine: MachineModel, features: int
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
        if problem.converts_rows:
            # Each thread converts the inputs of its rows, and all units of states that need a scale.
            operands = self.features
            if problem.products.has_scales:
                operands += sum(map(problem.operand_size, problem.gemm_stages))
            self.cost["cell"] += self.rows * problem.num_vectors(operands) * machine.conversion

    def recurrent_gemms(self, shapes: Sequence[tuple[int, int]], other_bytes: int) -> int:
        """Add a GEMM for each pair of K and vectors of columns; return the bytes of all their weights.

        Other data takes ``other_bytes`` of L2. At the first step no weights are in L2, later there are as many as fit.
        """
        problem, machine = self.problem, self.machine
        size = sum(k * width for k, width in shapes) * problem.weight_vector_bytes
        if not size:
            return 0
        room = (machine.usable_l2 * machine.l2_bytes - other_bytes) / size
        l2_fraction = min(1.0, max(0.0, room)) * (1 - 1 / problem.steps)
        for k, width in shapes:
            self.gemm("recurrent GEMM", problem.steps, self.share.rows, k, width, l2_fraction, 0)
        return size

    def gemm(
        self, term: str, count: int, rows: float, k: int, col_vecs: int, l2_fraction: float, features: int
    ) -> None:
        """Add GEMMs of so many rows; ``l2_fraction`` of their weights is in L2.

        The rest comes from L3 if L3 holds the recurrent weights and the weights of ``features`` inputs of all active
        directions; else from memory.
        """
        problem, machine = self.problem, self.machine
        size = problem.weights_bytes(features, problem.unit_vecs)
        fits_l3 = size * self.share.grid.layer_dirs <= machine.l3_bytes
        bandwidth = machine.l3_bandwidth if fits_l3 else machine.memory_bandwidth
        panels = count * (col_vecs / problem.panel_vectors)
        panel_vectors = problem.panel_vectors * k
        rate = 1 / (l2_fraction / machine.l2_bandwidth + (1 - l2_fraction) / bandwidth)
        fma_rate = machine.fma_rate * problem.products.speedup
        panel_bytes = panel_vectors * problem.weight_vector_bytes
        self.panels(term, panels, rows, problem.rows_per_gemm_tile, panel_vectors / fma_rate, panel_bytes, rate)
        if problem.unpacked:
            self.cost[term] += panels * panel_vectors * machine.transpose

    def panels(
        self, term: str, panels: float, rows: float, rows_per_tile: int, row_seconds: float, panel_bytes: float,
        bandwidth: float,
    ) -> None:  # fmt: skip
        """Add the products of rows and panels; each takes ``row_seconds`` of multiply-adds.

        A panel's first tiles prefetch the next panel; all tiles read their panel from L2.
        """
        machine = self.machine
        tiles = ceil(rows / rows_per_tile)
        fma = rows / tiles * row_seconds
        l2_stall = max(0.0, panel_bytes / machine.l2_bandwidth - fma)
        extra_fetch = panel_bytes / bandwidth - panel_bytes / machine.l2_bandwidth
        hidden = min(tiles, machine.prefetching_tiles) * (fma + l2_stall)
        first_stall = l2_stall + max(machine.exposed_latency * extra_fetch, panel_bytes / bandwidth - hidden)
        self.cost[term] += panels * tiles * (fma + machine.tile)
        self.cost["weights"] += panels * (first_stall + (tiles - 1) * l2_stall)

    def streaming_bandwidth(self, vectors: int) -> float:
        """Bandwidth for streaming data of so many vectors per unit vector: of L3 if the data fits, else of memory."""
        problem, machine = self.problem, self.machine
        size = problem.steps * problem.batch * problem.unit_vecs * problem.vector_bytes * vectors
        size *= problem.spec.num_directions * len(problem.inputs)
        fits_l3 = size <= machine.l3_bytes // 2
        return machine.l3_bandwidth if fits_l3 else machine.memory_bandwidth / machine.stream_trips


class _ForwardLayer(_Layer):
    """A layer of inference or training."""

    def predict(self) -> Cost:
        """Predict the cost; called once."""
        problem, share, machine, cost = self.problem, self.share, self.machine, self.cost
        col_vecs = share.unit_vecs * problem.num_gates
        gates_bytes = share.chunk * share.rows * col_vecs * problem.vector_bytes
        shapes = [(problem.gemm_k(s), s.num_gates * share.unit_vecs_of(s)) for s in problem.gemm_stages]
        recurrent_bytes = self.recurrent_gemms(shapes, gates_bytes)
        input_bytes = self.features * col_vecs * problem.weight_vector_bytes
        fits_l2 = input_bytes + recurrent_bytes + gates_bytes < machine.usable_l2 * machine.l2_bytes
        self.gemm(
            "input GEMM", self.chunks, self.rows / self.chunks, self.features, col_vecs, float(fits_l2), self.features
        )
        self.cell()
        # The output, and in training the reserve.
        written = 1 + (problem.phase == "training") * (problem.states + problem.saved)
        written_bytes = self.rows * share.unit_vecs * problem.vector_bytes * written
        cost["memory"] = written_bytes / self.streaming_bandwidth(written)
        cost["barriers"] = problem.steps * problem.num_barriers * (share.grid.units > 1) * machine.barrier
        return cost


class _BackwardLayer(_Layer):
    """A layer of backward."""

    def predict(self) -> Cost:
        """Predict the cost; called once."""
        problem, share = self.problem, self.share
        gates_bytes = share.rows * problem.unit_vecs * problem.num_gates * problem.vector_bytes
        heads = problem.spec.heads
        shapes = [
            (problem.k_padded(stage) // heads, share.unit_vecs if stage.index else share.out_unit_vecs)
            for stage in problem.gemm_stages
        ]
        self.recurrent_gemms(shapes, 2 * gates_bytes)
        x_vecs = problem.num_vectors(self.features)
        self.gemm(
            "input GEMM", self.chunks, self.rows / self.chunks, problem.k_padded(*problem.input_groups),
            -(-x_vecs // share.grid.units), 0.0, self.features,
        )  # fmt: skip
        self.cell()
        self._weight_gradients(x_vecs)
        return self.cost

    def _weight_gradients(self, x_vecs: int) -> None:
        """Add the GEMMs of the weight gradients, the memory that all of backward streams, and the barriers."""
        problem, share, machine, cost = self.problem, self.share, self.machine, self.cost
        all_rows = problem.steps * problem.batch
        # A projection's rows are H long, but there are fewer of them.
        operand_size = sum(problem.gemm_k(stage) * stage.num_gates for stage in problem.gemm_stages)
        operand_vecs = operand_size / problem.lanes
        panels = (x_vecs * problem.num_gates + operand_vecs) / problem.panel_vectors
        row_panels = share.weight_unit_vecs * panels
        blocks = -(-all_rows // share.block_rows)
        # Rows of the batch are multiplied in groups, and a group is packed into one slot.
        products, all_groups = problem.gradient_products, problem.gradient_groups
        panel_vectors = problem.panel_vectors * (all_groups / blocks)
        fma_rate = machine.fma_rate * products.speedup / products.group
        self.panels(
            "weights", row_panels * blocks, problem.lanes, problem.rows_per_tile, panel_vectors / fma_rate,
            panel_vectors * problem.vector_bytes, machine.l2_bandwidth,
        )  # fmt: skip
        # Each thread packs the operands for itself, and adds up the gradients of its biases.
        packed_bytes = all_groups * panels * problem.panel_vectors * problem.vector_bytes
        cost["weights"] += packed_bytes / self.streaming_bandwidth(1)
        cost["weights"] += all_rows * share.weight_unit_vecs * problem.pre_act_grads * 4 * machine.instruction
        read = 2 * problem.states + problem.saved + problem.pre_act_grads
        read_bytes = self.rows * share.unit_vecs * problem.vector_bytes * read
        sums_bytes = row_panels * problem.lanes * problem.panel_vectors * problem.vector_bytes
        cost["memory"] = (read_bytes + (2 * blocks - 1) * sums_bytes) / self.streaming_bandwidth(read)
        # Threads of a cell without stages meet once a chunk, before the gradients of the chunk's inputs.
        meetings = (problem.steps * problem.num_barriers or self.chunks) * (share.grid.units > 1)
        meetings += 2 * blocks * (share.num_threads > share.grid.layer_dirs)
        cost["barriers"] = meetings * machine.barrier
