"""NumPy arrays of ml_dtypes.bfloat16: the bits of the call in float32, rounded once."""

import ml_dtypes
import numpy as np
import pytest

from fusedrnn import RNNOp, RNNSpec
from fusedrnn.number_formats import to_bfloat16
from fusedrnn.spec import MODES
from fusedrnn.testing.operand_errors import BFLOAT16_ERROR
from problems import assert_same_bits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
T, N, I, H = 6, 3, 5, 9


def network(mode="lstm", input_size=I, **more):
    """An op, and arguments that bfloat16 represents: x, params, states."""
    op = RNNOp(RNNSpec(mode, input_size, H, compute="bfloat16", **more))
    rng = np.random.default_rng(3)
    shapes = ((T, N, input_size), (op.spec.layout.size,), *op.spec.state_shape(N))
    x, params, *states = (rng.uniform(-0.7, 0.7, shape).astype(BFLOAT16) for shape in shapes)
    return op, x, params, tuple(states)


def widened(value):
    return value.astype(np.float32)


def assert_rounded(actual, expected):
    """Every bit, by the project's own definition of the rounding."""
    for array, exact in zip(actual, expected, strict=True):
        assert array.dtype == BFLOAT16
        np.testing.assert_array_equal(array.view(np.uint16), to_bfloat16(exact))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_states", [False, True])
def test_inference(mode, with_states):
    op, x, params, states = network(mode, num_layers=2, bidirectional=True)
    expected, final, _ = op.forward(widened(x), widened(params), tuple(map(widened, states)) if with_states else None)
    for _ in range(4):  # checked calls, then cached ones
        y, states_after, reserve = op.forward(x, params, states if with_states else None)
        assert_rounded((y, *states_after), (expected, *final))
        assert reserve is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"lengths": [6, 1, 3], "reserve": "states"}], ids=["full", "lengths"])
def test_training(mode, options):
    op, x, params, states = network(mode)
    dy = np.cos(np.arange(T * N * H).reshape(T, N, H)).astype(BFLOAT16)
    floats = widened(x), widened(params), tuple(map(widened, states))
    y, final, reserve = op.forward(*floats, training=True, **options)
    dx, dparams, dinitial = op.backward(widened(dy), final, reserve)
    for _ in range(4):
        actual_y, actual_final, reserve = op.forward(x, params, states, training=True, **options)
        assert_rounded((actual_y, *actual_final), (y, *final))
        actual_dx, actual_dparams, actual_dinitial = op.backward(dy, final, reserve)
        assert_rounded((actual_dx, actual_dparams, *actual_dinitial), (dx, dparams, *dinitial))
        assert reserve.steps == T
        assert reserve.nbytes > 0


def test_against_float64():
    """One rounding of the output beside those of the operands."""
    op, x, params, _ = network("gru", num_layers=2)
    y, _, _ = op.forward(x, params)
    exact = RNNOp(RNNSpec("gru", I, H, num_layers=2, dtype="float64"), "reference")
    expected, _, _ = exact.forward(x.astype(np.float64), params.astype(np.float64))
    error = np.abs(y.astype(np.float64) - expected)
    assert error.max() <= 4 * BFLOAT16_ERROR * np.abs(expected).max()


def test_results_have_the_dtype_of_their_argument():
    op, x, params, states = network()
    h0, c0 = states
    y, (h_n, c_n), reserve = op.forward(x, widened(params), (widened(h0), None), training=True)
    assert (y.dtype, h_n.dtype, c_n.dtype) == (BFLOAT16, np.float32, BFLOAT16)
    dx, dparams, (dh0, dc0) = op.backward(np.ones((T, N, H), np.float32), (None, c_n), reserve)
    assert (dx.dtype, dparams.dtype, dh0.dtype, dc0.dtype) == (BFLOAT16, np.float32, np.float32, BFLOAT16)
    y, (h_n, c_n), _ = op.forward(widened(x), params, (None, c0))
    assert (y.dtype, h_n.dtype, c_n.dtype) == (np.float32, np.float32, BFLOAT16)


