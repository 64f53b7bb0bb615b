"""Engine selection: the first that supports a call, the one named, or an error that says why there is none."""

import multiprocessing
import os
import pickle
import re
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines import registry
from fusedrnn.engines.interface import NEEDS, Capabilities
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, GradBuffers
from fusedrnn.engines.registry import EngineSelector
from fusedrnn.spec import OPTIONS

SPEC = RNNSpec("gru", 3, 4)
DEEP = RNNSpec("gru", 3, 4, num_layers=2, dropout=0.5)
PROJECTED = RNNSpec("lstm", 3, 4, projection_size=2)
CLIPPED = RNNSpec("lstm", 3, 4, state_clip_min=-1.0, state_clip_max=1.0)


class FakeResiduals:
    nbytes = 12


class FakeEngine:
    """Writes its number everywhere, and records its calls."""

    def __init__(self, spec, number):
        self.spec, self.number, self.calls = spec, number, []

    def compile(self, training=False):
        self.calls.append(("compile", training))

    def forward(self, operands):
        self.calls.append(("forward", operands.lengths is not None))
        operands.y[...] = self.number
        return tuple(np.zeros(shape, operands.x.dtype) for shape in self.spec.state_shape(operands.x.shape[1]))

    def train(self, operands, save, seed):
        self.calls.append(("train", save, seed))
        return self.forward(operands), FakeResiduals()

    def backward(self, residuals, operands):
        self.calls.append(("backward", operands.dy, operands.dstates))
        for buffer in (operands.grads.x, operands.grads.params, *(operands.grads.states or ())):
            if buffer is not None:
                buffer[...] = self.number

    def reserve_bytes(self, steps, batch, save):
        return FakeResiduals.nbytes


@contextmanager
def engine(name, number=1, factory=None, order=0, automatic=True, **supports):
    """Registers an engine inside the ``with`` block; yields the list of engines that its factory created."""
    created = []

    def make(spec):
        created.append(FakeEngine(spec, number))
        return created[-1]

    registry.register(name, factory or make, Capabilities(**supports), order=order, automatic=automatic)
    try:
        yield created
    finally:
        registry.unregister(name)


@contextmanager
def only(*names):
    """Inside the ``with`` block, none but these of the registered engines, and those that the block registers."""
    others = [entry for entry in registry.engines() if entry.name not in names]
    for entry in others:
        registry.unregister(entry.name)
    try:
        yield
    finally:
        for entry in others:
            options = {name: getattr(entry, name) for name in ("order", "device", "automatic", "description")}
            registry.register(entry.name, entry.factory, entry.capabilities, **options)


@pytest.fixture(autouse=True)
def engines_without_dependencies():
    """Only the engines that need no other package; a test leaves the registry as it was."""
    before = registry.names()
    with only("cpu", "reference"):
        yield
        assert registry.names() == ("cpu", "reference")
    assert registry.names() == before


def arrays(spec, T=5, N=2):
    return np.ones((T, N, spec.input_size), spec.dtype), np.ones(spec.layout.size, spec.dtype)


def number(op, **options):
    """The number of the engine that ran a call."""
    return op.forward(*arrays(op.spec), **options)[0].flat[0]


def test_registered_engines():
    assert registry.names() == ("cpu", "reference")
    assert [entry.name for entry in registry.engines() if entry.automatic] == ["cpu"]
    for entry in registry.engines():
        assert entry.description
        assert entry.device == "cpu"
        flags = "training, lengths, dropout, resets, all_states, cells"
        assert f"gru; float32, float64; {flags}; projection_size, " in str(entry.capabilities)
        assert entry.capabilities.options == OPTIONS
        assert registry.find(entry.name) is entry


def test_the_first_able_engine_is_selected():
    assert RNNOp(SPEC).backend == "cpu"
    with engine("second", 2, order=20), engine("first", 1, order=10), engine("last", 3, order=1000):
        assert registry.names()[:3] == ("first", "second", "cpu") and registry.names()[-1] == "last"
        assert RNNOp(SPEC).backend == RNNOp.get(SPEC).backend == "first"
        assert number(RNNOp(SPEC)) == 1
        assert number(RNNOp(SPEC, "second")) == number(RNNOp.get(SPEC, backend="second")) == 2
    assert RNNOp.get(SPEC).backend == "cpu"


