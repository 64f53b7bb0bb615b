"""oneDNN as an engine: the conformance suite, its variants, threads, what is kept; and how it declines."""

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
from fusedrnn.engines.onednn import library, threads, weights
from fusedrnn.engines.onednn import param_layout as layout
from fusedrnn.engines.onednn.engine import _MOST_PROGRAMS
from fusedrnn.spec import MODES
from oracles import absences, without
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import VARIANTS, possible, variant_results, variant_spec


@cache
def missing():
    """Why the library is not there, or None."""
    try:
        library.load()
    except ImportError as error:
        return str(error)
    return None


@pytest.fixture
def onednn():
    """The library; a test that needs it is skipped without it."""
    if missing():
        pytest.skip(missing())
    return library.load()


def full(shape):
    """The same without lengths, which oneDNN has not."""
    return replace(shape, lengths="full")


def shorter(shape):
    """The same of no more steps than the suite's full sequences have: over more, a ReLU's gradients underflow."""
    return replace(full(shape), T=min(shape.T, 63))


def train(spec, x, params, states, lengths, keep, seed):
    op = RNNOp(spec, "onednn")
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=keep)
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
OWN = [name for name in VARIANTS if SUPPORTS.missing(variant_spec(name, 4, 6)) == []]
# One primitive for all layers, one for the first and one for the rest, and one for each where both directions are read.
VARIANT_SHAPES = (
    Shape(5, 3, 4, 6),
    Shape(6, 17, 5, 33, bidirectional=True),
    Shape(4, 2, 5, 4, layers=3, states=False),
    Shape(4, 3, 17, 17, layers=3),
    Shape(3, 2, 4, 17, layers=3, bidirectional=True),
)


def test_which_variants_there_are():
    assert {"projection", "peepholes", "reset-before", "gru-single-bias", "vanilla-no-bias"} <= set(OWN)
    assert not {"coupled", "state-clip", "lstm-gate-clip", "gru-activations"} & set(OWN)


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
    for absent in absences(spec):
        expected = variant_results(problem, absent)
        assert_close((y, final), expected.forward, "float32", spec)
        assert_close(results[:2], expected.forward, "float32", spec)
        actual = op.backward(*without(spec, problem.dy, problem.dstates, absent), results[2])
        assert_gradients_close(actual, expected.gradients, "float32", spec, steps, batch)


@pytest.mark.usefixtures("onednn", "poisoned")
@pytest.mark.parametrize("shape", VARIANT_SHAPES, ids=str)
@pytest.mark.parametrize("name", OWN)
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


def test_layers_that_one_primitive_runs():
    def found(*sizes, **options):
        return [(one.first, one.layers, one.inputs) for one in layout.stacks(RNNSpec("lstm", *sizes, **options))]

    assert found(4, 4, 3) == [(0, 3, 4)]
    assert found(5, 4, 3) == [(0, 1, 5), (1, 2, 4)]
    assert found(5, 4) == [(0, 1, 5)]
    assert found(2, 4, 3, projection_size=2) == [(0, 3, 2)]
    assert found(4, 2, 2, bidirectional=True) == [(0, 1, 4), (1, 1, 4)]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_strides(mode):
    """Whatever the strides of x, out, dy and dx, the bits are the same."""
    shape = Shape(4, 3, 5, 6, layers=2)
    problem = problem_of(shape.spec(mode), shape)
    op = RNNOp(problem.spec, "onednn")

    def wide(array):
        spread = np.full((*array.shape[:2], array.shape[2] + 3), np.nan, array.dtype)
        spread[:, :, : array.shape[2]] = array
        return spread[:, :, : array.shape[2]]

    x, out, dy, dx = (wide(one) for one in (problem.x, problem.dy, problem.dy, problem.x))
    y, final, _ = op.forward(problem.x, problem.params, problem.states)
    again, others, _ = op.forward(x, problem.params, problem.states, out=out)
    assert again is out
    assert_same_bits((y, final), (again, others))
    gradients = []
    for given, into, upper in ((problem.x, None, problem.dy), (x, (dx, None, None), dy)):
        _, _, reserve = op.forward(given, problem.params, problem.states, training=True)
        gradients.append(op.backward(upper, problem.dstates, reserve, out=into))
    assert gradients[1][0] is dx
    assert_same_bits(*gradients)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_a_reserve_is_its_calls_own(mode):
    """Later changes of arguments and results, other calls, a backward before: nothing changes the gradients."""
    shape = Shape(5, 3, 4, 7, layers=2, bidirectional=True)
    problem = problem_of(shape.spec(mode), shape)
    op = RNNOp(problem.spec, "onednn")
    given = [array.copy() for array in problem.arrays[:2]], [state.copy() for state in problem.states]
    y, final, reserve = op.forward(*given[0], given[1], training=True)
    first = op.backward(problem.dy, problem.dstates, reserve)
    y, final, reserve = op.forward(*given[0], given[1], training=True)
    for array in (*given[0], *given[1], y, *final):
        array.fill(np.nan)
    op.forward(problem.x * 2, problem.params * 2, training=True)
    for _ in range(3):
        assert_same_bits(op.backward(problem.dy, problem.dstates, reserve), first)
    assert reserve.nbytes == op.reserve_size(*problem.x.shape[:2]) > problem.x.nbytes


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
def test_weights_are_brought_into_place_once(monkeypatch):
    """For parameters that are frozen, or the same: however many calls, of whatever length."""
    shape = Shape(3, 2, 40, 50)
    problem = problem_of(shape.spec("lstm"), shape)
    made, plain = [], weights.WeightCache._make
    monkeypatch.setattr(weights.WeightCache, "_make", lambda self, params: made.append(1) or plain(self, params))
    op = RNNOp(problem.spec, "onednn")
    for params in (problem.params, frozen(problem.params), problem.params.copy()):
        for steps in (1, 2, 3):
            op.forward(problem.x[:steps], params)
    assert len(made) == 1
    op.forward(problem.x, problem.params + 1)
    assert len(made) == 2


