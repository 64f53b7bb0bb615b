"""Bad input of every kind raises an error that names the argument; unusual but valid input works."""

import re

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import fusedrnn
from fusedrnn import RNNOp, RNNSpec

T, N, I, H = 4, 3, 5, 6
SPEC = RNNSpec("lstm", I, H, num_layers=2, bidirectional=True)
RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X, PARAMS = numbers(T, N, I), numbers(SPEC.layout.size)
STATES = tuple(numbers(*shape) for shape in SPEC.state_shape(N))
OUT_SHAPE = (T, N, 2 * H)
SIZE = PARAMS.size


def forward(**changes):
    """A valid call apart from the changes."""
    arguments = {"x": X, "params": PARAMS, "states": STATES, **changes}
    return RNNOp(SPEC).forward(arguments.pop("x"), arguments.pop("params"), arguments.pop("states"), **arguments)


def read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def misaligned(shape):
    return np.zeros(int(np.prod(shape)) * 4 + 1, np.uint8)[1:].view(np.float32).reshape(shape)


NO_ARRAYS = [None, 3, X.tolist(), memoryview(X), "x"]
WRONG_TYPES = [X.astype(np.float64), X.astype(np.float16), X.astype(">f4"), X.astype(complex), X.astype(object)]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("x", "params", "out") for value in NO_ARRAYS if (name, value) != ("out", None)],
    ids=lambda v: v if v in ("params", "out") else type(v).__name__,
)
def test_no_array(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a NumPy array; got {type(value).__name__}"):
        forward(**{name: value})


@pytest.mark.parametrize("value", WRONG_TYPES, ids=lambda v: v.dtype.str)
@pytest.mark.parametrize("name", ["x", "params", "out"])
def test_wrong_dtype(name, value):
    with pytest.raises(TypeError, match=f"^{name} must have dtype float32; got {re.escape(str(value.dtype))}"):
        forward(**{name: value})


@pytest.mark.parametrize("shape", [(), (T,), (T, I), (T, N, I + 1), (T, N, 0), (T, N, I, 1)])
def test_shape_of_x(shape):
    with pytest.raises(ValueError, match=re.escape(f"x must have shape (T, N, {I}); got {shape}")):
        forward(x=numbers(*shape))


@pytest.mark.parametrize("shape", [(0, N, I), (T, 0, I), (0, 0, I)])
def test_empty_x(shape):
    message = f"x must have at least one step and one sequence; got shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        forward(x=numbers(*shape))


@pytest.mark.parametrize("shape", [(), (0,), (SIZE - 1,), (SIZE + 1,), (1, SIZE), (SIZE, 1)])
def test_shape_of_params(shape):
    with pytest.raises(ValueError, match=re.escape(f"params must have shape ({SIZE},)") + ".*got"):
        forward(params=numbers(*shape))


@pytest.mark.parametrize("value", [np.stack(STATES), STATES[0], 3, {"h": STATES[0]}, iter(STATES)], ids=type)
def test_states_that_are_no_tuple(value):
    with pytest.raises(TypeError, match=f"^states must be a tuple of 2: h0 .*, c0 .*; got {type(value).__name__}"):
        forward(states=value)


@pytest.mark.parametrize("value", [(), STATES[:1], STATES * 2], ids=len)
def test_number_of_states(value):
    with pytest.raises(ValueError, match=f"^states must be a tuple of 2.*; got a sequence of {len(value)}"):
        forward(states=value)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "must be a NumPy array; got int"),
        (STATES[0].tolist(), TypeError, "must be a NumPy array; got list"),
        (STATES[0].astype(np.float64), TypeError, "must have dtype float32; got float64"),
        (STATES[0][:2], ValueError, r"must have shape \(4, 3, 6\); got \(2, 3, 6\)"),
        (STATES[0][:, :1], ValueError, r"must have shape \(4, 3, 6\); got \(4, 1, 6\)"),
        (STATES[0][..., :0], ValueError, r"must have shape \(4, 3, 6\); got \(4, 3, 0\)"),
        (STATES[0][None], ValueError, r"must have shape \(4, 3, 6\); got \(1, 4, 3, 6\)"),
    ],
    ids=["number", "list", "dtype", "layers", "batch", "empty", "ndim"],
)
def test_a_wrong_state(index, wrong, error, message):
    states = list(STATES)
    states[index] = wrong
    with pytest.raises(error, match=f"^states: {'hc'[index]}0 {message}"):
        forward(states=states)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0, 2.0, 3.0], TypeError, "must be integers; got float64"),
        ([True, True, False], TypeError, "must be integers; got bool"),
        ("abc", TypeError, "must be integers; got <U3"),
        ([[1], [2, 3]], TypeError, "must be an array of 3 integers"),
        ([1, None, 2], TypeError, "must be integers; got object"),
        ([], TypeError, "must be integers; got float64"),
        (np.ma.masked_array([1, 2, 3], [0, 1, 0]), TypeError, "must be an array of 3 integers; got MaskedArray"),
        (2, ValueError, r"must have shape \(3,\); got \(\)"),
        ([1, 2], ValueError, r"must have shape \(3,\); got \(2,\)"),
        ([[1, 2, 3]], ValueError, r"must have shape \(3,\); got \(1, 3\)"),
        ([1, 2, 5], ValueError, r"must be from 0 to 4, the steps of x; got 1 to 5"),
        ([1, 2, -1], ValueError, r"must be from 0 to 4, the steps of x; got -1 to 2"),
        (np.array([1, 2, 2**64 - 1], np.uint64), ValueError, "must be from 0 to 4"),
    ],
)
def test_bad_lengths(value, error, message):
    with pytest.raises(error, match=f"^lengths {message}"):
        forward(lengths=value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((T, N, H), np.float32), r"must have shape \(4, 3, 12\); got \(4, 3, 6\)"),
        (np.zeros((T, N), np.float32), "must have shape"),
        (np.zeros((T + 1, N, 2 * H), np.float32), "must have shape"),
        (read_only(np.zeros(OUT_SHAPE, np.float32)), "must be writable"),
        (misaligned(OUT_SHAPE), "must be aligned"),
        (np.zeros((T, N, 4 * H), np.float32)[..., ::2], "must have its last axis contiguous"),
        (np.zeros(OUT_SHAPE, np.float32)[..., ::-1], "must have its last axis contiguous"),
        (np.zeros(OUT_SHAPE, np.float32, order="F"), "must have its last axis contiguous"),
        (as_strided(np.zeros(2 * H, np.float32), OUT_SHAPE, (0, 0, 4)), "no shared rows"),
        (as_strided(np.zeros(T * N * 2 * H, np.float32), OUT_SHAPE, (N * 4, 4, 4)), "no shared rows"),
    ],
    ids=["D", "ndim", "T", "read-only", "misaligned", "strided", "backwards", "Fortran", "repeated", "overlapping"],
)
def test_bad_out(value, message):
    with pytest.raises(ValueError, match=f"^out .*{message}"):
        forward(out=value)