@pytest.mark.parametrize(
    ("spec", "lacks"),
    [
        (SPEC, {"modes": ("lstm", "rnn_tanh")}),
        (SPEC, {"dtypes": ("float64",)}),
        (PROJECTED, {"options": ("state_clip_min",)}),
        (CLIPPED, {"options": ("projection_size",)}),
    ],
    ids=["mode", "dtype", "projection", "clip"],
)
def test_an_engine_that_lacks_something_is_skipped(spec, lacks):
    has = {"options": OPTIONS}
    with engine("lacking", **{**has, **lacks}) as lacking, engine("able", 2, order=1, **has):
        op = RNNOp(spec)
        assert (op.backend, number(op)) == ("able", 2)
        assert not lacking  # its capabilities are enough to tell


def test_an_engine_that_is_not_automatic_must_be_named():
    with engine("slow", automatic=False):
        assert RNNOp(SPEC).backend == "cpu"
        assert number(RNNOp(SPEC, "slow")) == 1
    assert RNNOp(SPEC, "reference").backend == "reference"


@pytest.mark.parametrize("make", [RNNOp, RNNOp.get, EngineSelector])
@pytest.mark.parametrize("backend", [3, b"cpu", ["cpu"], RNNOp, True])
def test_backend_of_a_wrong_type(make, backend):
    names = ", ".join(registry.names())
    message = f"^backend must be a string, one of {names}, or None; got {type(backend).__name__}$"
    with pytest.raises(TypeError, match=message):
        make(SPEC, backend=backend)


@pytest.mark.parametrize("make", [RNNOp, RNNOp.get, EngineSelector])
@pytest.mark.parametrize("backend", ["", "CPU", "metal"])
def test_unknown_backend(make, backend):
    with pytest.raises(ValueError, match=f"^backend must be one of {', '.join(registry.names())}; got '{backend}'$"):
        make(SPEC, backend=backend)


def test_every_rejection_is_reported():
    def broken(spec):
        raise ImportError("libfast.so is not there")

    with only(), engine("broken", factory=broken, options=("projection_size",)), engine("small", dtypes=("float64",)):
        with pytest.raises(NotImplementedError) as caught:
            RNNOp(PROJECTED)
        assert str(caught.value).split("; ") == [
            "libfast.so is not there (engine 'broken')",
            "dtype 'float32', projection_size are not supported by engine 'small'",
        ]
        with pytest.raises(NotImplementedError, match=r"^libfast.so is not there \(engine 'broken'\)$"):
            RNNOp(SPEC, "broken")


def test_an_able_engine_that_is_not_automatic_is_mentioned():
    with only(), engine("few"), engine("slow", automatic=False, options=("state_clip_min",)):
        with pytest.raises(NotImplementedError, match=r"engine 'few'; backend='slow' supports it$"):
            RNNOp(CLIPPED)
        with pytest.raises(NotImplementedError, match=r"^state_clip_min is not supported by engine 'few'$"):
            RNNOp(CLIPPED, "few")


def test_rejections_name_the_arguments_of_the_function():
    x, state = np.ones((2, 1, 3), np.float32), np.ones((1, 1, 4), np.float32)
    with (
        only(),
        engine("few", order=2),
        engine("other", order=1, factory=lambda spec: 1 / 0),
        pytest.raises(NotImplementedError) as caught,
    ):
        fusedrnn.rnn(
            x, np.ones(5, np.float32), state, state, state_size=4, num_layers=1, mode="lstm",
            lstm_state_clip_min=-1.0, lstm_state_clip_max=1.0,
        )  # fmt: skip
    assert str(caught.value).split("; ") == [
        f"lstm_state_clip_min is not supported by engine {name!r}" for name in ("other", "few")
    ]


@pytest.mark.parametrize("error", [NotImplementedError, ImportError, ModuleNotFoundError])
def test_a_factory_that_declines(error):
    tried = []

    def declines(spec):
        tried.append(spec)
        raise error("nothing for this processor")

    with engine("failing", factory=declines):
        op = RNNOp(SPEC)
        assert op.backend == "cpu"
        op.forward(*arrays(SPEC), lengths=[1, 2])
        assert tried == [SPEC]  # only once, whatever calls need
        with pytest.raises(NotImplementedError, match="nothing for this processor"):
            RNNOp(SPEC, "failing")


def test_a_factory_with_an_error_of_another_kind():
    """That is a defect and must be raised."""

    def broken(spec):
        raise ZeroDivisionError("of the factory")

    with engine("broken", factory=broken), pytest.raises(ZeroDivisionError, match="of the factory"):
        RNNOp(SPEC)


