"""Backward names bad input in an error before it writes anything, and answers every request."""

import copy
import itertools
import pickle
import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fusedrnn
from fusedrnn import Reserve, RNNOp, RNNSpec
from problems import bits

T, N, I, H = 4, 3, 5, 6
SPEC = RNNSpec("lstm", I, H, num_layers=2, bidirectional=True)
DROPPING = RNNSpec("gru", I, H, num_layers=2, dropout=0.5)
RNG = np.random.default_rng(0)
LENGTHS = [2, 0, 4]
PADDING = np.arange(T)[:, None] >= np.array(LENGTHS)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X, PARAMS = numbers(T, N, I), numbers(SPEC.layout.size) / 2
STATES = tuple(numbers(*shape) for shape in SPEC.state_shape(N))
DY = numbers(T, N, SPEC.output_size)
DSTATES = tuple(numbers(*shape) for shape in SPEC.state_shape(N))
SHAPES = {"dx": X.shape, "dparams": PARAMS.shape, "dh0": STATES[0].shape, "dc0": STATES[1].shape}


@pytest.fixture(params=["cpu", "reference"], scope="module")
def op(request):
    return RNNOp.get(SPEC, request.param)


@pytest.fixture(scope="module")
def reserve(op):
    return op.forward(X, PARAMS, STATES, training=True)[2]


@pytest.fixture(scope="module")
def gradients(op, reserve):
    """The expected gradients, flat, of a call without options."""
    return flat(op.backward(DY, DSTATES, reserve))


def flat(result):
    dx, dparams, dstates = result
    return dict(zip(SHAPES, (dx, dparams, *(dstates or (None, None))), strict=True))


def buffers(fill=np.nan):
    return tuple(np.full(shape, fill, np.float32) for shape in SHAPES.values())


def triple(dx, dparams, dh0, dc0):
    return dx, dparams, (dh0, dc0)


def assert_same(actual, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(bits(actual[name]), bits(value), err_msg=name)


def backward(op, reserve, **changes):
    """A valid call apart from the changes; if it raises an error, its buffers must be untouched."""
    out = buffers(7)
    arguments = {"dy": DY, "dstates": DSTATES, "reserve": reserve, "out": triple(*out), **changes}
    try:
        return op.backward(arguments.pop("dy"), arguments.pop("dstates"), arguments.pop("reserve"), **arguments)
    except (TypeError, ValueError):
        for array in out:
            assert (array == 7).all()
        raise


def read_only(array):
    array.flags.writeable = False
    return array


def misaligned(shape):
    return np.zeros(int(np.prod(shape)) * 4 + 1, np.uint8)[1:].view(np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "must be a NumPy array; got int"),
        (DY.tolist(), TypeError, "must be a NumPy array; got list"),
        (np.ma.masked_array(DY), TypeError, "must be a NumPy array; got MaskedArray"),
        (DY.astype(np.float64), TypeError, "must have dtype float32; got float64"),
        (DY.astype(">f4"), TypeError, "must have dtype float32; got >f4"),
        (DY[1:], ValueError, r"must have shape \(4, 3, 12\); got \(3, 3, 12\)"),
        (DY[:, :1], ValueError, r"must have shape \(4, 3, 12\); got \(4, 1, 12\)"),
        (DY[..., :H], ValueError, r"must have shape \(4, 3, 12\); got \(4, 3, 6\)"),
        (DY[0], ValueError, r"must have shape \(4, 3, 12\); got \(3, 12\)"),
    ],
)
def test_bad_dy(op, reserve, wrong, error, message):
    with pytest.raises(error, match=f"^dy {message}"):
        backward(op, reserve, dy=wrong)


@pytest.mark.parametrize("wrong", [np.stack(DSTATES), DSTATES[0], 3, "ab", {"h": 1}, iter(DSTATES)], ids=type)
def test_dstates_that_are_no_tuple(op, reserve, wrong):
    message = f"^dstates must be a tuple of 2: dh_n .*, dc_n .*; got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=message):
        backward(op, reserve, dstates=wrong)


