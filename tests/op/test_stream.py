"""A stream gives the bits of one call on the joined chunks."""

import copy
import pickle
import re

import numpy as np
import pytest

from fusedrnn import RNNOp, RNNSpec, frozen
from fusedrnn.frozen_array import is_frozen
from problems import assert_same_bits

MODES = "lstm", "gru", "rnn_relu", "rnn_tanh"


def network(mode="lstm", layers=2, batch=3, steps=23, **more):
    spec = RNNSpec(mode, 6, 11, layers, **more)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((steps, batch, 6)).astype(spec.dtype)
    return RNNOp(spec), x, (rng.standard_normal(spec.layout.size) * 0.3).astype(spec.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", [[1] * 23, [5, 1, 1, 1, 7, 8], [23]])
def test_chunks_have_the_bits_of_the_whole(mode, dtype, chunks):
    op, x, params = network(mode, dtype=dtype)
    y, states, _ = op.forward(x, params)
    stream = op.stream(params, batch=3)
    parts, done = [], 0
    for steps in chunks:
        parts.append(stream(x[done : done + steps]))
        done += steps
    assert_same_bits(np.concatenate(parts), y)
    assert_same_bits(stream.states, states)


def test_initial_states_and_reset():
    op, x, params = network()
    rng = np.random.default_rng(0)
    states = tuple(rng.random(shape, np.float32) for shape in op.spec.state_shape(3))
    copies = tuple(state.copy() for state in states)
    stream = op.stream(params, 3, states)
    first = stream(x)
    assert_same_bits(first, op.forward(x, params, states)[0])
    for state in states:
        state[:] = np.nan  # a copy was taken
    stream.reset(copies)
    assert_same_bits(stream(x), first)
    stream.reset()
    assert_same_bits(stream(x), op.forward(x, params)[0])


def test_parameters_are_copied():
    op, x, params = network()
    expected = op.forward(x, params)[0]
    stream = op.stream(params, 3)
    params[:] = 0
    assert_same_bits(stream(x), expected)


def test_streams_share_frozen_parameters():
    op, x, params = network()
    constant = frozen(params)
    assert frozen(constant) is constant
    streams = [op.stream(constant, 3) for _ in range(20)]
    for stream in streams:
        for step in range(4):
            stream(x[step : step + 1])
    assert op.by_address().weight_cache.num_packed == 1


def test_writes_to_out():
    op, x, params = network()
    stream, out = op.stream(params, 3), np.full((23, 3, 11), np.nan, np.float32)
    for step in range(23):
        assert stream(x[step : step + 1], out=out[step : step + 1]).base is out
    assert_same_bits(out, op.forward(x, params)[0])


def test_a_failed_chunk_changes_nothing():
    op, x, params = network()
    stream = op.stream(params, 3)
    stream(x[:5])
    for chunk, words in (
        (x[5:, :2], "3 sequences"),
        (x[5:, :, :4], "shape"),
        (x[5:].astype(np.float64), "dtype"),
        (x[5:5], "at least one step"),
        (x[5:].tolist(), "NumPy array"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            stream(chunk)
    with pytest.raises(ValueError, match="out must"):
        stream(x[5:], out=np.empty((1, 1, 1), np.float32))
    assert_same_bits(stream(x[5:]), op.forward(x, params)[0][5:])


@pytest.mark.parametrize("shape", [(5, 3, 6), (1, 1, 6), (4, 3, 5)])
def test_a_chunk_of_other_sequences_is_told_the_shape(shape):
    op, _, params = network()
    stream = op.stream(params, batch=2)
    expected = f"x must have shape (T, 2, {op.spec.input_size}), with the stream's 2 sequences; got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        stream(np.zeros(shape, np.float32))


def test_errors():
    op, _, params = network()
    for arguments, words in (
        ((params[:-1],), "params must have shape"),
        ((params, 0), "batch"),
        ((params, 2.0), "batch"),
        ((params, 3, (np.zeros(3),)), "states"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            op.stream(*arguments)
    for name in ("bidirectional", "reverse"):
        backwards = RNNSpec("gru", 3, 4, **{name: True})
        with pytest.raises(ValueError, match=f"runs forward alone; got {name}=True"):
            RNNOp(backwards).stream(np.zeros(backwards.layout.size, np.float32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_a_copy_has_frozen_parameters(copied):
    """It would else look for changes of the parameters at each call."""
    op = RNNOp(RNNSpec("gru", 3, 5))
    stream = op.stream(np.full(op.spec.layout.size, 0.1, np.float32))
    x = np.ones((2, 1, 3), np.float32)
    stream(x)
    other = copied(stream)
    assert is_frozen(other._params)
    assert_same_bits(other(x), stream(x))
