"""What tests share: kernels cached for the session only, every target, poisoned memory, threads for any size."""

import ctypes
import gc
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

import pairwise
import process_state
import quick_compiler
from fusedrnn.engines.cpu import tuning
from fusedrnn.jit import compiler
from fusedrnn.jit.host import current_target
from fusedrnn.runtime import buffers, thread_pool

process_state.reset()

# How long an example takes is no property of the code under test.
settings.register_profile("fusedrnn", deadline=None)
settings.load_profile("fusedrnn")

_ONES = 0xFF  # floats of any size that consist of this byte are NaN, and integers are -1


# Folders whose tests start processes and take long. The last files should be short, so that all workers end together.
_FIRST = {"examples", "keras", "torch"}


def pytest_collection_modifyitems(config, items):
    """Leave out cases that add nothing to what the markers of :mod:`pairwise` ask for; ``--all-cases`` keeps them."""
    items.sort(key=lambda item: item.path.parent.name not in _FIRST)
    if not config.getoption("all_cases"):
        items[:], left_out = pairwise.reduce(items)
        config.hook.pytest_deselected(items=left_out)


def pytest_addoption(parser):
    """Add ``--all-cases``."""
    parser.addoption("--all-cases", action="store_true", help="run every case, and optimize all kernels")


# The tests compare with functions that XLA compiles, each for one call: compiling takes longer than all else.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# Processes that share the tests share the processors, too: so torch's threads sleep while they wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="module", autouse=True)
def settled():
    """Freeze what exists before a file's tests, which start many garbage collections: these then skip it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(request, tmp_path_factory, worker_id):
    """A cache of compiled kernels for this session, so that tests neither read nor fill the user's.

    Many of them are compiled without optimization; see :mod:`quick_compiler`.
    """
    base = tmp_path_factory.getbasetemp()
    # Processes that share the tests share the cache; FUSEDRNN_TEST_CACHE_DIR keeps it from one run to the next.
    lasting = os.environ.get("FUSEDRNN_TEST_CACHE_DIR")
    folder = Path(lasting) if lasting else (base if worker_id == "master" else base.parent) / "kernels"
    folder.mkdir(0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDRNN_CACHE_DIR", str(folder))
        all_optimized = request.config.getoption("all_cases")
        patch.setattr(
            compiler, "compile_module", partial(quick_compiler.compile_module, all_optimized=all_optimized)
        )
        yield folder


@pytest.fixture(scope="session", autouse=True)
def packed_weights():
    """Small problems use packed weights too, as large ones do; tests of unpacked weights have a tuning of their own."""
    with tuning.tuned(max_unpacked_floats=0, max_unpacked_floats_training=0, max_own_work=0):
        yield


@pytest.fixture(params=pairwise.target_names())
def target(request, monkeypatch):
    """Each target in turn, in force."""
    monkeypatch.setenv("FUSEDRNN_TARGET", request.param)
    return current_target()


@pytest.fixture
def traced(monkeypatch):
    """All buffers are NumPy's: tracemalloc knows their memory, but not memory in huge pages."""
    monkeypatch.setattr(buffers, "aligned_empty", partial(buffers.aligned_empty, min_huge=sys.maxsize))


@pytest.fixture
def poisoned(monkeypatch):
    """New arrays, packed weights, reserves and scratch begin as NaN: what is read before it is written shows."""
    plain_empty, plain_aligned = np.empty, buffers.aligned_empty
    plain_acquire, plain_lease = buffers.ScratchPool.acquire, buffers.BufferPool.lease

    def fill(array):
        if array.dtype.kind in "biuf":
            ctypes.memset(array.ctypes.data, _ONES, array.nbytes)
        return array

    def empty(*args, **options):
        return fill(plain_empty(*args, **options))

    def aligned_empty(shape, dtype):
        return fill(plain_aligned(shape, dtype))

    def acquire(self, size):
        scratch = plain_acquire(self, size)
        fill(scratch.buffer)
        return scratch

    def lease(self, size):
        lent = plain_lease(self, size)
        fill(lent.buffer)  # also if it has been leased before
        return lent

    monkeypatch.setattr(np, "empty", empty)
    for module in (buffers, thread_pool):
        monkeypatch.setattr(module, "aligned_empty", aligned_empty)
    monkeypatch.setattr(buffers.ScratchPool, "acquire", acquire)
    monkeypatch.setattr(buffers.BufferPool, "lease", lease)


@pytest.fixture
def use_all_threads():
    """Plans that use all threads for any problem, however small, and are the same on every machine."""

    def choose(problem, grids):
        """Split directions, or layers if there are few rows; then rows if they are many and weights few; else units."""
        groups = problem.spec.num_directions > 1 or problem.batch < 2 * problem.rows_per_tile
        layer_dirs = max(grid.layer_dirs for grid in grids) if groups else 1
        threads = max(grid.rows for grid in grids)
        weights = problem.hidden * problem.unit_vecs * problem.num_gates * problem.vector_bytes
        by_rows = weights <= 1 << 19 and problem.batch >= threads * problem.rows_per_tile
        fitting = [grid for grid in grids if grid.layer_dirs == layer_dirs and grid[2 if by_rows else 1] == 1]
        return max(fitting, key=lambda grid: grid.rows * grid.units)

    with tuning.tuned(choose_grid=choose, l2_bytes=1 << 20):
        yield


@pytest.fixture
def small_chunks():
    """Chunks of a few rows, so that short sequences have many."""
    with tuning.tuned(min_chunk_rows=5, max_chunk_rows=5, min_dx_chunk_rows=5, block_rows=13, gemm_rows=7):
        yield


@pytest.fixture
def runs(monkeypatch):
    """The specs of the operator's calls from PyTorch, in the order of the calls."""
    from torch_calls import record_calls

    seen = []
    record_calls(monkeypatch, seen)
    return seen