@pytest.mark.parametrize("name", ["x", "params", "states"])
def test_out_in_the_memory_of_an_input(name):
    """Inputs are read after some of the output is written."""
    memory = numbers(PARAMS.size + X.size)
    out = memory[: int(np.prod(OUT_SHAPE))].reshape(OUT_SHAPE)
    shared = {
        "x": memory[: X.size].reshape(X.shape),
        "params": memory[: PARAMS.size],
        "states": tuple(memory[start : start + STATES[0].size].reshape(STATES[0].shape) for start in (0, 3)),
    }
    with pytest.raises(ValueError, match=f"^out must not share memory with {name}"):
        forward(**{name: shared[name]}, out=out)


@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_errors_of_signal_handlers(name):
    """A handler may run while an argument is read. Its error is not one of the argument."""

    class Interrupted:
        def __array__(self, *_, **__):
            raise TimeoutError("too slow")

    with pytest.raises(TimeoutError, match="too slow"):
        forward(**{name: Interrupted()})


def test_out_in_the_memory_of_the_lengths():
    """They are copied before the output is written."""
    expected = forward(lengths=[1, 4, 2])[0]
    memory = np.zeros(expected.size, np.float32)
    out, lengths = memory.reshape(OUT_SHAPE), memory[: 2 * N].view(np.int64)
    lengths[:] = 1, 4, 2
    np.testing.assert_array_equal(forward(lengths=lengths, out=out)[0], expected)


def test_out_between_the_rows_of_x():
    """Interleaved but disjoint memory is valid, and takes more than a comparison of addresses to see."""
    spec = RNNSpec("gru", 3, 3)
    memory = numbers(64, 65, 2, 3)
    params, x, out = numbers(spec.layout.size), memory[:, :, 0], memory[:, :, 1]
    expected = RNNOp(spec).forward(x.copy(), params)[0]
    np.testing.assert_array_equal(RNNOp(spec).forward(x, params, out=out)[0], expected)
    with pytest.raises(ValueError, match=r"^out must not share memory with x"):
        RNNOp(spec).forward(x, params, out=x[::-1])


def test_out_with_strides_too_irregular_to_tell():
    """Where finding out whether memory is shared would take long, it counts as shared."""
    memory, spec = np.zeros(1 << 22, np.float32), RNNSpec("rnn_relu", 90, 94)
    x = as_strided(memory, (120, 2, 90), (4 * 1042, 4 * 416, 4))
    out = as_strided(memory[500:], (120, 2, 94), (4 * 2629, 4 * 1261, 4))
    with pytest.raises(RuntimeError):
        np.shares_memory(out, x, max_work=1000)
    with pytest.raises(ValueError, match=r"^out must not share memory with x"):
        RNNOp(spec).forward(x, np.zeros(spec.layout.size, np.float32), out=out)


