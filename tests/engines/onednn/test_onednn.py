"""The engine on oneDNN: the conformance suite, variants, threads, caches, and how it is refused."""

import ctypes
import multiprocessing
import os
import threading
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from itertools import cycle, product

import numpy as np
import pytest

import fusedrnn
from conformance import REQUESTS, AnyShape, AnyTrainingShape, Conformance, TrainingConformance
from fusedrnn import RNNOp, RNNSpec, frozen
from fusedrnn.engines import registry
from fusedrnn.engines.onednn import library, param_layout, threads, weights
from fusedrnn.engines.onednn.engine import MAX_PROGRAMS
from fusedrnn.engines.onednn.program import Program
from fusedrnn.spec import MODES
from oracles import absences, without
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import VARIANTS, possible, variant_results, variant_results_by_absence, variant_spec


@cache
def missing():
    """Why the library cannot be loaded, or None."""
    try:
        library.load()
    except ImportError as error:
        return str(error)
    return None


@pytest.fixture
def onednn():
    """The library; without it, the test is skipped."""
    if missing():
        pytest.skip(missing())
    return library.load()


def full(shape):
    """The same shape without lengths, which oneDNN does not support."""
    return replace(shape, lengths="full")


def shorter(shape):
    """The same shape with at most 63 steps, without lengths: over more steps, a ReLU's gradients underflow."""
    return replace(full(shape), T=min(shape.T, 63))


def train(spec, x, params, states, lengths, save, seed):
    op = RNNOp(spec, "onednn")
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=save)
    return y, final, partial(op.backward, reserve=reserve)