@pytest.mark.parametrize("wrong", [(), DSTATES[:1], DSTATES * 2, (None,)], ids=len)
def test_number_of_dstates(op, reserve, wrong):
    with pytest.raises(ValueError, match=f"^dstates must be a tuple of 2: .*; got a sequence of {len(wrong)}"):
        backward(op, reserve, dstates=wrong)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (0, TypeError, "must be a NumPy array; got int"),
        (DSTATES[0].astype(np.float64), TypeError, "must have dtype float32; got float64"),
        (DSTATES[0][:2], ValueError, r"must have shape \(4, 3, 6\); got \(2, 3, 6\)"),
        (DSTATES[0][:, :2], ValueError, r"must have shape \(4, 3, 6\); got \(4, 2, 6\)"),
        (DSTATES[0][0], ValueError, r"must have shape \(4, 3, 6\); got \(3, 6\)"),
    ],
)
def test_a_wrong_dstate(op, reserve, index, wrong, error, message):
    dstates = list(DSTATES)
    dstates[index] = wrong
    with pytest.raises(error, match=f"^dstates: d{'hc'[index]}_n {message}"):
        backward(op, reserve, dstates=dstates)


@pytest.mark.parametrize("wrong", [None, 3, X, "gates", Reserve], ids=type)
def test_reserve_of_a_wrong_type(op, wrong):
    with pytest.raises(TypeError, match=r"^reserve must be .*forward returned"):
        backward(op, wrong)


@pytest.mark.parametrize("other", [RNNSpec("lstm", I, H), RNNSpec("gru", I, H, num_layers=2, bidirectional=True)])
def test_reserve_of_another_spec(op, other):
    params = np.zeros(other.layout.size, np.float32)
    _, _, reserve = RNNOp.get(other, op.backend).forward(X, params, training=True)
    with pytest.raises(ValueError, match=f"^reserve must come from an op of {re.escape(str(SPEC))}; got one of RNNSp"):
        backward(op, reserve)


def test_reserve_of_another_engine(op, reserve):
    other = {"cpu": "reference", "reference": "cpu"}[op.backend]
    with pytest.raises(ValueError, match=f"^reserve must come from backend {other}; got one from {op.backend}"):
        backward(RNNOp.get(SPEC, other), reserve)


def test_reserve_of_another_op_of_the_same_spec(op, reserve, gradients):
    """As when the op of the forward call has been dropped from the cache of ops."""
    assert_same(flat(backward(RNNOp(SPEC, op.backend), reserve)), gradients)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, r"^grad_req must be one of write, add, null, or a mapping .*; got NoneType"),
        (True, TypeError, r"^grad_req must be one of .*; got bool"),
        (["write"] * 3, TypeError, r"^grad_req must be one of .*; got list"),
        ("WRITE", ValueError, r"^grad_req must be one of write, add, null; got 'WRITE'"),
        ("", ValueError, r"^grad_req must be one of write, add, null; got ''"),
        ({"dx": "write"}, ValueError, r"^grad_req must have keys among x, params, states; got 'dx'"),
        ({"x": "write", 3: "add"}, ValueError, r"^grad_req must have keys among x, params, states; got 3"),
        ({"x": "inplace"}, ValueError, r"^grad_req: x must be one of write, add, null; got 'inplace'"),
        ({"params": None}, TypeError, r"^grad_req: params must be one of write, add, null; got None"),
        ({"states": ("add", "add")}, TypeError, r"^grad_req: states must be one of .*; got \('add', 'add'\)"),
    ],
    ids=repr,
)
def test_bad_grad_req(op, reserve, wrong, error, message):
    with pytest.raises(error, match=message):
        backward(op, reserve, grad_req=wrong)


