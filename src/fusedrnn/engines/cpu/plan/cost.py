"""What a split of the work would cost: a page of arithmetic on the sizes of a problem and of the machine.

Everything is in seconds and bytes. The time of a GEMM's tile is that of its multiply-adds or that of reading its
panel, whichever is longer; the time of a call is that of the member with most to do. No bit of a result depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from fusedrnn.engines.cpu.plan.sizes import Problem, Share
from fusedrnn.jit.host import cache_sizes
from fusedrnn.jit.target import Target

PARTS = "input GEMM", "recurrent GEMM", "weights", "cell", "memory", "barriers", "call"

# Cycles of a nominal core, by which defaults are told: what counts is how they compare with one another.
_CYCLE = 1 / 3.6e9
_NEAR, _FAR = 31, 20
# Data that is there once is fetched, written, and fetched again where it is needed.
_TRIPS = 3
# How many times as fast several threads must be than one.
_WORTH = 1.1
# Of the time that weights take from afar beyond what they would from nearby, what no multiplying hides.
_EXPOSED = 0.15
# Tiles of a panel that ask for the next one.
_PREFETCHING = 4
# Of a second-level cache, what weights find free beside everything that streams through it.
_FREE = 0.85


@dataclass(frozen=True)
class Machine:
    """What of a machine matters. Rates are those of one thread.

    Attributes:
        fma: Multiply-adds of whole vectors a second.
        near, far, memory: Bytes a second read from the second-level cache, from the third, from memory.
        near_size, far_size: Bytes of these caches.
        instruction: Seconds of an instruction on a vector in a cell's maths.
        tile: Seconds of entering and leaving a tile.
        row: Seconds of turning to another row of a step.
        step: Seconds of turning to another step.
        layer: Seconds of entering and leaving a layer in a direction, without what grows with the problem.
        barrier: Seconds from the last to arrive until all go on.
        awake, asleep: Seconds of handing a job to threads that spin, to threads that sleep.
        call, reserve: Seconds of a call before and after its job, and what a reserve adds to them.
    """

    fma: float
    near: float
    far: float
    memory: float
    near_size: int
    far_size: int
    instruction: float
    tile: float = 2e-9
    row: float = 3e-9
    step: float = 20e-9
    layer: float = 0.5e-6
    barrier: float = 0.3e-6
    awake: float = 1.5e-6
    asleep: float = 60e-6
    call: float = 2e-6
    reserve: float = 3.5e-6

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, target: Target) -> Machine:
        """What one may take for granted of a machine with this target's vectors and these caches."""
        caches = cache_sizes()
        near = caches.get("L2", 1 << 20)
        wide = target.vector_bits == 512
        return cls(
            fma=(1 if wide or not target.fma else 2) / _CYCLE,
            near=_NEAR / _CYCLE,
            far=_FAR / _CYCLE,
            memory=10e9,
            near_size=near,
            far_size=caches.get("L3", 4 * near),
            instruction=(0.9 if wide else 0.6) * _CYCLE,
        )


