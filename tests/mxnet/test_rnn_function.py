"""``fusedrnn.rnn`` refuses bad input; its errors name its own arguments, not those of the operator."""

import numpy as np
import pytest

import fusedrnn

T, N, I, H = 4, 3, 5, 6
RNG = np.random.default_rng(0)
SIZE = fusedrnn.RNNSpec("lstm", I, H).layout.size


def random_array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


ARGUMENTS = {
    "data": random_array(T, N, I),
    "parameters": random_array(SIZE),
    "state": random_array(1, N, H),
    "state_cell": random_array(1, N, H),
    "state_size": H,
    "num_layers": 1,
    "mode": "lstm",
}


def rnn(**changes):
    """A valid call with these changes."""
    return fusedrnn.rnn(**{**ARGUMENTS, **changes})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("data", ARGUMENTS["data"].tolist(), TypeError, "must be a NumPy array; got list"),
        ("data", None, TypeError, "must be a NumPy array; got NoneType"),
        ("data", random_array(T, I), ValueError, r"must have shape \(T, N, I\).*got \(4, 5\)"),
        ("data", random_array(0, N, I), ValueError, r"must have shape \(T, N, I\).*got \(0, 3, 5\)"),
        ("data", random_array(T, N, 0), ValueError, r"must have shape \(T, N, I\).*got \(4, 3, 0\)"),
        ("data", ARGUMENTS["data"].astype(np.float16), TypeError, "must have dtype float32 or float64; got float16"),
        ("data", ARGUMENTS["data"].astype(">f4"), TypeError, "must have dtype float32 or float64; got >f4"),
        ("parameters", None, TypeError, "must be a NumPy array; got NoneType"),
        ("parameters", random_array(SIZE).astype(np.float64), TypeError, "must have dtype float32; got float64"),
        ("parameters", random_array(SIZE - 1), ValueError, r"must have shape \(\d+,\).*got"),
        ("state", None, TypeError, "must be a NumPy array; got NoneType"),
        ("state", random_array(1, N, H + 1), ValueError, r"must have shape \(1, 3, 6\); got \(1, 3, 7\)"),
        ("state_cell", None, ValueError, "must be given in mode 'lstm'; got None"),
        ("state_cell", [1.0], TypeError, "must be a NumPy array; got list"),
        ("state_cell", random_array(2, N, H), ValueError, r"must have shape \(1, 3, 6\); got \(2, 3, 6\)"),
        ("state_size", 0, ValueError, "must be at least 1; got 0"),
        ("state_size", 6.0, TypeError, "must be an integer"),
        ("num_layers", 0, ValueError, "must be at least 1; got 0"),
        ("mode", "LSTM", ValueError, "must be one of"),
        ("bidirectional", 1, TypeError, "must be True or False; got 1"),
        ("p", 1.0, ValueError, "must be a probability"),
        ("p", "0.5", TypeError, "must be a number"),
        ("use_sequence_length", 1, TypeError, "must be True or False; got 1"),
        ("state_outputs", "yes", TypeError, "must be True or False; got 'yes'"),
        ("lstm_state_clip_nan", 1, TypeError, "must be True or False; got 1"),
        ("projection_size", 9, ValueError, "must be smaller than state_size"),
    ],
)
def test_bad_input(name, value, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        rnn(**{name: value})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1.0, 2.0, 3.0], TypeError, "must be integers; got float64"),
        ([1, 2], ValueError, r"must have shape \(3,\)"),
        ([1, 2, 5], ValueError, "must be from 0 to 4"),
    ],
)
def test_bad_sequence_length(value, error, message):
    with pytest.raises(error, match=f"^sequence_length {message}"):
        rnn(sequence_length=value, use_sequence_length=True)


@pytest.mark.parametrize("options", [{"sequence_length": [1, 2, 3]}, {"use_sequence_length": True}], ids=list)
def test_sequence_length_and_use_sequence_length(options):
    """MXNet ignores either without the other."""
    with pytest.raises(ValueError, match=r"^sequence_length must be given if, and only if, use_sequence_length"):
        rnn(**options)


def test_state_cell_of_a_gru():
    spec = fusedrnn.RNNSpec("gru", I, H)
    with pytest.raises(ValueError, match=r"^state_cell must be None in mode 'gru'; got ndarray"):
        rnn(mode="gru", parameters=random_array(spec.layout.size))


@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({"projection_size": 3}, [(1, N, 3), (1, N, H)]),
        ({"lstm_state_clip_min": -0.1, "lstm_state_clip_max": 0.1}, [(1, N, H), (1, N, H)]),
    ],
    ids=["projection", "clip"],
)
def test_options(options, states):
    """Shapes and bounds only; test_mxnet.py tests the values."""
    spec = fusedrnn.RNNSpec("lstm", I, H, projection_size=options.get("projection_size"))
    kwargs = {
        "parameters": random_array(spec.layout.size),
        "state": random_array(*states[0]),
        "state_outputs": True,
        **options,
    }
    y, *final = rnn(**kwargs, backend="reference")
    assert y.shape == (T, N, states[0][2])
    assert [array.shape for array in final] == states
    if "lstm_state_clip_max" in options:
        assert np.abs(final[1]).max() <= np.float32(0.1)
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        rnn(**kwargs, backend="none")


def test_outputs():
    y = rnn()
    assert y.shape == (T, N, H)
    assert [array.shape for array in rnn(state_outputs=True)] == [(T, N, H), (1, N, H), (1, N, H)]
    np.testing.assert_array_equal(rnn(p=0.9), y)
    np.testing.assert_array_equal(rnn(sequence_length=[T] * N, use_sequence_length=True), y)
    assert not np.array_equal(rnn(sequence_length=[1] * N, use_sequence_length=True), y)
    gru = fusedrnn.RNNSpec("gru", I, H)
    kwargs = {"mode": "gru", "parameters": random_array(gru.layout.size), "state_cell": None, "state_outputs": True}
    assert [array.shape for array in rnn(**kwargs)] == [(T, N, H), (1, N, H)]