@pytest.mark.parametrize("wrong", [X, 3, "abc", {"x": X}, iter(buffers())], ids=type)
def test_out_that_is_no_triple(op, reserve, wrong):
    message = f"^out must be None or a tuple of 3: dx, dparams, dstates; got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=message):
        backward(op, reserve, out=wrong)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_number_of_out(op, reserve, count):
    with pytest.raises(ValueError, match=f"^out must be None or a tuple of 3: .*; got a sequence of {count}"):
        backward(op, reserve, out=(None,) * count)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda shape: np.zeros(shape).tolist(), TypeError, "must be a NumPy array; got list"),
        (lambda shape: np.zeros(shape), TypeError, "must have dtype float32; got float64"),
        (lambda shape: np.zeros((*shape, 1), np.float32), ValueError, "must have shape .*; got"),
        (lambda shape: np.zeros(shape, np.float32)[1:], ValueError, "must have shape .*; got"),
        (lambda shape: read_only(np.zeros(shape, np.float32)), ValueError, "must be writable"),
        (misaligned, ValueError, "must be aligned"),
        (lambda shape: np.zeros((*shape, 2), np.float32)[..., 0], ValueError, "must have its last axis contiguous"),
        (lambda shape: np.zeros(shape, np.float32)[..., ::-1], ValueError, "must have its last axis contiguous"),
        (lambda shape: np.broadcast_to(np.float32(0), shape), ValueError, "must be writable"),
    ],
    ids=["list", "dtype", "ndim", "shape", "read-only", "misaligned", "strided", "backwards", "broadcast"],
)
def test_a_wrong_buffer(op, reserve, name, make, error, message):
    out = dict(zip(SHAPES, buffers(7), strict=True))
    out[name] = make(SHAPES[name])
    for grad_req in ("write", "add"):
        with pytest.raises(error, match=f"^out: {name} {message}"):
            backward(op, reserve, out=triple(*out.values()), grad_req=grad_req)
    assert all((array == 7).all() for other, array in out.items() if other != name)


def test_buffers_that_hold_an_element_twice(op, reserve):
    out = buffers(7)
    twice = as_strided(np.zeros(T * N * I, np.float32), X.shape, (N * 4, 4, 4))
    with pytest.raises(ValueError, match=r"^out: dx must have .* no shared rows"):
        backward(op, reserve, out=triple(twice, *out[1:]))
    for index, name in ((2, "dh0"), (3, "dc0")):
        wrong = list(buffers(7))
        wrong[index] = np.zeros((4, 2 * N, H), np.float32)[:, ::2]
        with pytest.raises(ValueError, match=f"^out: {name} must be contiguous; got strides"):
            backward(op, reserve, out=triple(*wrong))
        wrong[index] = np.zeros((N, 4, H), np.float32).transpose(1, 0, 2)
        with pytest.raises(ValueError, match=f"^out: {name} must be contiguous; got strides"):
            backward(op, reserve, out=triple(*wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "got"),
    [
        (np.stack(DSTATES), TypeError, "ndarray"),
        (DSTATES[0], TypeError, "ndarray"),
        (DSTATES[:1], ValueError, "1"),
        ((*DSTATES, None), ValueError, "3"),
    ],
)
def test_out_dstates_that_are_no_tuple(op, reserve, wrong, error, got):
    with pytest.raises(error, match=f"^out: dstates must be a tuple of 2: dh0 .*, dc0 .*; got (a sequence of )?{got}$"):
        backward(op, reserve, out=(None, None, wrong))
    with pytest.raises(TypeError, match=r"^out: dc0 must be a NumPy array; got NoneType"):
        backward(op, reserve, out=(None, None, (buffers()[2], None)))


