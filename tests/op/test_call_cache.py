"""Cached calls give the bits and errors of checked calls, and arguments that differ lead to a checked call."""

import threading

import numpy as np
import pytest

import fusedrnn
from fusedrnn import NetworkOp, NetworkSpec, RNNOp, RNNSpec, cells, frozen
from fusedrnn.engines import registry
from fusedrnn.engines.cpu import cached_call
from fusedrnn.engines.interface import Capabilities
from fusedrnn.engines.reference.engine import ReferenceEngine
from fusedrnn.jit import ndarray_abi
from problems import Shape, assert_same_bits, make_problem

MODES = "lstm", "gru", "rnn_relu", "rnn_tanh"
SHAPES = Shape(1, 1, 5, 7), Shape(4, 3, 5, 7, 2, True), Shape(9, 8, 33, 40, 2)


def training_problem(shape, mode="lstm", dtype="float32"):
    return make_problem(mode, shape, dtype, seed=1)


@pytest.fixture
def cached_calls(monkeypatch):
    """The number of calls that were cached calls."""
    counts = {"forward": 0, "backward": 0}
    for name, kind in (("forward", cached_call.CachedForward), ("backward", cached_call.CachedBackward)):
        plain = kind.__call__

        def counted(self, *arguments, plain=plain, name=name):
            result = plain(self, *arguments)
            counts[name] += result is not None
            return result

        monkeypatch.setattr(kind, "__call__", counted)
    return counts


def prime(op, *arguments, **options):
    """Two checked calls, so that the next one can be a cached call."""
    for _ in range(2):
        result = op.forward(*arguments, **options)
    return result


def test_the_object_layout_of_this_interpreter_is_known():
    assert ndarray_abi.object_layout() is not None


@pytest.mark.parametrize("mode", ["gru", "lstm"])
def test_calls_with_resets(cached_calls, mode):
    """They are cached calls too, whatever the marks; those of training may change before backward."""
    problem = training_problem(SHAPES[1], mode)
    op, other = RNNOp(problem.spec), RNNOp(problem.spec)
    arrays, size = (problem.x, problem.params, problem.states), problem.x.shape[:2]
    for number in range(5):
        resets = np.random.default_rng(number).random(size) < 0.4
        expected = other.forward(*arrays, resets=resets.tolist())[:2]  # a list is no array: a checked call
        assert_same_bits(op.forward(*arrays, resets=resets)[:2], expected)
        *results, reserve = op.forward(*arrays, training=True, resets=resets)
        assert_same_bits(tuple(results), expected)
        *_, checked = other.forward(*arrays, training=True, resets=resets.tolist())
        resets[:] = True
        gradients = op.backward(problem.dy, problem.dstates, reserve)
        assert_same_bits(gradients, other.backward(problem.dy, problem.dstates, checked, grad_req="write"))
    assert cached_calls["forward"] == 6
    assert cached_calls["backward"] >= 3
    before = dict(cached_calls)
    for wrong in (resets[:, ::-1], resets.astype(np.uint8).view(bool)[:, :1].repeat(size[1], 1)):
        assert_same_bits(op.forward(*arrays, resets=wrong)[:2], other.forward(*arrays, resets=wrong.tolist())[:2])
    with pytest.raises(ValueError, match="resets must be bools of shape"):
        op.forward(*arrays, resets=resets[1:])
    assert cached_calls["forward"] == before["forward"] + 1  # of the two, the contiguous one


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", [*MODES, cells.slstm], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_cached_calls_give_the_bits_of_checked_calls(cached_calls, shape, mode, dtype, threads):
    problem = training_problem(shape, mode, dtype)
    op = RNNOp(problem.spec)
    rng = np.random.default_rng(3)
    with fusedrnn.thread_limits(threads):
        for params in (problem.params, frozen(problem.params)):
            expected = prime(op, problem.x, params, problem.states)
            before = cached_calls["forward"]
            out = np.full_like(expected[0], np.nan)
            # Other arrays of the same shapes.
            x = rng.permuted(problem.x, axis=0)
            result = op.forward(x, params, problem.states, out=out)
            assert result[0] is out and result[2] is None
            assert cached_calls["forward"] == before + 1
            assert_same_bits(result[:2], RNNOp(problem.spec).forward(x, params, problem.states)[:2])
            assert_same_bits(op.forward(problem.x, params, problem.states)[:2], expected[:2])
        results, reserves = [], []
        for _ in range(4):
            y, states, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
            results.append((y, states))
            reserves.append(reserve)
        assert_same_bits(results[0], results[3])
        assert repr(reserves[0]) == repr(reserves[3])
        gradients = [op.backward(problem.dy, problem.dstates, reserve) for reserve in reversed(reserves)]
        assert cached_calls["backward"] == 2
        for other in gradients[1:]:
            assert_same_bits(gradients[0], other)