def test_buffers():
    """Of either type; float32 buffers of parameters accumulate without rounding."""
    op, x, params, _ = network()
    expected, _, reserve = op.forward(x, params, training=True)
    out = np.full((T, 2 * N, H), np.nan, BFLOAT16)[:, ::2]
    y, _, _ = op.forward(x, params, out=out)
    assert y is out
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    out = np.empty((T, N, H), np.float32)
    assert op.forward(x, params, out=out)[0] is out
    assert_rounded((expected,), (out,))
    dy = np.ones_like(expected)
    dx, dparams, _ = op.backward(dy, None, reserve)
    exact = op.backward(widened(dy), None, reserve, out=(None, np.zeros(params.shape, np.float32), None))[1]
    sums, dx_buffer = np.ones(params.shape, np.float32), np.full_like(dx, 2)
    requests = {"x": "add", "params": "add", "states": "null"}
    results = op.backward(dy, None, reserve, grad_req=requests, out=(dx_buffer, sums, None))
    assert results[0] is dx_buffer
    assert results[1] is sums
    assert results[2] is None
    assert_same_bits(sums, exact + np.float32(1))
    np.testing.assert_allclose(widened(dx_buffer), widened(dx) + 2, rtol=2.0**-7)
    assert_rounded((dparams,), (exact,))


def test_stream():
    """The state stays float32 between chunks, so that chunks have the bits of the whole."""
    op, x, params, _ = network()
    whole, _, _ = op.forward(x, widened(params))
    stream = op.stream(widened(params), batch=N)
    parts = [stream(x[begin : begin + 2]) for begin in range(0, T, 2)]
    np.testing.assert_array_equal(np.concatenate(parts).view(np.uint16), whole.view(np.uint16))
    assert all(state.dtype == np.float32 for state in stream.states)


def test_arguments_do_not_change():
    op, x, params, states = network()
    copies = [array.copy() for array in (x, params, *states)]
    _, final, reserve = op.forward(x, params, states, training=True)
    op.backward(x[..., :1].repeat(H, axis=2), final, reserve)
    for array, copy in zip((x, params, *states), copies, strict=True):
        np.testing.assert_array_equal(array.view(np.uint16), copy.view(np.uint16))


@pytest.mark.parametrize("compute", [None, "int8"])
def test_other_formats_refuse(compute):
    op = RNNOp(RNNSpec("gru", I, H, compute=compute))
    x, params = np.zeros((T, N, I), BFLOAT16), np.zeros(op.spec.layout.size, np.float32)
    with pytest.raises(TypeError, match=r"^x must .*; got bfloat16, which RNNOp takes with compute='bfloat16'$"):
        op.forward(x, params)
    with pytest.raises(TypeError, match=r"^params must have dtype float32; got bfloat16"):
        op.forward(widened(x), params.astype(BFLOAT16))


def test_errors_name_the_type_that_was_given():
    op, x, params, states = network("gru")
    with pytest.raises(TypeError, match=r"^x must be a NumPy array; got list$"):
        op.forward(x.tolist(), params, states)
    reserve = op.forward(x, params, states, training=True)[2]
    with pytest.raises(TypeError, match=r"^dy must be a NumPy array; got list$"):
        op.backward([1], None, reserve)


def read_only(array):
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((T, N, I), np.float16)}, TypeError, "x must have dtype float32; got float16"),
        ({"x": np.zeros((T, N, I + 1), BFLOAT16)}, ValueError, r"x must have shape \(T, N, 5\); got"),
        ({"params": np.zeros(3, BFLOAT16)}, ValueError, r"params must have shape"),
        ({"states": np.zeros((2, 1, N, H), BFLOAT16)}, TypeError, "states must be a tuple of 2"),
        ({"states": (np.zeros((1, N, H), BFLOAT16),)}, ValueError, "states must be a tuple of 2"),
        ({"out": np.zeros((T, N, 1), BFLOAT16)}, ValueError, "out must have shape"),
        ({"out": read_only(np.zeros((T, N, H), BFLOAT16))}, ValueError, "out must be writable"),
        ({"out": np.zeros((T, N, H))}, TypeError, "out must have dtype float32; got float64"),
        ({"lengths": [9, 9, 9]}, ValueError, "lengths must be from 0 to 6"),
    ],
)
def test_errors(change, error, message):
    op, x, params, states = network()
    with pytest.raises(error, match=rf"^{message}"):
        op.forward(**({"x": x, "params": params, "states": states} | change))