def test_engines_are_created_when_needed():
    with engine("first") as first, engine("second", order=1) as second:
        assert not first
        op = RNNOp(SPEC)
        assert len(first) == 1
        op.forward(*arrays(SPEC), training=True)
        assert len(first) == 1
        assert not second


@pytest.mark.parametrize(
    ("lacks", "spec", "call", "by"),
    [
        ("training", SPEC, {"training": True}, 2),
        ("training", SPEC, {"training": False}, 1),
        ("lengths", SPEC, {"lengths": [1, 2]}, 2),
        ("lengths", SPEC, {"lengths": [1, 2], "training": True}, 2),
        ("lengths", SPEC, {"training": True}, 1),
        ("dropout", DEEP, {"training": True}, 2),
        ("dropout", DEEP, {}, 1),
        ("dropout", RNNSpec("gru", 3, 4, dropout=0.5), {"training": True}, 1),  # one layer has nothing to drop
    ],
)
def test_a_call_selects_an_engine_that_supports_it(lacks, spec, call, by):
    with engine("lacking", 1, **{lacks: False}), engine("able", 2, order=1):
        op = RNNOp(spec)
        assert op.backend == "lacking"
        assert number(op, **call) == by
        assert number(op) == 1
        if by == 2:
            x, params = arrays(spec)
            out = np.full((5, 2, 4), 7, np.float32)
            forced = RNNOp(spec, "lacking")
            with pytest.raises(NotImplementedError, match=f"^{lacks} is not supported by engine 'lacking'$"):
                forced.forward(x, params, out=out, **call)
            assert (out == 7).all()


def test_a_reserve_knows_its_engine():
    with engine("inference", 1, training=False) as inference, engine("trains", 2, order=1) as trains:
        op = RNNOp(SPEC)
        _, _, reserve = op.forward(*arrays(SPEC), training=True, seed=9)
        assert reserve.backend == "trains"
        assert reserve.nbytes == op.reserve_size(5, 2) == 12
        dx, dparams, (dh0,) = op.backward(None, None, reserve)
        assert dx.flat[0] == dparams[0] == dh0.flat[0] == 2
        assert inference[0].calls == []
        assert trains[0].calls[0] == ("train", "gates", 9)
        assert trains[0].calls[-1] == ("backward", None, (None,))
        op.compile(training=True)
        assert inference[0].calls == [("compile", False)]
        assert trains[0].calls[-1] == ("compile", True)
    op.backward(None, None, reserve)  # no longer registered, still usable by its op