class Cost(dict[str, float]):
    """Seconds by what they go into, of the member with most to do."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.values())


def predict(problem: Problem, share: Share, machine: Machine, *, awake: bool = False) -> Cost:
    """What a call would take so shared out."""
    cost = Cost(dict.fromkeys(PARTS, 0.0))
    turns, meetings = _turns(problem, share)
    several = share.num_threads > 1
    layers = (_backward if problem.way == "backward" else _forward)(problem, share, machine)
    for number, layer in layers:
        for part, seconds in layer.items():
            cost[part] += number * turns * seconds
        cost["barriers"] += number * several * meetings * machine.barrier
    cost["call"] += machine.call + (problem.way != "inference") * machine.reserve
    cost["call"] += several * (machine.awake if awake else machine.asleep)
    return cost


def _turns(problem: Problem, share: Share) -> tuple[float, float]:
    """How much of all layers' time in one direction a member spends, and how often members meet in each layer."""
    groups = share.grid[0]
    if problem.directions > 1 or groups == 1:
        return -(-problem.directions // groups), 1.0
    layers, chunks = len(problem.inputs), -(-problem.steps // share.chunk)
    own = -(-layers // groups)
    # The last group begins when the others have done a chunk each.
    return (own + (groups - 1) / chunks) / layers, own * chunks / layers


def compared(share: Share, cost: Cost) -> float:
    """By what a way to share out is compared with others: other threads, which may be wanted elsewhere, must pay."""
    return cost.total * (_WORTH if share.num_threads > 1 else 1.0)


def _layers(problem: Problem) -> Iterator[tuple[int, int]]:
    """The features that layers read, each with the number of layers that read so many."""
    for features in dict.fromkeys(problem.inputs):
        yield problem.inputs.count(features), features


def _forward(problem: Problem, share: Share, machine: Machine) -> Iterator[tuple[int, Cost]]:
    columns = share.units * problem.gates
    every = problem.steps * share.rows
    gates = share.chunk * share.rows * columns * problem.vector
    recurrent = sum(stage.k * stage.gates * share.of(stage) for stage in problem.stages) * problem.vector
    chunks = -(-problem.steps // share.chunk)
    for number, features in _layers(problem):
        weights = features * columns * problem.vector
        far, farther = _far(problem, share, 0, machine), _far(problem, share, features, machine)
        cost = Cost(dict.fromkeys(PARTS, 0.0))
        # In the first step they come from afar.
        near = _resident(recurrent, gates, machine) * (1 - 1 / problem.steps)
        for stage in problem.stages:
            wide = stage.gates * share.of(stage)
            _gemm(cost, "recurrent GEMM", problem, machine, problem.steps, share.rows, stage.k, wide, near, far)
        # What streams through while the recurrent weights stay.
        near = 1.0 if weights + recurrent + gates < _FREE * machine.near_size else 0.0
        _gemm(cost, "input GEMM", problem, machine, chunks, every / chunks, features, columns, near, farther)
        cost["cell"] = every * (share.units * problem.operations * machine.instruction + machine.row)
        cost["cell"] += problem.steps * machine.step + machine.layer
        # The output, and in training the reserve.
        written = 1 + (problem.way == "training") * (problem.states + problem.kept)
        cost["memory"] = every * share.units * problem.vector * written / _stream(problem, written, machine)
        cost["barriers"] = problem.steps * len(problem.stages) * (share.grid[2] > 1) * machine.barrier
        yield number, cost


def _backward(problem: Problem, share: Share, machine: Machine) -> Iterator[tuple[int, Cost]]:
    k = problem.units * problem.gates * problem.lanes
    every, everybody = problem.steps * share.rows, problem.steps * problem.batch
    backs = [_back(problem, share, number) for number in range(len(problem.stages))]
    recurrent = sum(depth * wide for depth, wide in backs) * problem.vector
    gates = share.rows * problem.units * problem.gates * problem.vector
    chunks = -(-problem.steps // share.chunk)
    for number, features in _layers(problem):
        x_vectors = -(-features // problem.lanes)
        far, farther = _far(problem, share, 0, machine), _far(problem, share, features, machine)
        cost = Cost(dict.fromkeys(PARTS, 0.0))
        near = _resident(recurrent, 2 * gates, machine) * (1 - 1 / problem.steps)
        for depth, wide in backs:
            _gemm(cost, "recurrent GEMM", problem, machine, problem.steps, share.rows, depth, wide, near, far)
        wide = -(-x_vectors // share.grid[2])
        _gemm(cost, "input GEMM", problem, machine, chunks, every / chunks, k, wide, 0.0, farther)
        # The projection's rows are H long, but there are fewer of them.
        operands = sum(stage.k * stage.gates for stage in problem.stages) / problem.gates / problem.lanes
        panels = (x_vectors + operands) / problem.panel
        tiles = problem.gates * share.shared * panels
        blocks = -(-everybody // share.block)
        inner = everybody / blocks
        _tiles(
            cost, "weights", machine, tiles * blocks, problem.lanes, problem.tile, problem.panel * inner,
            problem.panel * inner * problem.vector, machine.near,
        )  # fmt: skip
        # Packing what they are multiplied with, which each member does for itself, and the sums of the biases.
        cost["weights"] += everybody * panels * problem.panel * problem.vector / _stream(problem, 1, machine)
        cost["weights"] += everybody * share.shared * problem.slots * 4 * machine.instruction
        cost["cell"] = every * (share.units * problem.operations * machine.instruction + machine.row)
        cost["cell"] += problem.steps * machine.step + machine.layer
        read = 2 * problem.states + problem.kept + problem.slots
        rate = _stream(problem, read, machine)
        sums = tiles * problem.lanes * problem.panel * problem.vector
        cost["memory"] = (every * share.units * problem.vector * read + (2 * blocks - 1) * sums) / rate
        meetings = problem.steps * len(problem.stages) * (share.grid[2] > 1)
        meetings += 2 * blocks * (share.num_threads > share.grid[0])
        cost["barriers"] = meetings * machine.barrier
        yield number, cost


def _back(problem: Problem, share: Share, number: int) -> tuple[int, int]:
    """Of a stage's GEMM in backward: the elements of its rows of gradients, and vectors of its operand's units."""
    stage = problem.stages[number]
    own = -(-problem.stages[0].k // problem.lanes) if stage.projects else problem.units
    return own * stage.gates * problem.lanes, share.units if number else share.outs


def _gemm(
    cost: Cost, part: str, problem: Problem, machine: Machine, times: int, rows: float, k: int, columns: int,
    near: float, far: float,
) -> None:  # fmt: skip
    """So many GEMMs of these rows with weights of which the part ``near`` is in the second-level cache."""
    panels, bytes_ = columns / problem.panel, k * problem.panel * problem.vector
    rate = 1 / (near / machine.near + (1 - near) / far)
    _tiles(cost, part, machine, times * panels, rows, problem.tile, problem.panel * k, bytes_, rate)


def _tiles(
    cost: Cost, part: str, machine: Machine, panels: float, rows: float, most: int, multiplied: float, bytes_: float,
    rate: float,
) -> None:  # fmt: skip
    """Rows against panels: the first tiles fetch the next panel at that rate, all read theirs from the near cache."""
    count = ceil(rows / most)
    fma = rows / count * multiplied / machine.fma
    later = max(0.0, bytes_ / machine.near - fma)
    afar = bytes_ / rate - bytes_ / machine.near
    first = later + max(_EXPOSED * afar, bytes_ / rate - min(count, _PREFETCHING) * (fma + later))
    cost[part] += panels * count * (fma + machine.tile)
    cost["weights"] += panels * (first + (count - 1) * later)


def _resident(size: int, beside: int, machine: Machine) -> float:
    """Which part of so many bytes, read again and again, stays in the second-level cache."""
    return min(1.0, max(0.0, (_FREE * machine.near_size - beside) / size))


def _far(problem: Problem, share: Share, features: int, machine: Machine) -> float:
    """Bytes a second at which weights come that are not near: of all directions at work, if the caches hold them."""
    weights = (features + problem.stages[0].k) * problem.units * problem.gates * problem.vector * share.grid[0]
    return machine.far if weights <= machine.far_size else machine.memory


def _stream(problem: Problem, vectors: int, machine: Machine) -> float:
    """Bytes a second of data that is there once, so many vectors for each one of units: from where it has room."""
    size = problem.steps * problem.batch * problem.units * problem.vector * vectors
    size *= problem.directions * len(problem.inputs)
    return machine.far if size <= machine.far_size // 2 else machine.memory / _TRIPS