def test_backward_errors():
    op, x, params, _ = network()
    y, _, reserve = op.forward(x, params, training=True)
    with pytest.raises(ValueError, match=r"^dy must have shape"):
        op.backward(y[:1], None, reserve)
    with pytest.raises(ValueError, match=r"^out: dparams must be writable"):
        op.backward(y, None, reserve, out=(None, read_only(np.zeros_like(params)), None))
    with pytest.raises(ValueError, match=r"^out: dx must be None where grad_req is 'null'"):
        op.backward(y, None, reserve, grad_req={"x": "null"}, out=(np.zeros_like(x), None, None))
    with pytest.raises(ValueError, match=r"^reserve must come from an op of"):
        RNNOp(RNNSpec("gru", I, H, compute="bfloat16")).backward(y, None, reserve)


def test_buffers_share_no_memory_with_arguments():
    """As in float32, although the copies in float32 share none."""
    op, x, params, states = network(input_size=H)
    rows = np.broadcast_to(np.zeros(H, BFLOAT16), (T, N, H)).view()
    rows.flags.writeable = True
    reset_states = tuple(map(np.copy, states))
    buffer = np.zeros(T * N * H, BFLOAT16)
    for name, value in {
        "x": buffer.reshape(T, N, H)[::-1],
        "params": np.concatenate((params, buffer))[-params.size :],
        "states": (states[0], buffer[: N * H].reshape(1, N, H)),
        "reset_states": (buffer[: N * H].reshape(1, N, H), reset_states[1]),
    }.items():
        options = {"x": x, "params": params, "states": states, "resets": np.ones((T, N), bool)}
        out = value[-buffer.size :].reshape(T, N, H) if name == "params" else buffer.reshape(T, N, H)
        with pytest.raises(ValueError, match=rf"^out must not share memory with {name}$"):
            op.forward(**(options | {"reset_states": reset_states} | {name: value}), out=out)
    with pytest.raises(ValueError, match=r"^out must have its last axis contiguous and no shared rows; got strides"):
        op.forward(x, params, out=rows)


def test_gradients_share_no_memory():
    op, x, params, _ = network(input_size=H)
    y, (h_n, c_n), reserve = op.forward(x, params, training=True)
    dparams = np.zeros(params.size + y.size, BFLOAT16)
    shared = dparams[-y.size :].reshape(y.shape)
    for out, message in (
        ((y, None, None), "out: dx must not share memory with dy"),
        ((None, None, (h_n, c_n.copy())), "out: dh0 must not share memory with dstates"),
        ((shared, dparams[-params.size :], None), "out: dparams must not share memory with out: dx"),
        ((None, None, (shared[0][None], shared[0][None])), "out: dc0 must not share memory with out: dh0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            op.backward(y, (h_n, c_n), reserve, out=out)


def test_a_float32_reserve_refuses_gradients_of_bfloat16():
    op, x, params, _ = network()
    y, _, reserve = op.forward(widened(x), widened(params), training=True)
    with pytest.raises(TypeError, match=r"^dy must have dtype float32; got bfloat16$"):
        op.backward(y.astype(BFLOAT16), None, reserve)


@pytest.mark.parametrize(("compute", "array", "hint"), [
    ("bfloat16", np.zeros((T, N, I)), ": convert it with astype"),
    ("int8", np.zeros((T, N, I)), ": convert it with astype"),
    (None, np.zeros((T, N, I), ">f4"), ": convert it with astype"),
    (None, np.zeros((T, N, I)), ": convert it with astype, or use a spec of dtype='float64'"),
])  # fmt: skip
def test_advice_can_be_followed(compute, array, hint):
    """A format of operands needs a spec of float32, and no spec has another byte order."""
    op = RNNOp(RNNSpec("gru", I, H, compute=compute))
    with pytest.raises(TypeError) as error:
        op.forward(array, np.zeros(op.spec.layout.size, np.float32))
    assert str(error.value) == f"x must have dtype float32; got {array.dtype}{hint}"