def test_a_reserve_of_another_engine():
    with engine("one"), engine("two", order=1):
        _, _, reserve = RNNOp(SPEC, "two").forward(*arrays(SPEC), training=True)
        RNNOp(SPEC).backward(None, None, reserve)
        with pytest.raises(ValueError, match=r"^reserve must come from backend one; got one from two$"):
            RNNOp(SPEC, "one").backward(None, None, reserve)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_pickling_keeps_the_backend_asked_for(backend):
    op = pickle.loads(pickle.dumps(RNNOp(SPEC, backend)))
    assert op.spec == SPEC
    assert op.backend == backend or backend is None
    with engine("first"):
        assert pickle.loads(pickle.dumps(op)).backend == (backend or "first")
    assert f"backend={op.backend!r}" in repr(op)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": 3}, TypeError, "name must be a string; got int"),
        ({"name": ""}, ValueError, "name must not be empty"),
        ({"name": "cpu"}, ValueError, "name must not be .*cpu, .*reference; got 'cpu'"),
        ({"factory": None}, TypeError, "factory must be callable; got NoneType"),
        ({"capabilities": {}}, TypeError, "capabilities must be a Capabilities; got dict"),
    ],
)
def test_bad_registration(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        registry.register(
            **{"name": "new", "factory": FakeEngine, "capabilities": Capabilities(), "order": 1, **change}
        )


def test_unregistering_an_unknown_engine():
    with pytest.raises(ValueError, match="'nothing'"):
        registry.unregister("nothing")


def test_ops_are_kept_by_spec_and_backend():
    assert RNNOp.get(SPEC) is RNNOp.get(RNNSpec("gru", 3, 4))
    assert RNNOp.get(SPEC, "reference") is RNNOp.get(SPEC, backend="reference")
    assert RNNOp.get(SPEC, "reference") is not RNNOp.get(SPEC)
    assert RNNOp(SPEC) is not RNNOp.get(SPEC)


def test_the_cache_of_ops_is_bounded():
    with engine("fake") as created:
        first = RNNOp.get(RNNSpec("gru", 1, 1))
        for size in range(2, registry.MOST_OPS + 20):
            RNNOp.get(RNNSpec("gru", 1, size))
            assert RNNOp.get(RNNSpec("gru", 1, 1)) is first  # used all the time, it stays
        assert len(registry._ops) == registry.MOST_OPS
        count = len(created)
        RNNOp.get(RNNSpec("gru", 1, 2))
        assert len(created) == count + 1
    assert not registry._ops  # ops of a removed engine are dropped


def together(count, call):
    """The results of a function that so many threads call at the same time."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(index):
        barrier.wait()
        results[index] = call()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_threads_that_ask_at_once_get_one_op():
    created = []

    def slow(spec):
        created.append(spec)
        time.sleep(0.02)
        return FakeEngine(spec, 1)

    with engine("slow", factory=slow):
        assert len(set(together(8, lambda: RNNOp.get(SPEC)))) == 1
        assert created == [SPEC]


def test_threads_that_need_an_engine_at_once_get_one():
    created = []

    def slow(spec):
        created.append(spec)
        time.sleep(0.02)
        return FakeEngine(spec, 2)

    with engine("inference", training=False), engine("trains", factory=slow, order=1):
        op = RNNOp(SPEC)
        reserves = together(8, lambda: op.forward(*arrays(SPEC), training=True)[2])
        assert {reserve.backend for reserve in reserves} == {"trains"}
        assert created == [SPEC]


def test_registering_while_ops_are_created():
    """Factories may use the registry while other threads do."""

    def curious(spec):
        with engine(f"inner of {threading.get_ident()}", automatic=False):
            return FakeEngine(spec, 1)

    def use():
        for size in range(1, 30):
            RNNOp.get(RNNSpec("gru", 1, size))
            with engine(f"one of {threading.get_ident()}", automatic=False):
                pass

    with engine("curious", factory=curious):
        together(4, use)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_an_op_is_created():
    """A lock that another thread holds in the parent is free in the child."""
    inside, leave = threading.Event(), threading.Event()

    def slow(spec):
        if spec == DEEP:
            inside.set()
            assert leave.wait(60)
        return FakeEngine(spec, 1)

    with engine("slow", factory=slow):
        thread = threading.Thread(target=RNNOp.get, args=(DEEP,))
        thread.start()
        assert inside.wait(60)
        child = multiprocessing.get_context("fork").Process(target=RNNOp.get, args=(SPEC,))
        child.start()
        child.join(60)
        code = child.exitcode
        if code is None:
            child.kill()
        leave.set()
        thread.join(60)
    assert code == 0


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_an_engine_follows_the_protocol(name):
    """Signatures, and the promises about results for the plainest arguments."""
    spec = RNNSpec("lstm", 3, 4, num_layers=2)
    tested = registry.find(name).factory(spec)
    x, params = arrays(spec)
    y = np.full((5, 2, 4), np.nan, np.float32)
    tested.compile()
    tested.compile(training=True)
    lengths = np.array([2, 5])
    operands = ForwardOperands(x, params, None, lengths, y)
    final = tested.forward(operands)
    assert np.isnan(y[2:, 0]).all()
    assert not np.isnan(y[:2]).any()
    again, residuals = tested.train(operands, "gates", 0)
    for inferred, trained in zip(final, again, strict=True):
        np.testing.assert_array_equal(inferred, trained)
    assert residuals.nbytes == tested.reserve_bytes(5, 2, "gates")
    dx = np.full_like(x, np.nan)
    tested.backward(residuals, BackwardOperands(y, (None, None), GradBuffers(dx, None, None)))
    assert np.isnan(dx[2:, 0]).all()
    assert not np.isnan(dx[:2]).any()


def test_missing_capabilities_are_named_like_arguments():
    """Each missing option by the name of its argument, so that adapters can rename it."""
    missing = Capabilities(modes=(), dtypes=(), training=False, lengths=False, dropout=False).missing
    needs = ["all_states", "dropout", "lengths", "resets", "training"]
    assert missing(SPEC, NEEDS) == ["mode 'gru'", "dtype 'float32'", *needs]
    assert missing(PROJECTED)[2:] == ["projection_size"]
    assert missing(CLIPPED)[2:] == ["state_clip_min"]
    fields = {*RNNSpec.__dataclass_fields__, "training", "lengths", "resets", "all_states"}
    assert {re.match(r"\w+", name)[0] for name in missing(DEEP, NEEDS)} <= fields