@pytest.mark.usefixtures("onednn")
def test_what_an_op_keeps_is_bounded():
    op = RNNOp(RNNSpec("gru", 3, 4), "onednn")
    params = np.ones(op.spec.layout.size, np.float32)
    for steps, training in product(range(1, _MOST_PROGRAMS + 3), (False, True)):
        op.forward(np.ones((steps, 1, 3), np.float32), params, training=training)
    assert len(op._engine._programs) == _MOST_PROGRAMS


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("mode", MODES)
def test_calls_at_once(mode):
    """Threads that share an op, each with arguments of its own: the results are those of one call after the other."""
    shapes = [Shape(T, N, 9, 17, layers=2, bidirectional=True) for T, N in ((5, 3), (5, 3), (7, 1), (2, 9))]
    problems = [problem_of(shape.spec(mode), shape, seed) for seed, shape in enumerate(shapes)]
    op = RNNOp(problems[0].spec, "onednn")

    def call(problem):
        y, final, _ = op.forward(problem.x, problem.params, problem.states)
        again, _, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        return y, final, again, op.backward(problem.dy, problem.dstates, reserve)

    expected = [call(problem) for problem in problems]
    wrong = []

    def work(index):
        try:
            for _ in range(10):
                assert_same_bits(call(problems[index]), expected[index])
        except BaseException as error:
            wrong.append(error)

    running = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("onednn")