def test_changed_parameters_are_noticed(cached_calls):
    problem = training_problem(SHAPES[2])
    op, params = RNNOp(problem.spec), problem.params.copy()
    for training in (False, True):
        prime(op, problem.x, params, problem.states, training=training)
        for index in (0, -1, params.size // 2):
            params[index] += 1
            before = cached_calls["forward"]
            result = op.forward(problem.x, params, problem.states, training=training)[:2]
            assert cached_calls["forward"] == before + 1
            assert_same_bits(result, RNNOp(problem.spec).forward(problem.x, params, problem.states)[:2])


def test_other_parameters_are_noticed():
    problem = training_problem(SHAPES[2])
    op, others = RNNOp(problem.spec), [problem.params, frozen(problem.params), -problem.params, frozen(-problem.params)]
    for params in others * 3:
        expected = RNNOp(problem.spec).forward(problem.x, params)[0]
        assert_same_bits(op.forward(problem.x, params)[0], expected)


def unlike(problem):
    """Arguments that differ from the problem's in something that a guard must notice."""
    x, params, states = problem.x, problem.params, problem.states
    padded = np.zeros((*x.shape[:2], x.shape[2] + 3), x.dtype)
    padded[..., : x.shape[2]] = x
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    return {
        "fewer steps": (x[:-1], params, states),
        "more steps": (np.concatenate([x, x]), params, states),
        "strided": (padded[..., : x.shape[2]], params, states),
        "backwards": (x[::-1], params, states),
        "unaligned": (unaligned, params, states),
        "column order": (np.asfortranarray(x), params, states),
        "subclass": (x.view(Sub), params, states),
        "no states": (x, params, None),
        "states in a list": (x, params, list(states)),
        "strided parameters": (x, np.repeat(params, 2)[::2], states),
        "strided states": (x, params, tuple(np.repeat(state, 2, axis=2)[..., ::2] for state in states)),
    }


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize("name", unlike(training_problem(SHAPES[1])))
@pytest.mark.parametrize("training", [False, True])
def test_other_arguments_lead_to_a_checked_call(name, training):
    problem = training_problem(SHAPES[1])
    op = RNNOp(problem.spec)
    prime(op, problem.x, problem.params, problem.states, training=training)
    x, params, states = unlike(problem)[name]
    result = op.forward(x, params, states, training=training)[:2]
    plain = np.ascontiguousarray(x).view(np.ndarray).copy(), params.copy()
    states = None if states is None else tuple(state.copy() for state in states)
    assert_same_bits(result, RNNOp(problem.spec).forward(*plain, states)[:2])


BAD = {
    "list": lambda p: ((p.x.tolist(), p.params, p.states), TypeError),
    "dtype": lambda p: ((p.x.astype(np.float64), p.params, p.states), TypeError),
    "byte order": lambda p: ((p.x.astype(p.x.dtype.newbyteorder()), p.params, p.states), TypeError),
    "features": lambda p: ((np.zeros((4, 3, 6), np.float32), p.params, p.states), ValueError),
    "axes": lambda p: ((p.x[0], p.params, p.states), ValueError),
    "no parameters": lambda p: ((p.x, None, p.states), TypeError),
    "few parameters": lambda p: ((p.x, p.params[:-1], p.states), ValueError),
    "one state": lambda p: ((p.x, p.params, p.states[:1]), ValueError),
    "array of states": lambda p: ((p.x, p.params, p.states[0]), TypeError),
    "small state": lambda p: ((p.x, p.params, (p.states[0], p.states[1][:, :1])), ValueError),
    "masked": lambda p: ((np.ma.masked_array(p.x), p.params, p.states), TypeError),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [False, True])
def test_errors_are_those_of_a_checked_call(name, training):
    problem = training_problem(SHAPES[1])
    arguments, kind = BAD[name](problem)
    messages = []
    for op in (RNNOp(problem.spec), RNNOp(problem.spec)):
        with pytest.raises(kind) as caught:
            op.forward(*arguments, training=training)
        messages.append(str(caught.value))
        prime(op, problem.x, problem.params, problem.states, training=training)
        with pytest.raises(kind) as caught:
            op.forward(*arguments, training=training)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


def test_out_is_checked_at_every_call():
    problem = training_problem(SHAPES[1])
    op = RNNOp(problem.spec)
    y, *_ = prime(op, problem.x, problem.params, problem.states)
    memory = np.empty(y.size + problem.x.size, np.float32)
    x = memory[: problem.x.size].reshape(problem.x.shape)
    x[:] = problem.x
    read_only = y.copy()
    read_only.flags.writeable = False
    for out, words in (
        (memory[: y.size].reshape(y.shape), "share memory"),
        (read_only, "writable"),
        (y[:, ::-1][:, :, ::-1], "contiguous"),
        (y[:-1], "shape"),
        (y.astype(np.float64), "dtype"),
        ("here", "NumPy array"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            op.forward(x, problem.params, problem.states, out=out)
    right = memory[problem.x.size :].reshape(y.shape)
    assert_same_bits(op.forward(x, problem.params, problem.states, out=right)[0], y)
    strided = np.zeros((*y.shape[:2], y.shape[2] + 5), np.float32)
    for _ in range(3):
        written = op.forward(x, problem.params, out=strided[..., : y.shape[2]])[0]
        assert_same_bits(written, op.forward(x, problem.params)[0])
    assert not strided[..., y.shape[2] :].any()


def test_backward_calls_that_differ(cached_calls):
    """Requests, buffers and missing gradients change from call to call."""
    problem = training_problem(SHAPES[1])
    op, fresh = RNNOp(problem.spec), RNNOp(problem.spec)
    reserve = op.forward(problem.x, problem.params, problem.states, training=True)[2]
    again = fresh.forward(problem.x, problem.params, problem.states, training=True)[2]
    written = op.backward(problem.dy, problem.dstates, reserve)
    calls = [
        {"dy": problem.dy, "dstates": problem.dstates},
        {"dy": None, "dstates": problem.dstates},
        {"dy": problem.dy, "dstates": None},
        {"dy": problem.dy, "dstates": (None, problem.dstates[1])},
        {"dy": problem.dy, "dstates": problem.dstates, "grad_req": {"x": "null"}},
        {"dy": problem.dy, "dstates": problem.dstates, "grad_req": {"params": "null", "states": "null"}},
        {"dy": problem.dy, "dstates": problem.dstates, "grad_req": "add"},
        {"dy": problem.dy, "dstates": problem.dstates, "grad_req": "write", "buffers": True},
    ]
    for call in calls * 2:
        arguments = dict(call)
        with_buffers = arguments.pop("buffers", False) or arguments.get("grad_req") == "add"
        results = []
        for _ in range(3):
            for each, residuals in ((op, reserve), (fresh, again)):
                out = (np.ones_like(written[0]), np.ones_like(written[1]), tuple(map(np.ones_like, written[2])))
                if each is fresh:
                    fresh._call_cache.backward = None  # so that every call is checked
                results.append(each.backward(reserve=residuals, **arguments, out=out if with_buffers else None))
        for other in results[1:]:
            for first, second in zip(results[0], other, strict=True):
                assert (first is None) is (second is None)
                if first is not None:
                    assert_same_bits(first, second)
    assert cached_calls["backward"] >= len(calls)


def test_buffers_that_share_memory_are_refused_again():
    problem = training_problem(SHAPES[1])
    op = RNNOp(problem.spec)
    reserve = op.forward(problem.x, problem.params, problem.states, training=True)[2]
    for _ in range(3):
        dx, dparams, states = op.backward(problem.dy, problem.dstates, reserve)
        op.backward(problem.dy, problem.dstates, reserve, out=(dx, dparams, states))
    with pytest.raises(ValueError, match="share memory"):
        op.backward(problem.dy, problem.dstates, reserve, out=(dx, dparams, (states[0], states[0])))
    with pytest.raises(ValueError, match="share memory"):
        op.backward(problem.dy, problem.dstates, reserve, out=(dx, dparams, problem.dstates))
    with pytest.raises(ValueError, match="out"):
        op.backward(problem.dy, problem.dstates, reserve, out=(dx, dparams))
    with pytest.raises(ValueError, match="grad_req"):
        op.backward(problem.dy, problem.dstates, reserve, grad_req="read")


def test_reserves_of_other_calls(cached_calls):
    """With lengths, of other sizes, with fewer saved values, of another op: a cached call accepts none of them."""
    problem = training_problem(SHAPES[1])
    spec, x, params, states = problem.spec, problem.x, problem.params, problem.states
    op = RNNOp(spec)
    lengths = [1, 4, 2]
    reserves = [
        op.forward(x, params, states, training=True)[2],
        op.forward(x, params, states, training=True, lengths=lengths)[2],
        op.forward(x, params, states, training=True, reserve="states")[2],
        RNNOp(spec).forward(x, params, states, training=True)[2],
        RNNOp(spec, "reference").forward(x, params, states, training=True)[2],
    ]
    for _ in range(3):
        gradients = [op.backward(problem.dy, problem.dstates, reserve) for reserve in reserves[:4]]
    for other in (2, 3):
        assert_same_bits(gradients[0], gradients[other])
    expected = RNNOp(spec).backward(problem.dy, problem.dstates, reserves[1])
    assert_same_bits(gradients[1], expected)
    shorter = op.forward(x[:2], params, states, training=True)[2]
    assert op.backward(problem.dy[:2], problem.dstates, shorter)[0].shape == x[:2].shape
    with pytest.raises(ValueError, match="dy must have shape"):
        op.backward(problem.dy, problem.dstates, shorter)


def operators():
    """An op of one entry, an op of a chain of entries, and the initial states of each."""
    spec, states = RNNSpec("lstm", 3, 4), (np.ones((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32))
    return [(RNNOp(spec), states), (NetworkOp(NetworkSpec((spec,))), (states,))]


@pytest.mark.parametrize(("op", "states"), operators(), ids=["rnn", "network"])
def test_reserves_of_other_kinds(op, states):
    """Of calls with ``reset_states`` or ``all_states``: their backward takes or returns more."""
    x, dy = np.ones((5, 2, 3), np.float32), np.ones((5, 2, 4), np.float32)
    params, resets = np.full(op.spec.layout.size, 0.1, np.float32), np.zeros((5, 2), bool)
    resets[2] = True
    reserve = op.forward(x, params, training=True, resets=resets, reset_states=states)[2]
    expected = op.backward(dy, None, reserve)
    for _ in range(3):
        op.backward(dy, None, op.forward(x, params, training=True, resets=resets)[2])
    reserve = op.forward(x, params, training=True, resets=resets, reset_states=states)[2]
    actual = op.backward(dy, None, reserve)
    assert len(actual) == 4
    assert_same_bits(actual, expected)
    for _ in range(3):
        op.backward(dy, None, op.forward(x, params, training=True)[2])
    reserve = op.forward(x, params, training=True, all_states=True)[2]
    with pytest.raises(TypeError, match="dy must be None or a tuple"):
        op.backward(dy, None, reserve)


@pytest.mark.parametrize("number", range(2))
def test_calls_of_another_engine(number):
    """An engine without resets takes the plain calls, and the engine ``cpu`` those with resets."""
    registry.register("plain", ReferenceEngine, Capabilities(), order=50)
    try:
        op, _ = operators()[number]
        x, dy = np.ones((5, 2, 3), np.float32), np.ones((5, 2, 4), np.float32)
        params, resets = np.full(op.spec.layout.size, 0.1, np.float32), np.zeros((5, 2), bool)
        for options in ({"resets": resets}, {}, {"resets": resets}):
            for _ in range(3):
                reserve = op.forward(x, params, training=True, **options)[2]
                assert reserve.backend == ("cpu" if options else "plain")
                op.backward(dy, None, reserve)
    finally:
        registry.unregister("plain")


def test_dropout_draws_a_new_seed():
    spec = RNNSpec("gru", 6, 9, 2, dropout=0.5)
    rng = np.random.default_rng(0)
    x, params = rng.random((5, 4, 6), np.float32), rng.random(spec.layout.size, np.float32)
    op = RNNOp(spec)
    results = [op.forward(x, params, training=True) for _ in range(5)]
    assert len({reserve.seed for *_, reserve in results}) == 5
    for y, _, reserve in results:
        again = RNNOp(spec).forward(x, params, training=True, seed=reserve.seed)
        assert_same_bits(y, again[0])
        dy = np.ones_like(y)
        for _ in range(3):
            assert_same_bits(op.backward(dy, None, reserve), RNNOp(spec).backward(dy, None, again[2]))


def test_threads_may_change_between_calls(cached_calls):
    problem = training_problem(SHAPES[2])
    op = RNNOp(problem.spec)
    expected = prime(op, problem.x, problem.params)
    for count in (1, 2, 3, 1, 2, 2, 2, 2):
        with fusedrnn.thread_limits(count):
            assert_same_bits(op.forward(problem.x, problem.params)[:2], expected[:2])


def test_many_callers_at_once():
    problem = training_problem(SHAPES[2])
    op = RNNOp(problem.spec)
    expected = prime(op, problem.x, problem.params, problem.states)[:2]
    failed = []

    def work():
        for _ in range(50):
            y, states, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
            gradients = op.backward(problem.dy, problem.dstates, reserve)
            try:
                assert_same_bits((y, states), expected)
                assert_same_bits(gradients, first)
            except AssertionError as error:
                failed.append(error)

    first = op.backward(
        problem.dy, problem.dstates, op.forward(problem.x, problem.params, problem.states, training=True)[2]
    )
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_without_a_known_object_layout(monkeypatch, cached_calls):
    monkeypatch.setattr(ndarray_abi, "object_layout", lambda: None)
    problem = training_problem(SHAPES[1])
    op = RNNOp(problem.spec)
    results = [op.forward(problem.x, problem.params, problem.states)[:2] for _ in range(4)]
    assert not cached_calls["forward"]
    assert_same_bits(results[0], results[3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["plain", "frozen"])
def test_frozen_and_plain_parameters_in_turn(mode, first):
    """Short training calls pack frozen parameters and read others unpacked."""
    problem = training_problem(Shape(1, 2, 3, 16), mode)
    op, kinds = RNNOp(problem.spec), [problem.params, frozen(problem.params)]
    x, states = problem.x, problem.states
    y, final, reserve = RNNOp(problem.spec).forward(x, problem.params, states, training=True)
    expected = y, final, RNNOp(problem.spec).backward(problem.dy, problem.dstates, reserve)
    for params in (kinds if first == "plain" else reversed(kinds)):
        for _ in range(4):
            y, final, reserve = op.forward(x, params, states, training=True)
            assert_same_bits((y, final, op.backward(problem.dy, problem.dstates, reserve)), expected)


def test_changed_requests_are_noticed():
    """Also a mapping that is changed in place, and values that are no request."""
    problem = training_problem(SHAPES[1])
    op, requests = RNNOp(problem.spec), {"x": "write", "params": "write"}

    def backward(request, out=None):
        reserve = op.forward(problem.x, problem.params, training=True)[2]
        return op.backward(problem.dy, None, reserve, grad_req=request, out=out)

    for _ in range(4):
        written = backward(requests)
    requests["params"] = "add"
    total = written[1].copy()
    added = backward(requests, (None, total, None))[1]
    assert added is total and np.allclose(added, 2 * written[1])
    requests["params"] = "null"
    assert backward(requests)[1] is None
    requests["params"] = "nonsense"
    with pytest.raises(ValueError, match="grad_req: params"):
        backward(requests)
    for wrong in (np.array(["write", "add"]), {"x": np.ones(3)}, {"x": np.array(["write"])}):
        for _ in range(3):
            backward({"x": "write"})
        with pytest.raises(TypeError, match="grad_req"):
            backward(wrong)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_none_among_the_states_stands_for_zeros(cached_calls, mode, backend):
    """In checked calls, cached ones and streams, for each state alone and for all."""
    problem = training_problem(Shape(4, 3, 5, 7), mode)
    op = RNNOp(problem.spec, backend)
    zeros = tuple(np.zeros_like(state) for state in problem.states)
    for present in np.ndindex(*(2,) * len(zeros)):
        states = tuple(s if is_present else None for s, is_present in zip(problem.states, present, strict=True))
        full = tuple(z if s is None else s for s, z in zip(states, zeros, strict=True))
        expected = RNNOp(problem.spec, backend).forward(problem.x, problem.params, full)[:2]
        for kind in (tuple, list):
            for training in (False, True):
                for _ in range(4):
                    y, final, _ = op.forward(problem.x, problem.params, kind(states), training=training)
                    assert_same_bits((y, final), expected)
        stream = op.stream(problem.params, problem.x.shape[1], states)
        assert_same_bits(stream(problem.x), expected[0])
        stream.reset(states)
        assert_same_bits(stream(problem.x), expected[0])
    assert backend != "cpu" or cached_calls["forward"]


def test_out_with_none_among_the_states():
    problem = training_problem(SHAPES[1])
    op = RNNOp(problem.spec)
    y = op.forward(problem.x, problem.params, (problem.states[0], None))[0]
    for _ in range(4):
        out = np.full_like(y, np.nan)
        assert_same_bits(op.forward(problem.x, problem.params, (problem.states[0], None), out=out)[0], y)
