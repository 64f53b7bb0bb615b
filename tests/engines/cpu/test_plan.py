"""How a problem is divided among threads: the grids, what the cost model predicts of them, no influence on bits."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu.plan import plans
from fusedrnn.engines.cpu.plan.cost import COST_TERMS, predict_cost
from fusedrnn.engines.cpu.plan.partition import force_grid, possible_grids
from fusedrnn.engines.cpu.plan.sizes import LargestShare, ProblemSize, ThreadGrid, reads_unpacked
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.tuning import MachineModel, Tuning
from fusedrnn.jit.host import current_target
from fusedrnn.jit.target import ITEM_SIZE, is_x86, known_targets
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES
from problems import Shape, assert_same_bits, make_problem

PHASES = "inference", "training", "backward"
MACHINE = MachineModel(
    fma_rate=4e9, l2_bandwidth=120e9, l3_bandwidth=70e9, memory_bandwidth=10e9, l2_bytes=1 << 20, l3_bytes=32 << 20,
    instruction=0.3e-9,
)  # fmt: skip
"""A model that does not depend on the machine that runs the tests."""
TUNING = Tuning(machine=MACHINE, l2_bytes=1 << 20)
SLOW_L3 = replace(TUNING, machine=replace(MACHINE, l3_bandwidth=7e9))


def largest_share(problem, grid):
    return LargestShare.of(problem, ThreadGrid(*grid), TUNING)


def problem_size(case, mode, target, phase):
    return ProblemSize(case.spec(mode), target, case.T, case.N, phase, TUNING)


def cost(case, mode, target, phase, grid=(1, 1, 1), machine=MACHINE, **options):
    problem = problem_size(case, mode, target, phase)
    return predict_cost(problem, largest_share(problem, grid), machine, **options)


def make_plan(phase, mode, target, case, threads, tuning=TUNING, **options):
    return plans.make_plan(case.spec(mode), target, case.T, case.N, threads, phase, tuning=tuning, **options)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 96])
@pytest.mark.parametrize("directions", [1, 2])
def test_grids_of_any_number_of_threads(threads, directions, target):
    spec = RNNSpec("gru", 3, 3 * target.lanes("float32"), bidirectional=directions == 2)
    grids = possible_grids(ProblemSize(spec, target, 20, 5, "inference"), threads, TUNING)
    assert grids[0] == (1, 1, 1) and len(set(grids)) == len(grids)
    for grid in grids:
        assert math.prod(grid) <= threads
        assert grid[0] in (1, directions) and grid[1] <= 5 and grid[2] <= 3
    if threads == 2:
        assert set(grids) == {(1, 1, 1), (1, 2, 1), (1, 1, 2)} | ({(2, 1, 1)} if directions == 2 else set())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", PHASES)
def test_cost_of_a_large_problem_is_close_to_its_multiply_adds(mode, phase, target):
    case = CASES["large"]
    predicted = cost(case, mode, target, phase)
    assert set(predicted) == set(COST_TERMS) and all(seconds >= 0 for seconds in predicted.values())
    assert predicted.total == pytest.approx(sum(predicted.values()))
    lanes = target.vector_bits // 8 // ITEM_SIZE["float32"]
    spec = case.spec(mode)
    flops = spec.flops(case.T, case.N)
    if phase == "backward":
        flops = spec.flops(case.T, case.N, training=True) - flops
    least = flops / (2 * lanes * MACHINE.fma_rate)
    assert least * 0.99 < predicted.total < least * 1.6
    assert predicted["barriers"] == 0


@pytest.mark.skipif(not is_x86(), reason="AMX is an extension of x86")
@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_tiles_take_less_time(compute):
    """More products at once, and more rows for each time that a panel is read."""
    spec = replace(CASES["large"].spec("lstm"), compute=compute)
    costs = []
    for name in ("avx512-amx", "avx512-bf16"):
        (target,) = (target for target in known_targets() if target.name == name)
        problem = ProblemSize(spec, target, CASES["large"].T, CASES["large"].N)
        slow_l2 = replace(MACHINE, l2_bandwidth=1e9, l3_bandwidth=1e9)
        costs.append([predict_cost(problem, largest_share(problem, (1, 1, 1)), model) for model in (MACHINE, slow_l2)])
    (tiles, tiles_slow_l2), (vectors, vectors_slow_l2) = costs
    assert 5 * tiles["recurrent GEMM"] < vectors["recurrent GEMM"]
    assert 3 * tiles_slow_l2["weights"] < vectors_slow_l2["weights"]


@pytest.mark.skipif(not is_x86(), reason="AMX is an extension of x86")
@pytest.mark.parametrize(("batch", "ratio"), [(64, 1 / 8), (1, 1 / 16)])
def test_tiles_multiply_weight_gradients(batch, ratio):
    """Eight times as fast as vectors, which multiply only rows of the same step by one instruction."""
    spec = RNNSpec("lstm", 1024, 1024, compute="bfloat16")
    rates = dict.fromkeys(("l2_bandwidth", "l3_bandwidth", "memory_bandwidth"), 1e15)
    fast = replace(MACHINE, **rates, instruction=0.0, tile=0.0)
    costs = []
    for name in ("avx512-amx", "avx512-bf16"):
        (target,) = (target for target in known_targets() if target.name == name)
        problem = ProblemSize(spec, target, 64, batch, "backward")
        costs.append(predict_cost(problem, largest_share(problem, (1, 1, 1)), fast)["weights"])
    assert costs[0] / costs[1] == pytest.approx(ratio, rel=0.05)


@pytest.mark.skipif(not is_x86(), reason="AMX is an extension of x86")
def test_tiles_have_longer_chunks_where_weights_leave_l2():
    """They read the input weights less often; where these stay in L2, the gates of a short chunk do so beside them."""
    (amx,) = (target for target in known_targets() if target.has_tiles)

    def chunk_rows(case, compute, phase="inference"):
        spec = replace(CASES[case].spec("lstm"), compute=compute)
        problem = ProblemSize(spec, amx.for_compute(spec.operand_format), CASES[case].T, CASES[case].N, phase)
        return LargestShare.of(problem, ThreadGrid(1, 1, 2), Tuning(l2_bytes=2 << 20)).chunk * CASES[case].N

    assert chunk_rows("large", "bfloat16") == 192  # 8 KiB each
    assert chunk_rows("large", None) == chunk_rows("large", "bfloat16", "backward") == 64
    assert chunk_rows("small", "bfloat16") == chunk_rows("small", None) == 96


@pytest.mark.parametrize("phase", PHASES)
def test_two_threads_halve_the_cost(phase, target):
    case = CASES["large"]
    alone = cost(case, "lstm", target, phase).total
    for grid in ((1, 2, 1), (1, 1, 2)):
        assert 0.45 * alone < cost(case, "lstm", target, phase, grid).total < 0.65 * alone
    both = cost(case, "lstm", target, phase, (1, 1, 2))
    assert both["barriers"] >= case.T * MACHINE.barrier


def test_largest_share_is_rounded_up(target):
    case = replace(CASES["large"], N=7)
    assert largest_share(problem_size(case, "lstm", target, "inference"), (1, 2, 1)).rows == 4
    uneven = replace(case, H=3 * target.lanes("float32"))
    assert largest_share(problem_size(uneven, "lstm", target, "inference"), (1, 1, 2)).unit_vecs == 2


def test_small_problems_do_not_wake_sleeping_threads(target):
    case = CASES["tiny"]
    for phase in PHASES:
        asleep, spinning = (cost(case, "gru", target, phase, (1, 2, 1), spinning=spins) for spins in (False, True))
        assert asleep["call"] - spinning["call"] == pytest.approx(MACHINE.wake_sleeping - MACHINE.wake_spinning)
    little = replace(case, T=2, N=2)
    assert make_plan("inference", "gru", target, little, 2).num_threads == 1
    large = CASES["large"]
    assert make_plan("inference", "gru", target, large, 2).num_threads == 2


def test_few_rows_of_large_weights_are_divided_by_units(target):
    """Each thread would stream all weights for half as many rows; divided by units, it streams half of them."""
    case = replace(CASES["ds2"], N=4)
    assert make_plan("inference", "lstm", target, case, 2, SLOW_L3).grid == (1, 1, 2)


def test_many_rows_of_small_weights_are_divided_by_rows(target):
    case = CASES["small"]
    assert make_plan("inference", "lstm", target, case, 2, spinning=True).grid == (1, 2, 1)


def test_each_direction_runs_on_its_own_thread(target):
    """They need no barrier, and each thread streams the weights of one direction for all rows."""
    case = replace(CASES["bi2"], N=4)
    assert make_plan("inference", "lstm", target, case, 2).grid == (2, 1, 1)


@pytest.mark.parametrize("phase", PHASES)
def test_cost_model_uses_the_share_and_chunk_of_the_plan(phase, target):
    for case in CASES.values():
        problem = problem_size(case, "gru", target, phase)
        for grid in possible_grids(problem, 4, TUNING):
            with force_grid(grid):
                plan = make_plan(phase, "gru", target, case, 4)
            assert plan.share == largest_share(problem, grid) and plan.num_threads == math.prod(grid)
            rows, units = (max(b - a for a, b in pairwise(s)) for s in (plan.row_starts, plan.bounds["unit_starts"]))
            assert (plan.share.rows, plan.share.unit_vecs) == (rows, units)


def test_force_grid_lasts_for_its_block(target):
    case = CASES["small"]
    chosen = make_plan("inference", "gru", target, case, 2).grid
    with force_grid((1, 1, 2)):
        assert make_plan("inference", "gru", target, case, 2).grid == (1, 1, 2)
        assert make_plan("inference", "gru", target, case, 1).grid == (1, 1, 1)
    with force_grid((2, 1, 1)):  # it has one direction
        assert make_plan("inference", "gru", target, case, 2).grid == chosen
    assert make_plan("inference", "gru", target, case, 2).grid == chosen


@pytest.mark.parametrize("mode", ["gru", "lstm"])
def test_bits_do_not_depend_on_the_plan(mode):
    problem = make_problem(mode, Shape(7, 5, 9, 70, layers=2, bidirectional=True, lengths="edges"))
    results = []
    for grid in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 1, 3), (2, 2, 1), (2, 1, 2), (1, 2, 2)):
        op = RNNOp(problem.spec)
        with force_grid(grid), fusedrnn.thread_limits(math.prod(grid)):
            y, states, reserve = op.forward(
                problem.x, problem.params, problem.states, training=True, lengths=problem.lengths
            )
            dx, dparams, dstates = op.backward(np.ones_like(y), None, reserve)
        results.append((y, states, dx, dparams, dstates))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("lengths", ["full", "edges"])
@pytest.mark.parametrize("mode", ["gru", "lstm"])
def test_pipelined_layers_have_the_bits_of_sequential_layers(mode, lengths, poisoned):
    """Fewer groups than layers and as many, with rows and with units divided, too."""
    problem = make_problem(mode, Shape(21, 5, 9, 70, layers=3, lengths=lengths))
    results = []
    for grid in ((1, 1, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2)):
        op = RNNOp(problem.spec)
        with force_grid(grid), fusedrnn.thread_limits(math.prod(grid)):
            for _ in range(3):
                inferred, final, _ = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
                y, states, reserve = op.forward(
                    problem.x, problem.params, problem.states, training=True, lengths=problem.lengths
                )
                dx, dparams, dstates = op.backward(problem.dy, problem.dstates, reserve)
                results.append((inferred, final, y, states, dx, dparams, dstates))
        assert {planned.args.plan.grid for planned in op.by_address()._planned.values()} == {grid}
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("phase", PHASES)
def test_layers_are_pipelined_if_nothing_else_can_be_divided(phase, target):
    """One sequence, one unit vector, one direction: there is nothing to divide but layers."""
    case = replace(CASES["seq1"], T=320, I=1, H=target.lanes("float32"), layers=4)
    plan = make_plan(phase, "lstm", target, case, 2, spinning=True)
    assert plan.grid == (2, 1, 1) and plan.share.chunk * 16 <= case.T + 16
    alone = cost(case, "lstm", target, phase).total
    assert 0.5 * alone < cost(case, "lstm", target, phase, (2, 1, 1), spinning=True).total < 0.7 * alone
    both = replace(case, bidirectional=True)
    assert make_plan(phase, "lstm", target, both, 2, spinning=True).share.chunk > plan.share.chunk


@pytest.mark.parametrize("training", [False, True])
def test_small_calls_read_unpacked_weights(training):
    tiling, tuning = Tiling(RNNSpec("gru", 16, 16), current_target()), Tuning()
    assert reads_unpacked(tiling, 1, 64, training, tuning) and reads_unpacked(tiling, 50, 64, training, tuning)
    assert not reads_unpacked(tiling, 320, 64, training, tuning)
    # Packing takes a part of training that grows with the weights only, transposing one that grows with the rows too.
    assert reads_unpacked(tiling, 100, 512, training, tuning) is not training


@pytest.mark.parametrize("training", [False, True])
def test_steps_read_unpacked_weights(training):
    tiling, tuning = Tiling(RNNSpec("lstm", 1024, 1024), current_target()), Tuning()
    assert reads_unpacked(tiling, 1, 64, training, tuning)
    assert not reads_unpacked(tiling, 5, 64, training, tuning)


def test_frozen_parameters_are_planned_as_packed(target):
    """Also those of a short call, in the first call and in the cached ones, inference and training."""
    spec, rng = RNNSpec("gru", 8, 16), np.random.default_rng(0)
    params, x = fusedrnn.init_params(spec, rng), rng.standard_normal((1, 2, 8), np.float32)
    for given, packed in ((params, False), (fusedrnn.frozen(params), True)):
        op = RNNOp(spec)
        executor = op.by_address()
        for _ in range(3):
            y, _, reserve = op.forward(x, given, training=True)
            op.backward(np.ones_like(y), None, reserve)
            op.forward(x, given)
            for job in ("inference", "training", "backward"):
                problem = executor._planned[job].problem
                assert problem.packed is packed, (job, packed)
    case = replace(CASES["stream1"], N=16, I=512, H=512)
    unpacked, packed = (make_plan("training", "lstm", target, case, 1, packed=packed) for packed in (False, True))
    assert packed.workspace.size < unpacked.workspace.size


@pytest.mark.parametrize("phase", PHASES)
def test_threads_divide_the_units_of_a_step(phase, target):
    """Each thread packs parts of the weights of its own units; threads that divide the rows would all pack all."""
    case = replace(CASES["stream1"], N=16, I=512, H=512)
    assert make_plan(phase, "lstm", target, case, 2, spinning=True).grid == (1, 1, 2)
