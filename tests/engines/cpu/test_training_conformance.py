"""Gradients of the engines against torch.nn and the reference: every mode, depth, direction, size, target, count."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import fusedrnn
from conformance import TRAINING_SHAPES, AnyTrainingShape, TrainingConformance
from fusedrnn import RNNOp
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.runtime import buffers
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.testing.cases import ODD_SIZES

pytestmark = [pytest.mark.usefixtures("poisoned", "use_all_threads"), pytest.mark.pairwise]


def train(spec, x, params, states, lengths, keep, seed, backend="cpu"):
    """One call of a new op, and its backward."""
    op = RNNOp(spec, backend)
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=keep, seed=seed)
    return y, final, partial(op.backward, reserve=reserve)


class TestEngine(TrainingConformance):
    @pytest.fixture(autouse=True, params=[1, 2, 3], ids="{}threads".format)
    def threads(self, request, target):
        with fusedrnn.thread_limits(request.param):
            yield

    def train(self, *arguments):
        return train(*arguments)


class TestBlocks(TestEngine):
    """GEMMs of few rows: every sequence takes several, of each kind."""

    @pytest.fixture(autouse=True)
    def chunks(self, small_chunks):
        pass

    @pytest.fixture(autouse=True, params=[2], ids="{}threads".format)
    def threads(self, request, target):
        with fusedrnn.thread_limits(request.param):
            yield


class TestReference(TrainingConformance):
    keeps = ("gates",)  # it makes no difference there

    def train(self, *arguments):
        return train(*arguments, backend="reference")


class TestAnyShape(AnyTrainingShape):
    @pytest.fixture(autouse=True, params=[1, 3], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield

    def train(self, *arguments):
        return train(*arguments)


class TestBlocksOfAnyShape(TestAnyShape):
    @pytest.fixture(autouse=True)
    def chunks(self, small_chunks):
        pass

    @pytest.fixture(autouse=True, params=[2], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield


def plans(mode, dtype, target):
    """The backward plans of the suite on packed weights: calls on unpacked ones use one thread."""
    packed = replace(tuning.current(), max_unpacked_reads_training=0)
    for shape in TRAINING_SHAPES:
        sizes = shape.spec(mode, dtype), target, shape.T, shape.N
        for threads in (1, 2, 3):
            yield shape, make_plan(*sizes, threads, "backward", tuning=packed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_use_every_kind_of_grid(mode, dtype, target):
    """Each kind of grid is among the plans of the suite, with padding and without."""
    grids = {(plan.grid, shape.lengths not in ("full", "none")) for shape, plan in plans(mode, dtype, target)}
    kinds = {grid for grid, _ in grids}
    assert kinds == {(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 1, 3)}
    assert {grid for grid, padded in grids if padded} == kinds


@pytest.mark.parametrize("mode", MODES)
def test_cases_have_many_chunks_and_blocks(mode, target, small_chunks):
    """With few rows in each: chunks of one step and of several, blocks of one chunk and of several, parts of blocks."""
    kinds = set()
    for shape, plan in plans(mode, "float32", target):
        inner = plan.workspace.fields["inner"]
        kinds |= {
            ("chunks", plan.share.chunk > 1, plan.share.chunk < shape.T),
            ("blocks", plan.share.block > plan.share.chunk, plan.share.block < shape.T),
            ("at once", plan.share.block * shape.N > inner),
        }
    some = {("chunks", wide, many) for wide in (False, True) for many in (False, True)}
    some |= {("blocks", wide, many) for wide in (False, True) for many in (False, True)}
    assert kinds == some | {("at once", False), ("at once", True)}


def test_cases_have_every_odd_size_in_every_dimension():
    for place in "TNIH":
        assert {getattr(shape, place) for shape in TRAINING_SHAPES} >= set(ODD_SIZES)
    depths = {(shape.layers, shape.bidirectional) for shape in TRAINING_SHAPES}
    assert depths == {(layers, way) for layers in (1, 2, 3, 4) for way in (False, True)}


def test_poisoned_fixture_fills_returned_buffers():
    """The fixture does what the suite relies on, for memory that was used before as well."""
    pool = buffers.BufferPool(4)
    for _ in range(2):
        lease = pool.lease(64)
        assert np.isnan(lease.buffer.view(np.float32)).all()
        lease.buffer[:] = 0
        del lease