@pytest.mark.usefixtures("onednn", "poisoned")
class TestInference(Conformance):
    dtypes = ("float32",)
    fit = staticmethod(full)

    @pytest.fixture(autouse=True, params=[1, 2], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield

    def run(self, spec, x, params, states, lengths):
        y, final, reserve = RNNOp(spec, "onednn").forward(x, params, states, lengths=lengths)
        assert reserve is None
        return y, final


@pytest.mark.usefixtures("onednn", "poisoned")
class TestInferenceOnAnyShape(AnyShape):
    dtypes = ("float32",)
    fit = staticmethod(full)
    run = TestInference.run


@pytest.mark.usefixtures("onednn", "poisoned")
class TestTraining(TrainingConformance):
    dtypes, keeps = ("float32",), ("gates",)
    fit = staticmethod(shorter)
    train = staticmethod(train)
    test_dropout = None

    @pytest.fixture(autouse=True, params=[1, 2], ids="{}threads".format)
    def threads(self, request):
        with fusedrnn.thread_limits(request.param):
            yield


@pytest.mark.usefixtures("onednn", "poisoned")
class TestTrainingOnAnyShape(AnyTrainingShape):
    dtypes, keeps = ("float32",), ("gates",)
    fit = staticmethod(full)
    train = staticmethod(train)
    drops = False


SUPPORTS = registry.find("onednn").capabilities
SUPPORTED_VARIANTS = [name for name in VARIANTS if SUPPORTS.missing(variant_spec(name, 4, 6)) == []]
# A primitive for all layers, one for the first layer and one for the rest, and one for each bidirectional layer.
VARIANT_SHAPES = (
    Shape(5, 3, 4, 6),
    Shape(6, 17, 5, 33, bidirectional=True),
    Shape(4, 2, 5, 4, layers=3, states=False),
    Shape(4, 3, 17, 17, layers=3),
    Shape(3, 2, 4, 17, layers=3, bidirectional=True),
)


def test_supported_variants():
    assert {"projection", "peepholes", "reset-before", "gru-single-bias", "vanilla-no-bias"} <= set(SUPPORTED_VARIANTS)
    assert not {"coupled", "state-clip", "lstm-gate-clip", "gru-activations"} & set(SUPPORTED_VARIANTS)


def check_variant(problem):
    spec, (steps, batch) = problem.spec, problem.x.shape[:2]
    op = RNNOp(spec, "onednn")
    y, final, _ = op.forward(problem.x, problem.params, problem.states)
    widest = max(spec.layer_input_size(layer) for layer in range(spec.num_layers))
    if not spec.reset_after and widest > spec.hidden_size:
        assert_close((y, final), variant_results(problem).forward, "float32", spec)
        for call in (partial(op.forward, problem.x, problem.params, training=True), partial(op.compile, training=True)):
            with pytest.raises(NotImplementedError, match=r"reset_after=False where a layer reads .* engine 'onednn'"):
                call()
        return
    results = op.forward(problem.x, problem.params, problem.states, training=True)
    for absent, expected in variant_results_by_absence(problem, absences(spec)).items():
        assert_close((y, final), expected.forward, "float32", spec)
        assert_close(results[:2], expected.forward, "float32", spec)
        actual = op.backward(*without(spec, problem.dy, problem.dstates, absent), results[2])
        assert_gradients_close(actual, expected.gradients, "float32", spec, steps, batch)


@pytest.mark.usefixtures("onednn", "poisoned")
@pytest.mark.parametrize("shape", VARIANT_SHAPES, ids=str)
@pytest.mark.parametrize("name", SUPPORTED_VARIANTS)
def test_variants(name, shape):
    assert possible(name, shape.H)
    check_variant(problem_of(variant_spec(name, shape.I, shape.H, shape.layers, shape.bidirectional), shape))


@pytest.mark.usefixtures("onednn", "poisoned")
@pytest.mark.parametrize("options", [{}, {"projection_size": 5}, {"projection_size": 5, "peepholes": True}], ids=str)
@pytest.mark.parametrize("inputs", [4, 5])
def test_projections_in_one_stack(options, inputs):
    """Layers whose input is as large as their output are one primitive."""
    shape = Shape(4, 3, inputs, 9, layers=3)
    check_variant(problem_of(RNNSpec("lstm", inputs, 9, 3, **options), shape))


@pytest.mark.usefixtures("onednn", "poisoned")
@pytest.mark.parametrize("mode", MODES)
def test_reverse(mode):
    shape = Shape(6, 4, 3, 5, layers=2)
    check_variant(problem_of(RNNSpec(mode, 3, 5, 2, reverse=True), shape))


def test_stacks():
    def stacks(*sizes, **options):
        spec = RNNSpec("lstm", *sizes, **options)
        return [(stack.first, stack.layers, stack.inputs) for stack in param_layout.stacks(spec)]

    assert stacks(4, 4, 3) == [(0, 3, 4)]
    assert stacks(5, 4, 3) == [(0, 1, 5), (1, 2, 4)]
    assert stacks(5, 4) == [(0, 1, 5)]
    assert stacks(2, 4, 3, projection_size=2) == [(0, 3, 2)]
    assert stacks(4, 2, 2, bidirectional=True) == [(0, 1, 4), (1, 1, 4)]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_strides(mode):
    """Whatever the strides of x, out, dy and dx, the bits are the same."""
    shape = Shape(4, 3, 5, 6, layers=2)
    problem = problem_of(shape.spec(mode), shape)
    op = RNNOp(problem.spec, "onednn")

    def strided(array):
        wider = np.full((*array.shape[:2], array.shape[2] + 3), np.nan, array.dtype)
        wider[:, :, : array.shape[2]] = array
        return wider[:, :, : array.shape[2]]

    x, out, dy, dx = (strided(array) for array in (problem.x, problem.dy, problem.dy, problem.x))
    expected = op.forward(problem.x, problem.params, problem.states)[:2]
    y, final, _ = op.forward(x, problem.params, problem.states, out=out)
    assert y is out
    assert_same_bits((y, final), expected)
    gradients = []
    for x_array, dx_out, dy_array in ((problem.x, None, problem.dy), (x, (dx, None, None), dy)):
        _, _, reserve = op.forward(x_array, problem.params, problem.states, training=True)
        gradients.append(op.backward(dy_array, problem.dstates, reserve, out=dx_out))
    assert gradients[1][0] is dx
    assert_same_bits(*gradients)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_later_changes_do_not_affect_gradients(mode):
    """Changes of arguments and results, other calls, and an earlier backward call."""
    shape = Shape(5, 3, 4, 7, layers=2, bidirectional=True)
    problem = problem_of(shape.spec(mode), shape)
    op = RNNOp(problem.spec, "onednn")
    x, params, states = problem.x.copy(), problem.params.copy(), [state.copy() for state in problem.states]
    reserve = op.forward(x, params, states, training=True)[2]
    expected = op.backward(problem.dy, problem.dstates, reserve)
    y, final, reserve = op.forward(x, params, states, training=True)
    for array in (x, params, *states, y, *final):
        array.fill(np.nan)
    op.forward(problem.x * 2, problem.params * 2, training=True)
    for _ in range(3):
        assert_same_bits(op.backward(problem.dy, problem.dstates, reserve), expected)
    assert reserve.nbytes == op.reserve_size(*problem.x.shape[:2]) > problem.x.nbytes


@pytest.mark.usefixtures("onednn")
def test_a_recomputed_reserve_stays_leased(monkeypatch):
    """The second backward call of a reserve recomputes it: no other call gets that memory meanwhile."""
    shape = Shape(5, 3, 4, 7, layers=2)
    problem = problem_of(shape.spec("lstm"), shape)
    op = RNNOp(problem.spec, "onednn")
    reserve = op.forward(problem.x, problem.params, problem.states, training=True)[2]
    expected = op.backward(problem.dy, problem.dstates, reserve)
    backward = Program.backward

    def backward_after_other_leases(program, *arguments):
        leases = [op._engine._pool.lease(program.reserve.nbytes) for _ in range(4)]
        for lease in leases:
            lease.buffer.fill(0xFF)
        backward(program, *arguments)

    monkeypatch.setattr(Program, "backward", backward_after_other_leases)
    assert_same_bits(op.backward(problem.dy, problem.dstates, reserve), expected)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_parameters_that_change_in_place(mode):
    shape = Shape(3, 2, 4, 5)
    problem = problem_of(shape.spec(mode), shape)
    op, params = RNNOp(problem.spec, "onednn"), problem.params.copy()
    before = op.forward(problem.x, params)[0]
    assert_same_bits(op.forward(problem.x, frozen(params))[0], before)
    params[-1] += 1
    assert not np.array_equal(op.forward(problem.x, params)[0], before)
    params[-1] = problem.params[-1]
    assert_same_bits(op.forward(problem.x, params)[0], before)


@pytest.mark.usefixtures("onednn")
def test_equal_parameters_are_copied_once(monkeypatch):
    """Frozen or not, for any number of calls of any length."""
    shape = Shape(3, 2, 40, 50)
    problem = problem_of(shape.spec("lstm"), shape)
    copies, copy = [], weights.WeightCache._copy
    monkeypatch.setattr(weights.WeightCache, "_copy", lambda self, params: copies.append(1) or copy(self, params))
    op = RNNOp(problem.spec, "onednn")
    for params in (problem.params, frozen(problem.params), problem.params.copy()):
        for steps in (1, 2, 3):
            op.forward(problem.x[:steps], params)
    assert len(copies) == 1
    op.forward(problem.x, problem.params + 1)
    assert len(copies) == 2


@pytest.mark.usefixtures("onednn")
def test_number_of_cached_programs_is_bounded():
    op = RNNOp(RNNSpec("gru", 3, 4), "onednn")
    params = np.ones(op.spec.layout.size, np.float32)
    for steps, training in product(range(1, MAX_PROGRAMS + 3), (False, True)):
        op.forward(np.ones((steps, 1, 3), np.float32), params, training=training)
    assert len(op._engine._programs) == MAX_PROGRAMS


def run_in_threads(function, count):
    """Call a function of an index in as many threads, and wait for them."""
    running = [threading.Thread(target=function, args=(index,)) for index in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_concurrent_calls(mode):
    """Threads that share an op, each with its own arguments, get the results of sequential calls."""
    shapes = [Shape(T, N, 9, 17, layers=2, bidirectional=True) for T, N in ((5, 3), (5, 3), (7, 1), (2, 9))]
    problems = [problem_of(shape.spec(mode), shape, seed) for seed, shape in enumerate(shapes)]
    op = RNNOp(problems[0].spec, "onednn")

    def call(problem):
        y, final, _ = op.forward(problem.x, problem.params, problem.states)
        trained_y, _, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        return y, final, trained_y, op.backward(problem.dy, problem.dstates, reserve)

    expected = [call(problem) for problem in problems]
    errors = []

    def run(index):
        try:
            for _ in range(10):
                assert_same_bits(call(problems[index]), expected[index])
        except BaseException as error:
            errors.append(error)

    run_in_threads(run, len(problems))
    assert not errors


@pytest.mark.usefixtures("onednn")
def test_concurrent_backward_calls_of_one_reserve():
    shape = Shape(9, 5, 6, 17, layers=2)
    problem = problem_of(shape.spec("lstm"), shape)
    op = RNNOp(problem.spec, "onednn")
    results = []
    reserve = op.forward(problem.x, problem.params, problem.states, training=True)[2]
    barrier = threading.Barrier(3)

    def run(_):
        barrier.wait()
        results.append(op.backward(problem.dy, problem.dstates, reserve))

    run_in_threads(run, 3)
    assert_same_bits(results[1:], [results[0]] * 2)


def _child(op, arrays, expected):
    try:
        y = op.forward(*arrays)[0]
    except NotImplementedError as error:
        os._exit(0 if expected is None and "spawn" in str(error) else 1)
    os._exit(0 if expected is not None and np.allclose(y, expected, atol=1e-5) else 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child(onednn):
    """It runs on one thread; where the runtime cannot run in it, the error says so."""
    op = RNNOp(RNNSpec("lstm", 5, 6), "onednn")
    arrays = np.ones((3, 2, 5), np.float32), np.full(op.spec.layout.size, 0.1, np.float32)
    y = op.forward(*arrays)[0]
    expected = None if onednn.runtime == library.SYCL else y
    child = multiprocessing.get_context("fork").Process(target=_child, args=(op, arrays, expected))
    child.start()
    child.join(60)
    code = child.exitcode
    if code is None:
        child.kill()
    assert code == 0


def test_thread_limit_is_restored(onednn):
    limit_threads = threads.thread_limit(onednn)
    if onednn.runtime == library.OPENMP:
        before = onednn.cdll.omp_get_max_threads()
        with limit_threads(1):
            assert onednn.cdll.omp_get_max_threads() == 1
        assert onednn.cdll.omp_get_max_threads() == before
    elif onednn.runtime != library.SEQUENTIAL:
        active = onednn.cdll["_ZN3tbb6detail2r127global_control_active_valueEi"]
        active.restype = ctypes.c_size_t
        before = active(0)
        with limit_threads(1):
            assert active(0) == 1
        assert active(0) == before


@pytest.fixture
def unloaded(monkeypatch):
    """No library is loaded yet; the value is ``monkeypatch``."""
    monkeypatch.delenv("FUSEDRNN_ONEDNN", raising=False)
    library._load.cache_clear()
    yield monkeypatch
    library._load.cache_clear()


SPEC = RNNSpec("lstm", 3, 4)


def assert_refused(match):
    with pytest.raises(NotImplementedError, match=match):
        RNNOp(SPEC, backend="onednn")


def test_missing_package(unloaded):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    unloaded.setattr(library.metadata, "distribution", distribution)
    assert_refused(r"^backend='onednn' needs oneDNN: install fusedrnn with its extra 'onednn' \(engine 'onednn'\)$")
    assert RNNOp(SPEC).backend == "cpu"


def test_missing_file(unloaded, tmp_path):
    unloaded.setenv("FUSEDRNN_ONEDNN", str(tmp_path / "libdnnl.so.3"))
    assert_refused("^FUSEDRNN_ONEDNN must be the path of oneDNN's libdnnl.so.3; got .* which is no file")


def test_file_that_is_no_library(unloaded, tmp_path):
    (tmp_path / "libdnnl.so.3").write_bytes(b"nothing")
    unloaded.setenv("FUSEDRNN_ONEDNN", str(tmp_path / "libdnnl.so.3"))
    assert_refused("^oneDNN cannot be loaded: ")


class FakeLibrary:
    """A library of that version and runtime, which lacks every other function."""

    def __init__(self, major=3, runtime=library.OPENMP):
        version = library._Version(major, 1, 0, b"", runtime, 0)
        self.dnnl_version = lambda: ctypes.pointer(version)
        self.dnnl_version.restype = None


class FailingLibrary(FakeLibrary):
    """A library that finds a CPU; every function that returns a status fails."""

    def __getattr__(self, name):
        return lambda *arguments: 2


@pytest.mark.parametrize(
    ("fake", "match"),
    [
        (FailingLibrary(), "libdnnl.so.3 cannot be used: oneDNN's dnnl_engine_create failed: "),
        (FakeLibrary(major=2), r"is oneDNN 2\.1; expected 3\.x"),
        (FakeLibrary(runtime=8), "has the CPU runtime 8; expected one of sequential, OpenMP, TBB, SYCL"),
        (FakeLibrary(), r"oneDNN 3\.1\.0, has no dnnl_engine_create"),
        (object(), "is not oneDNN: it has no dnnl_version"),
    ],
)
def test_unusable_library(unloaded, tmp_path, fake, match):
    path = tmp_path / "libdnnl.so.3"
    path.touch()
    unloaded.setenv("FUSEDRNN_ONEDNN", str(path))
    unloaded.setattr(library.ctypes, "CDLL", lambda name: fake)
    assert_refused(match)


def test_dependencies_are_loaded_first(unloaded, tmp_path):
    """From the library's folder, where the system's loader does not look; the error names a missing one."""
    loaded = []
    dependencies = {"libdnnl.so.3": ["liba.so", "libb.so"], "liba.so": ["libb.so"], "libb.so": []}
    for name in dependencies:
        (tmp_path / name).touch()

    def load(path):
        name = path.rpartition("/")[2]
        for dependency in dependencies[name]:
            if dependency not in loaded:
                raise OSError(f"{dependency}: cannot open shared object file: No such file or directory")
        loaded.append(name)
        return name

    unloaded.setattr(library.ctypes, "CDLL", load)
    assert library._load_with_dependencies(str(tmp_path / "libdnnl.so.3"), tmp_path) == "libdnnl.so.3"
    assert loaded == ["libb.so", "liba.so", "libdnnl.so.3"]
    dependencies["liba.so"] = ["libmissing.so"]
    loaded.clear()
    with pytest.raises(ImportError, match=r"^oneDNN cannot be loaded: libmissing\.so: cannot open"):
        library._load_with_dependencies(str(tmp_path / "libdnnl.so.3"), tmp_path)


@pytest.mark.parametrize(
    ("options", "unsupported"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is"),
        ({"state_clip_min": -1.0, "state_clip_max": 1.0}, "state_clip_min is"),
        ({"coupled_gates": True}, "coupled_gates is"),
        ({"gate_clip": 1.0}, "gate_clip is"),
        ({"activations": ("hard_sigmoid", "tanh", "tanh")}, "activations is"),
    ],
    ids=str,
)
def test_unsupported_options_are_refused_without_the_library(unloaded, options, unsupported):
    unloaded.setattr(library, "find", lambda: pytest.fail("the library was looked for"))
    with pytest.raises(NotImplementedError, match=f"^{unsupported} not supported by engine 'onednn'$"):
        RNNOp(replace(SPEC, **options), backend="onednn")


@pytest.mark.usefixtures("onednn")
def test_unsupported_calls():
    op = RNNOp(replace(SPEC, num_layers=2, dropout=0.5), "onednn")
    x, params = np.ones((2, 2, 3), np.float32), np.ones(op.spec.layout.size, np.float32)
    assert op.forward(x, params)[0].shape == (2, 2, 4)
    with pytest.raises(NotImplementedError, match=r"^dropout is not supported by engine 'onednn'$"):
        op.forward(x, params, training=True)
    with pytest.raises(NotImplementedError, match=r"^lengths is not supported by engine 'onednn'$"):
        op.forward(x, params, lengths=[1, 2])


def test_engine_is_not_automatic():
    entry = registry.find("onednn")
    assert not entry.automatic
    assert entry.device == "cpu"


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", [name for name in SUPPORTED_VARIANTS if VARIANTS[name][0] != "rnn_relu"])
def test_grad_req_of_variants(name):
    """Gradients are added in our order of gates."""
    shape = Shape(3, 2, 4, 6, layers=2)
    problem = problem_of(variant_spec(name, 4, 6, 2), shape)
    op = RNNOp(problem.spec, "onednn")
    expected = variant_results(problem).gradients
    requests = cycle(REQUESTS)
    for _ in range(3):
        grad_req = {operand: next(requests) for operand in ("x", "params", "states")}
        next(requests)
        _, _, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        pairs = zip(grad_req.values(), expected, ["float32"] * 3, strict=True)
        buffers, expected_buffers = zip(*(TrainingConformance._buffer(*pair) for pair in pairs), strict=True)
        out = tuple(
            None if request == "null" else buffer for request, buffer in zip(grad_req.values(), buffers, strict=True)
        )
        op.backward(problem.dy, problem.dstates, reserve, grad_req=grad_req, out=out)
        assert_gradients_close(buffers, expected_buffers, "float32", problem.spec, shape.T, shape.N)