def test_nothing_is_written_before_an_error():
    out = np.full(OUT_SHAPE, 7, np.float32)
    for change in ({"lengths": [1, 2, 9]}, {"params": PARAMS[1:]}, {"states": ()}, {"seed": -1}, {"reserve": "all"}):
        with pytest.raises(ValueError):
            forward(**{"lengths": [1, 2, 3], **change}, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("training", 1, TypeError, "must be True or False; got 1"),
        ("training", None, TypeError, "must be True or False; got None"),
        ("seed", -1, ValueError, r"must be from 0 to 2\*\*64 - 1; got -1"),
        ("seed", 2**64, ValueError, r"must be from 0 to 2\*\*64 - 1; got 18446744073709551616"),
        ("seed", 1.0, TypeError, "must be an integer or None; got 1.0"),
        ("seed", True, TypeError, "must be an integer or None; got True"),
        ("seed", "1", TypeError, "must be an integer or None; got '1'"),
        ("reserve", "all", ValueError, "must be one of gates, states; got 'all'"),
        ("reserve", None, TypeError, "must be one of gates, states; got None"),
        ("reserve", True, TypeError, "must be one of gates, states; got True"),
    ],
)
def test_bad_options_of_training(name, value, error, message, training):
    """An error in inference too, where they have no effect."""
    with pytest.raises(error, match=f"^{name} {message}"):
        forward(**{"training": training, name: value})


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1, np.uint64(2**64 - 1), np.int8(3)])
def test_options_of_training_without_effect_in_inference(seed):
    y, _, reserve = forward(seed=seed, reserve="states")
    np.testing.assert_array_equal(y, forward()[0])
    assert reserve is None


@pytest.mark.parametrize("make", [RNNOp, RNNOp.get])
@pytest.mark.parametrize("spec", [None, "lstm", {"mode": "lstm"}, RNNSpec])
def test_spec_of_a_wrong_type(make, spec):
    with pytest.raises(TypeError, match=f"^spec must be an RNNSpec; got {type(spec).__name__}"):
        make(spec)


@pytest.mark.parametrize("set_threads", [fusedrnn.set_num_threads, lambda n: fusedrnn.thread_limits(n).__enter__()])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (1025, ValueError), (2**70, ValueError)]
    + [(value, TypeError) for value in (1.0, "2", None, True, [2], np.float32(2))],
)
def test_bad_number_of_threads(set_threads, value, error):
    before = fusedrnn.get_num_threads()
    with pytest.raises(error, match=r"^threads must be"):
        set_threads(value)
    assert fusedrnn.get_num_threads() == before


@pytest.mark.parametrize("threads", [np.int64(2), np.uint8(2)])
def test_integers_of_numpy_are_integers(threads):
    with fusedrnn.thread_limits(threads):
        assert fusedrnn.get_num_threads() == 2


def subclass(array):
    class Named(np.ndarray):
        pass

    return array.view(Named)


@pytest.mark.parametrize("unusual", [read_only, np.asfortranarray, subclass, lambda a: a[..., ::-1].copy()[..., ::-1]])
def test_unusual_input(unusual):
    """Every input in an unusual form; test_bits covers every layout."""
    expected = forward()
    actual = forward(x=unusual(X), params=unusual(PARAMS), states=[unusual(state) for state in STATES])
    np.testing.assert_array_equal(actual[0], expected[0])
    assert type(actual[0]) is np.ndarray


@pytest.mark.parametrize("kind", [list, tuple, np.uint8, np.int32, ">i8", "strided"])
def test_unusual_lengths(kind):
    lengths = [2, 0, 4]
    converted = kind(lengths) if kind in (list, tuple) else np.repeat(lengths, 2)[::2]
    if kind not in (list, tuple, "strided"):
        converted = np.array(lengths, kind)
    np.testing.assert_array_equal(forward(lengths=converted)[0], forward(lengths=np.array(lengths))[0])


@pytest.mark.parametrize("mode", ["rnn_tanh", "lstm"])
def test_one_feature_with_any_stride(mode):
    """With I = 1 the last stride has no meaning."""
    spec = RNNSpec(mode, 1, 2)
    wide, params = numbers(T, N, 4), numbers(spec.layout.size)
    expected = RNNOp(spec).forward(wide[:, :, :1].copy(), params)[0]
    for x in (wide[:, :, :1], wide[:, :, :1].copy("F"), wide[:, :, 0::4]):
        np.testing.assert_array_equal(RNNOp(spec).forward(x, params)[0], expected)
