"""What callers of ``fusedrnn.jax.rnn`` are told: before anything runs where JAX can know, else by XLA's error."""

import ctypes
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusedrnn import Activation, RNNOp, RNNSpec
from fusedrnn.cell import cell, tanh
from fusedrnn.engines.cpu.launch.buffer_kernel import OK
from fusedrnn.engines.cpu.weights.transpose_kernel import Block
from fusedrnn.jax import call_table, calls, rnn
from fusedrnn.jax.handler_kernel import OTHER_VERSION
from jax_versions import enable_x64

SPEC = RNNSpec("lstm", 3, 5)
PARAMS, X = jnp.zeros(SPEC.layout.size), jnp.zeros((4, 2, 3))


def quantized():
    spec = replace(SPEC, compute="int8")
    return RNNOp(spec).quantize(np.zeros(spec.layout.size, np.float32))


CASES = {
    "spec": (lambda: rnn("lstm", PARAMS, X), TypeError, "spec must be an RNNSpec; got str"),
    "params": (lambda: rnn(SPEC, PARAMS[1:], X), ValueError, r"params must have shape \(200\); got \(199,\)"),
    "no params": (lambda: rnn(SPEC, None, X), TypeError, "params must be an array; got None"),
    "quantized": (lambda: rnn(SPEC, quantized(), X), TypeError, "params must be an array; got QuantizedParams"),
    "ragged": (lambda: rnn(SPEC, PARAMS, [[1.0], []]), TypeError, "x must be an array; got list"),
    "text": (lambda: rnn(SPEC, PARAMS, X, lengths="ab"), TypeError, "lengths must be an array; got str"),
    "x": (lambda: rnn(SPEC, PARAMS, X[..., :2]), ValueError, r"x must have shape \(any size, any size, 3\); got"),
    "dimensions": (lambda: rnn(SPEC, PARAMS, X[0]), ValueError, r"x must have shape .*; got \(2, 3\)"),
    "empty": (lambda: rnn(SPEC, PARAMS, X[:0]), ValueError, r"x must not be empty; got shape \(0, 2, 3\)"),
    "dtype": (lambda: rnn(SPEC, PARAMS, X.astype(int)), TypeError, "x must have dtype float32; got int32"),
    "float64": (lambda: rnn(RNNSpec("gru", 3, 5, dtype="float64"), PARAMS, X), TypeError, "set jax_enable_x64"),
    "states": (lambda: rnn(SPEC, PARAMS, X, (X,)), ValueError, "states must be 2 arrays, h, c; got 1"),
    "state": (lambda: rnn(SPEC, PARAMS, X, (None, X)), ValueError, r"states\[1\] must have shape \(1, 2, 5\)"),
    "lengths": (lambda: rnn(SPEC, PARAMS, X, lengths=[1, 2, 3]), ValueError, r"lengths must have shape \(2,\)"),
    "masked": (
        lambda: rnn(SPEC, PARAMS, X, lengths=np.ma.masked_array([1, 2], [0, 1])), TypeError,
        "lengths must be an array; got MaskedArray",
    ),
    "floats": (lambda: rnn(SPEC, PARAMS, X, lengths=jnp.ones(2)), TypeError, "lengths must be integers"),
    "long": (lambda: rnn(SPEC, PARAMS, X, lengths=[1, 5]), ValueError, "lengths must be from 0 to 4"),
    "resets": (lambda: rnn(SPEC, PARAMS, X, resets=jnp.ones((4, 2))), TypeError, "resets must have dtype bool"),
    "key": (lambda: rnn(RNNSpec("gru", 3, 5, 2, dropout=0.5), jnp.zeros(330), X, key="key"), TypeError, "key must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_messages(case):
    run, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        run()


def test_a_length_that_only_the_call_knows():
    run = jax.jit(lambda lengths: rnn(SPEC, PARAMS, X, lengths=lengths)[0])
    for lengths in ([1, 5], [-1, 1]):
        with pytest.raises(jax.errors.JaxRuntimeError, match="lengths must be from 0 to the number of steps"):
            run(jnp.array(lengths)).block_until_ready()
    assert run(jnp.array([0, 4])).shape == (4, 2, 5)  # an error leaves nothing locked


def test_every_status_has_a_message_at_first():
    """Also that of a failed preparation, since a signal handler may raise before Python can set the message."""
    assert sorted(call_table._MESSAGES) == [*range(OK + 1, OTHER_VERSION + 1)]


def test_lengths_that_a_compiled_function_closes_over():
    right, wrong = jnp.array([1, 4]), jnp.array([1, 5])
    assert jax.jit(lambda x: rnn(SPEC, PARAMS, x, lengths=right)[0])(X).shape == (4, 2, 5)
    with pytest.raises(ValueError, match="lengths must be from 0 to 4"):
        jax.jit(lambda x: rnn(SPEC, PARAMS, x, lengths=wrong)[0])(X)


def test_lengths_of_64_bits():
    """They are compared before they are cut to 32 bits, with and without jax_enable_x64."""
    for dtype in (np.int64, np.uint64):
        lengths = np.array([2**32, 1], dtype)
        for values in (lengths, [2**32 + 1, 1]) if dtype == np.int64 else (lengths,):
            with pytest.raises(ValueError, match="each of lengths must be from 0 to 4; got"):
                rnn(SPEC, PARAMS, X, lengths=values)
        with enable_x64():
            run = jax.jit(lambda lengths: rnn(SPEC, PARAMS, X, lengths=lengths)[0])
            for wrong in (2**32, 2**33 + 2, 2**31 - 1, 5, *([-(2**32), -1] if dtype == np.int64 else [])):
                with pytest.raises(jax.errors.JaxRuntimeError, match="lengths must be from 0 to the number of steps"):
                    run(jnp.array([wrong, 1], dtype)).block_until_ready()
            expected = rnn(SPEC, PARAMS, X, lengths=jnp.array([4, 0]))[0]
            np.testing.assert_array_equal(run(jnp.array([4, 0], dtype)), expected)


def test_lengths_of_which_some_are_traced():
    """A list of them is an array of JAX."""
    y = jax.jit(lambda first: rnn(SPEC, PARAMS, X, lengths=[first, 2])[0])(3)
    np.testing.assert_array_equal(y, rnn(SPEC, PARAMS, X, lengths=[3, 2])[0])


def test_lengths_of_8_bits_of_a_long_sequence():
    x, lengths = jnp.ones((300, 2, 3)), np.array([255, 7])
    params = jnp.full(SPEC.layout.size, 0.1)
    expected = rnn(SPEC, params, x, lengths=lengths)[0]
    actual = jax.jit(lambda lengths: rnn(SPEC, params, x, lengths=lengths)[0])(lengths.astype(np.uint8))
    np.testing.assert_array_equal(actual, expected)


def test_reasons_are_not_kept_for_ever():
    from fusedrnn.jax import call_table

    (table,) = call_table._immortal
    for number in range(call_table._MAX_REASONS + 20):
        table._explain(f"reason {number}")
    assert len(table._reasons) == call_table._MAX_REASONS
    assert ctypes.string_at(int(table._messages[call_table.NOT_PREPARED])) == f"fusedrnn: reason {number}".encode()


@cell(gates="a")
def own(x, recurrent, s):
    return tanh(x.a + recurrent(s.h).a)


def test_an_exported_function_of_an_unknown_cell(monkeypatch):
    key, text = calls.describe(calls.NetworkJob(calls.Call(RNNSpec(own, 3, 5)), "forward", None))
    monkeypatch.delitem(calls._known, key)
    with pytest.raises(LookupError, match="cell 'own', which this process does not know"):
        calls.restore(key, text)


def test_a_description_restores_the_call():
    spec = RNNSpec("rnn_tanh", 3, 5, activations=(Activation("leaky_relu", 0.1),), gate_clip=2.0)
    call = calls.Call(spec, ("states", "lengths"))
    for kind, needs in (("forward", None), ("backward", calls.Needs(True, False, True))):
        job = calls.NetworkJob(call, kind, needs)
        key, text = calls.describe(job)
        assert key not in calls._known  # what a description restores does not stay in memory
        assert calls.restore(key, text) == job
    blocks = (Block(0, 8, 16, 1, 0, 12, rows=3, columns=4),)
    key, text = calls.describe(calls.TransposeJob("float64", blocks))
    assert key not in calls._known
    assert calls.restore(key, text) == calls.TransposeJob("float64", blocks)
