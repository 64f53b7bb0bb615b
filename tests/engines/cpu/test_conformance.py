"""The engine against torch.nn and the reference: every mode, depth, direction, odd size, target, thread count."""

import numpy as np
import pytest

import fusedrnn
from conformance import SHAPES, AnyShape, Conformance
from fusedrnn import RNNOp
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.runtime import buffers
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.testing.cases import ODD_SIZES
from oracles import expected
from problems import assert_close, make_problem

pytestmark = [pytest.mark.usefixtures("poisoned", "use_all_threads"), pytest.mark.pairwise]


def run(spec, x, params, states, lengths):
    """One call of a new op, whose plan no other call has made."""
    y, after, reserve = RNNOp(spec).forward(x, params, states, lengths=lengths)
    assert reserve is None
    return y, after


class TestEngine(Conformance):
    @pytest.fixture(autouse=True, params=[1, 2, 3], ids="{}threads".format)
    def threads(self, request, target):
        with fusedrnn.thread_limits(request.param):
            yield

    def run(self, *arguments):
        return run(*arguments)


class TestChunks(TestEngine):
    """Input GEMMs of few rows: every sequence takes several."""

    @pytest.fixture(autouse=True)
    def chunks(self, small_chunks):
        pass

    @pytest.fixture(autouse=True, params=[2], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield


class TestAnyShape(AnyShape):
    @pytest.fixture(autouse=True, params=[1, 3], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield

    def run(self, *arguments):
        return run(*arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_use_every_kind_of_grid(mode, dtype, target):
    """Each kind of grid is among the plans of the suite, the shared ones with and without padding."""
    grids = set()
    for shape in SHAPES:
        for threads in (1, 2, 3):
            plan = make_plan(shape.spec(mode, dtype), target, shape.T, shape.N, threads)
            grids.add((plan.grid, shape.lengths not in ("full", "none")))
    kinds = {grid for grid, _ in grids}
    assert kinds == {(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 1, 3)}
    assert {grid for grid, padded in grids if padded} == kinds


def test_cases_have_every_odd_size_in_every_dimension():
    for size_name in "TNIH":
        assert {getattr(shape, size_name) for shape in SHAPES} >= set(ODD_SIZES)
    stacks = {(shape.layers, shape.bidirectional) for shape in SHAPES}
    assert stacks == {(layers, bidirectional) for layers in (1, 2, 3) for bidirectional in (False, True)}
    for layers in (1, 2, 3):
        assert {shape.lengths == "full" for shape in SHAPES if shape.layers == layers} == {True, False}


@pytest.mark.parametrize("shape", [(4, (2, 1, 2)), (5, (2, 2, 1))], ids=str)
def test_directions_are_divided_again(shape, target):
    """More threads than directions: each direction is split once more."""
    threads, grid = shape
    case = SHAPES[13] if grid[2] > 1 else SHAPES[10]
    problem = make_problem("gru", case)
    assert make_plan(problem.spec, target, case.T, case.N, threads).grid == grid
    with fusedrnn.thread_limits(threads):
        result = run(problem.spec, problem.x, problem.params, problem.states, problem.lengths)
    assert_close(result, expected("gru", case)[0], "float32", problem.spec)


def test_poisoned_fixture_fills_memory_with_nan():
    """The fixture does what the suite relies on."""
    assert np.isnan(np.empty(3, np.float32)).all()
    assert np.isnan(buffers.aligned_empty((3,), np.float64)).all()
    assert bytes(buffers.ScratchPool().acquire(64).buffer) == b"\xff" * 64