@pytest.mark.parametrize("pair", list(itertools.combinations(SHAPES, 2)), ids=" ".join)
def test_buffers_that_share_memory(op, reserve, pair):
    memory = np.full(PARAMS.size + 1000, 7, np.float32)
    out = dict(zip(SHAPES, buffers(7), strict=True))
    for index, name in enumerate(pair):
        size = int(np.prod(SHAPES[name]))
        out[name] = memory[index : index + size].reshape(SHAPES[name])
    with pytest.raises(ValueError, match=f"^out: {pair[1]} must not share memory with out: {pair[0]}$"):
        backward(op, reserve, out=triple(*out.values()))
    assert (memory == 7).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("source", ["dy", "dstates"])
def test_a_buffer_in_the_memory_of_an_input(op, reserve, name, source):
    memory = numbers(PARAMS.size + DY.size)
    before = memory.copy()
    out = dict(zip(SHAPES, buffers(7), strict=True))
    out[name] = memory[: int(np.prod(SHAPES[name]))].reshape(SHAPES[name])
    shared = {
        "dy": memory[: DY.size].reshape(DY.shape),
        "dstates": (None, memory[: DSTATES[1].size].reshape(DSTATES[1].shape)),
    }
    with pytest.raises(ValueError, match=f"^out: {name} must not share memory with {source}$"):
        backward(op, reserve, out=triple(*out.values()), **{source: shared[source]})
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("name", ["x", "params", "states"])
def test_add_needs_a_buffer_and_null_has_none(op, reserve, name):
    gradient = f"d{name}"
    for out in (None, (None, None, None)):
        with pytest.raises(ValueError, match=f"^out: {gradient} must be given where grad_req is 'add'; got None$"):
            backward(op, reserve, grad_req={name: "add"}, out=out)
    with pytest.raises(ValueError, match=f"^out: {gradient} must be None where grad_req is 'null'; got "):
        backward(op, reserve, grad_req={name: "null"})


@pytest.mark.parametrize("with_buffers", [False, True], ids=["new arrays", "buffers"])
@pytest.mark.parametrize("requests", list(itertools.product(("write", "add", "null"), repeat=3)), ids=" ".join)
def test_every_combination_of_requests(op, reserve, gradients, requests, with_buffers):
    """A gradient has the same bits whatever else is computed, and wherever it is written."""
    keys = dict(zip(("x", "params", "states"), requests, strict=True))
    by_name = dict(zip(SHAPES, (*requests, requests[2]), strict=True))
    out = {name: np.full(SHAPES[name], 3 if by_name[name] == "add" else np.nan, np.float32) for name in SHAPES}
    asked = [
        out[name] if by_name[name] == "add" or (with_buffers and by_name[name] == "write") else None for name in SHAPES
    ]
    dstates = None if asked[2] is None else list(asked[2:])
    result = op.backward(DY, DSTATES, reserve, grad_req=keys, out=[*asked[:2], dstates])
    assert [value is None for value in result] == [request == "null" for request in requests]
    assert isinstance(result[2], tuple) or requests[2] == "null"
    computed = flat(result)
    for name, buffer in zip(SHAPES, asked, strict=True):
        if by_name[name] == "write":
            assert_same(computed, {name: gradients[name]})
        elif by_name[name] == "add":
            np.testing.assert_allclose(computed[name], 3 + gradients[name], rtol=1e-5, atol=1e-5)
        assert buffer is None or computed[name] is buffer


@pytest.mark.parametrize("request_all", ["write", "add", "null"])
def test_one_request_for_all(op, reserve, gradients, request_all):
    out = buffers(3)
    result = op.backward(DY, DSTATES, reserve, grad_req=request_all, out=triple(*out) if request_all == "add" else None)
    if request_all == "null":
        assert result == (None, None, None)
    elif request_all == "write":
        assert_same(flat(result), gradients)
    else:
        for name, array in zip(SHAPES, out, strict=True):
            np.testing.assert_allclose(array, 3 + gradients[name], rtol=1e-5, atol=1e-5)