def test_two_backwards_of_one_reserve_at_once():
    shape = Shape(9, 5, 6, 17, layers=2)
    problem = problem_of(shape.spec("lstm"), shape)
    op = RNNOp(problem.spec, "onednn")
    found = []
    reserve = op.forward(problem.x, problem.params, problem.states, training=True)[2]
    barrier = threading.Barrier(3)

    def work():
        barrier.wait()
        found.append(op.backward(problem.dy, problem.dstates, reserve))

    running = [threading.Thread(target=work) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert_same_bits(found[1:], [found[0]] * 2)


def _child(op, arrays, expected):
    try:
        y = op.forward(*arrays)[0]
    except NotImplementedError as error:
        os._exit(0 if expected is None and "spawn" in str(error) else 1)
    os._exit(0 if expected is not None and np.allclose(y, expected, atol=1e-5) else 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child(onednn):
    """It goes on with one thread; or it is told, where the runtime cannot."""
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


def test_the_bound_on_threads_is_lifted_again(onednn):
    bounded = threads.thread_limit(onednn)
    if onednn.runtime == library.OPENMP:
        before = onednn.cdll.omp_get_max_threads()
        with bounded(1):
            assert onednn.cdll.omp_get_max_threads() == 1
        assert onednn.cdll.omp_get_max_threads() == before
    elif onednn.runtime != library.SEQUENTIAL:
        active = onednn.cdll["_ZN3tbb6detail2r127global_control_active_valueEi"]
        active.restype = ctypes.c_size_t
        before = active(0)
        with bounded(1):
            assert active(0) == 1
        assert active(0) == before


@pytest.fixture
def unloaded(monkeypatch):
    """The library as if nobody had looked for it yet."""
    monkeypatch.delenv("FUSEDRNN_ONEDNN", raising=False)
    library._load.cache_clear()
    yield monkeypatch
    library._load.cache_clear()


SPEC = RNNSpec("lstm", 3, 4)


def declined(match):
    with pytest.raises(NotImplementedError, match=match):
        RNNOp(SPEC, backend="onednn")


def test_without_the_package(unloaded):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    unloaded.setattr(library.metadata, "distribution", distribution)
    declined(r"^oneDNN is not installed: pip install 'fusedrnn\[onednn\]' .*\(engine 'onednn'\)$")
    assert RNNOp(SPEC).backend == "cpu"


def test_a_file_that_is_not_there(unloaded, tmp_path):
    unloaded.setenv("FUSEDRNN_ONEDNN", str(tmp_path / "libdnnl.so.3"))
    declined("^FUSEDRNN_ONEDNN must be the path of oneDNN's libdnnl.so.3; got .* which is no file")


def test_a_file_that_is_something_else(unloaded, tmp_path):
    (tmp_path / "libdnnl.so.3").write_bytes(b"nothing")
    unloaded.setenv("FUSEDRNN_ONEDNN", str(tmp_path / "libdnnl.so.3"))
    declined("^oneDNN cannot be loaded: ")


class FakeLibrary:
    """A library of a version, that lacks every function; or one that needs others."""

    def __init__(self, major=3, runtime=library.OPENMP):
        version = library._Version(major, 1, 0, b"", runtime, 0)
        self.dnnl_version = lambda: ctypes.pointer(version)
        self.dnnl_version.restype = None


@pytest.mark.parametrize(
    ("fake", "match"),
    [
        (FakeLibrary(major=2), r"is oneDNN 2\.1; expected 3\.x"),
        (FakeLibrary(runtime=8), "has the CPU runtime 8; expected one of sequential, OpenMP, TBB, SYCL"),
        (FakeLibrary(), r"oneDNN 3\.1\.0, has no dnnl_engine_create"),
        (object(), "is not oneDNN: it has no dnnl_version"),
    ],
)
def test_a_library_that_will_not_do(unloaded, tmp_path, fake, match):
    path = tmp_path / "libdnnl.so.3"
    path.touch()
    unloaded.setenv("FUSEDRNN_ONEDNN", str(path))
    unloaded.setattr(library.ctypes, "CDLL", lambda name: fake)
    declined(match)


def test_what_it_needs_is_loaded_first(unloaded, tmp_path):
    """From its own folder, where the system's loader does not look; what is not there is named."""
    loaded = []
    needs = {"libdnnl.so.3": ["liba.so", "libb.so"], "liba.so": ["libb.so"], "libb.so": []}
    for name in needs:
        (tmp_path / name).touch()

    def load(name):
        short = name.rpartition("/")[2]
        for other in needs[short]:
            if other not in loaded:
                raise OSError(f"{other}: cannot open shared object file: No such file or directory")
        loaded.append(short)
        return short

    unloaded.setattr(library.ctypes, "CDLL", load)
    assert library._loaded(str(tmp_path / "libdnnl.so.3"), tmp_path) == "libdnnl.so.3"
    assert loaded == ["libb.so", "liba.so", "libdnnl.so.3"]
    needs["liba.so"] = ["libmissing.so"]
    loaded.clear()
    with pytest.raises(ImportError, match=r"^oneDNN cannot be loaded: libmissing\.so: cannot open"):
        library._loaded(str(tmp_path / "libdnnl.so.3"), tmp_path)


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is"),
        ({"state_clip_min": -1.0, "state_clip_max": 1.0}, "state_clip_min is"),
        ({"coupled_gates": True}, "coupled_gates is"),
        ({"gate_clip": 1.0}, "gate_clip is"),
        ({"activations": ("hard_sigmoid", "tanh", "tanh")}, "activations is"),
    ],
    ids=str,
)
def test_what_it_lacks_is_said_without_the_library(unloaded, options, lacks):
    unloaded.setattr(library, "find", lambda: pytest.fail("the library was looked for"))
    with pytest.raises(NotImplementedError, match=f"^{lacks} not supported yet by engine 'onednn'$"):
        RNNOp(replace(SPEC, **options), backend="onednn")


@pytest.mark.usefixtures("onednn")
def test_calls_that_it_lacks():
    op = RNNOp(replace(SPEC, num_layers=2, dropout=0.5), "onednn")
    x, params = np.ones((2, 2, 3), np.float32), np.ones(op.spec.layout.size, np.float32)
    assert op.forward(x, params)[0].shape == (2, 2, 4)
    with pytest.raises(NotImplementedError, match=r"^dropout is not supported yet by engine 'onednn'$"):
        op.forward(x, params, training=True)
    with pytest.raises(NotImplementedError, match=r"^lengths is not supported yet by engine 'onednn'$"):
        op.forward(x, params, lengths=[1, 2])


def test_it_is_used_only_if_asked_for():
    entry = registry.find("onednn")
    assert not entry.automatic
    assert entry.device == "cpu"


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", [name for name in OWN if VARIANTS[name][0] != "rnn_relu"])
def test_requests_of_variants(name):
    """What is added lies on what was there, in our order of gates."""
    shape = Shape(3, 2, 4, 6, layers=2)
    problem = problem_of(variant_spec(name, 4, 6, 2), shape)
    op = RNNOp(problem.spec, "onednn")
    expected = variant_results(problem).gradients
    requests = cycle(REQUESTS)
    for _ in range(3):
        grad_req = {one: next(requests) for one in ("x", "params", "states")}
        next(requests)
        _, _, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        pairs = zip(grad_req.values(), expected, ["float32"] * 3, strict=True)
        buffers, wanted = zip(*(TrainingConformance._buffer(*pair) for pair in pairs), strict=True)
        out = tuple(None if one == "null" else buffer for one, buffer in zip(grad_req.values(), buffers, strict=True))
        op.backward(problem.dy, problem.dstates, reserve, grad_req=grad_req, out=out)
        assert_gradients_close(buffers, wanted, "float32", problem.spec, shape.T, shape.N)