def test_missing_keys_mean_write(op, reserve, gradients):
    assert_same(flat(op.backward(DY, DSTATES, reserve, grad_req={})), gradients)
    dx, dparams, dstates = op.backward(DY, DSTATES, reserve, grad_req={"x": "null"})
    assert dx is None
    np.testing.assert_array_equal(dparams, gradients["dparams"])
    assert len(dstates) == 2


def test_adding_twice_adds_each_gradient_once(op, reserve, gradients):
    """MXNet scaled the buffer at each time step."""
    out = buffers(0)
    for _ in range(2):
        op.backward(DY, DSTATES, reserve, grad_req="add", out=triple(*out))
    for name, array in zip(SHAPES, out, strict=True):
        np.testing.assert_allclose(array, 2 * gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("absent", ["dy", "dstates", "dh_n", "dc_n", "all"])
def test_none_stands_for_zeros(op, reserve, absent):
    zeros = tuple(np.zeros_like(gradient) for gradient in DSTATES)
    arguments, meaning = {"dy": DY, "dstates": DSTATES}, {"dy": DY, "dstates": DSTATES}
    if absent in ("dy", "all"):
        arguments["dy"], meaning["dy"] = None, np.zeros_like(DY)
    if absent in ("dstates", "all"):
        arguments["dstates"], meaning["dstates"] = None, zeros
    elif absent != "dy":
        index = ("dh_n", "dc_n").index(absent)
        arguments["dstates"] = [None if at == index else dstate for at, dstate in enumerate(DSTATES)]
        meaning["dstates"] = [zeros[at] if at == index else dstate for at, dstate in enumerate(DSTATES)]
    actual, expected = (flat(op.backward(way["dy"], way["dstates"], reserve)) for way in (arguments, meaning))
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    if absent == "all":
        assert not any(value.any() for value in actual.values())


UNUSUAL = {
    "Fortran": np.asfortranarray,
    "backwards": lambda a: a[::-1].copy()[::-1],
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "batch first": lambda a: a.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    "read-only": lambda a: read_only(a.copy()),
    "misaligned": lambda a: np.concatenate([[0], a.ravel().view(np.uint8)]).astype(np.uint8)[1:].view(a.dtype).reshape(
        a.shape
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_gradients(op, reserve, gradients, kind):
    unusual = UNUSUAL[kind]
    dy, dstates = unusual(DY), [unusual(gradient) for gradient in DSTATES]
    before = [array.copy() for array in (dy, *dstates)]
    assert_same(flat(op.backward(dy, dstates, reserve)), gradients)
    for array, content in zip((dy, *dstates), before, strict=True):
        np.testing.assert_array_equal(array, content)


def test_gradient_of_a_sum(op, reserve):
    """dy with strides of zero, which frameworks pass for the gradient of a sum."""
    ones = np.broadcast_to(np.float32(1), DY.shape)
    assert_same(flat(op.backward(ones, None, reserve)), flat(op.backward(np.ones_like(DY), None, reserve)))


@pytest.mark.parametrize("name", ["padded rows", "batch first", "backwards"])
def test_unusual_dx(op, reserve, gradients, name):
    dx = {
        "padded rows": np.full((T, N, I + 3), 7, np.float32)[..., :I],
        "batch first": np.full((N, T, I), 7, np.float32).transpose(1, 0, 2),
        "backwards": np.full((T, N, I), 7, np.float32)[::-1],
    }[name]
    for request in ("write", "add"):
        dx[...] = 0
        result = op.backward(DY, DSTATES, reserve, out=(dx, None, None), grad_req={"x": request})
        assert result[0] is dx
        np.testing.assert_allclose(dx, gradients["dx"], rtol=1e-6, atol=1e-7)
    if name == "padded rows":
        assert (dx.base[..., I:] == 7).all()


@pytest.mark.parametrize("request_x", ["write", "add"])
def test_padding(op, request_x):
    """The padding of dy may hold anything; that of dx is zero when written and untouched when added to."""
    x, dy = X.copy(), DY.copy()
    x[PADDING], dy[PADDING] = np.nan, np.nan
    _, _, reserve = op.forward(x, PARAMS, STATES, training=True, lengths=LENGTHS)
    dx = np.full(X.shape, 3, np.float32)
    dx[PADDING] = 7
    result = flat(op.backward(dy, DSTATES, reserve, out=(dx, None, None), grad_req={"x": request_x}))
    assert (dx[PADDING] == (7 if request_x == "add" else 0)).all()
    assert all(np.isfinite(value).all() for value in result.values())
    # An empty sequence passes the gradient of its final state through.
    for name, gradient in zip(("dh0", "dc0"), DSTATES, strict=True):
        np.testing.assert_array_equal(result[name][:, 1], gradient[:, 1])
    new = op.backward(dy, DSTATES, reserve)[0]
    np.testing.assert_allclose(dx[~PADDING], new[~PADDING] + (3 if request_x == "add" else 0), rtol=1e-5, atol=1e-6)
    assert not new[PADDING].any()


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_a_reserve_belongs_to_its_forward(op, gradients, keep):
    """Later changes to the call's arrays, its results or the op do not affect it; it can be used again and again."""
    x, params, states = X.copy(), PARAMS.copy(), tuple(state.copy() for state in STATES)
    out = np.empty(DY.shape, np.float32)
    y, final, reserve = op.forward(x, params, states, training=True, out=out, reserve=keep)
    for array in (x, params, *states, y, *final):
        array[...] = np.nan
    op.forward(X[:2], PARAMS * 2, training=True)
    op.forward(X, params, training=True)
    for _ in range(3):
        assert_same(flat(op.backward(DY, DSTATES, reserve)), gradients)


def test_lengths_of_a_reserve_are_its_own(op):
    lengths = np.array(LENGTHS)
    _, _, reserve = op.forward(X, PARAMS, STATES, training=True, lengths=lengths)
    expected = flat(op.backward(DY, DSTATES, reserve))
    lengths[...] = T
    assert_same(flat(op.backward(DY, DSTATES, reserve)), expected)


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_two_forwards_before_a_backward(op, gradients, keep):
    """MXNet's op owned the reserve: a second forward overwrote the first, and a smaller batch aborted."""
    _, _, first = op.forward(X, PARAMS, STATES, training=True, reserve=keep)
    _, _, second = op.forward(X[:2, :1], -PARAMS, training=True, reserve=keep)
    small = flat(op.backward(DY[:2, :1], None, second))
    assert_same(flat(op.backward(DY, DSTATES, first)), gradients)
    assert_same(flat(op.backward(DY[:2, :1], None, second)), small)


def test_training_returns_the_results_of_inference(op):
    y, final, nothing = op.forward(X, PARAMS, STATES, lengths=LENGTHS)
    assert nothing is None
    out = np.full(DY.shape, np.nan, np.float32)
    again, states, reserve = op.forward(X, PARAMS, STATES, lengths=LENGTHS, training=True, out=out)
    assert again is out
    for trained, inferred in zip((y, *final), (again, *states), strict=True):
        np.testing.assert_array_equal(bits(trained), bits(inferred))
    assert isinstance(reserve, Reserve)


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_attributes_of_a_reserve(op, keep):
    _, _, reserve = op.forward(X, PARAMS, training=True, reserve=keep, seed=7)
    assert (reserve.steps, reserve.batch, reserve.keep, reserve.seed) == (T, N, keep, 7)
    assert reserve.spec == SPEC
    assert reserve.nbytes == op.reserve_size(T, N, keep) == op.reserve_size(T, N, reserve=keep) > X.nbytes
    backend = op.backend
    said = f"Reserve(steps=4, batch=3, keep='{keep}', seed=7, nbytes={reserve.nbytes}, backend='{backend}')"
    assert repr(reserve) == said
    assert fusedrnn.Reserve is Reserve


@pytest.mark.parametrize("spec", [SPEC, DROPPING, RNNSpec("rnn_tanh", I, H), RNNSpec("gru", 1, 1, dtype="float64")])
@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_reserve_size(op, spec, keep, lengths):
    other = RNNOp.get(spec, op.backend)
    x, params = np.zeros((T, N, spec.input_size), spec.dtype), np.zeros(spec.layout.size, spec.dtype)
    _, _, reserve = other.forward(x, params, training=True, lengths=lengths, reserve=keep)
    assert reserve.nbytes == other.reserve_size(T, N, keep)
    assert other.reserve_size(T, N, "states") <= other.reserve_size(T, N, "gates")


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, N), ValueError, "steps must be at least 1; got 0"),
        ((T, -1), ValueError, "batch must be at least 1; got -1"),
        ((1.0, N), TypeError, "steps must be an integer; got 1.0"),
        ((T, True), TypeError, "batch must be an integer; got True"),
        ((T, N, "all"), ValueError, "reserve must be one of gates, states; got 'all'"),
        ((T, N, None), TypeError, "reserve must be one of gates, states; got None"),
    ],
)
def test_bad_reserve_size(op, sizes, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        op.reserve_size(*sizes)


@pytest.mark.parametrize("ways", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_reserve_cannot_be_pickled_or_copied(reserve, ways):
    with pytest.raises(TypeError, match=r"^a Reserve cannot be pickled or copied"):
        ways(reserve)


@pytest.fixture
def dropping(op):
    params = numbers(DROPPING.layout.size)

    def forward(seed=None, spec=DROPPING, training=True):
        other = RNNOp.get(spec, op.backend)
        y, _, reserve = other.forward(X, params[: spec.layout.size], training=training, seed=seed)
        return y, reserve, other

    return forward


def test_equal_seeds_drop_equal_elements(dropping):
    y, reserve, op = dropping(seed=2**64 - 1)
    again, same, _ = dropping(seed=np.uint64(2**64 - 1))
    np.testing.assert_array_equal(y, again)
    assert reserve.seed == same.seed == 2**64 - 1
    assert type(same.seed) is int
    other, _, _ = dropping(seed=0)
    assert not np.array_equal(y, other)
    dy = numbers(*y.shape)
    for first, second in zip(op.backward(dy, None, reserve)[:2], op.backward(dy, None, same)[:2], strict=True):
        np.testing.assert_array_equal(first, second)


def test_without_a_seed_there_is_a_new_one(dropping):
    """The reserve tells it, so that the same elements can be dropped again."""
    y, reserve, _ = dropping()
    assert reserve.seed != dropping()[1].seed
    np.testing.assert_array_equal(dropping(seed=reserve.seed)[0], y)


def test_no_seed_is_drawn_where_nothing_is_dropped(dropping):
    for spec in (RNNSpec("gru", I, H, num_layers=2), RNNSpec("gru", I, H, dropout=0.5)):
        assert dropping(spec=spec)[1].seed == 0
        assert dropping(spec=spec, seed=5)[1].seed == 5
        np.testing.assert_array_equal(dropping(spec=spec)[0], dropping(spec=spec, seed=5)[0])
    inference, nothing, _ = dropping(training=False, seed=5)
    assert nothing is None
    np.testing.assert_array_equal(inference, dropping(training=False)[0])


def test_the_engines_agree(gradients):
    """Requests and buffers work alike in all engines; other tests compare each engine's gradients at every shape."""
    for backend in ("cpu", "reference"):
        op = RNNOp.get(SPEC, backend)
        _, _, reserve = op.forward(X, PARAMS, STATES, training=True)
        for name, value in flat(op.backward(DY, DSTATES, reserve)).items():
            np.testing.assert_allclose(value, gradients[name], rtol=1e-4, atol=1e-4, err_msg=name)
