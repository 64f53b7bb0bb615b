"""The reference against torch.nn in float64, and in float types that torch or our kernels do not support."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import MODES, RNNSpec
from fusedrnn.testing.tolerance import longest_sum, tolerance

T, N, I, H = 7, 4, 5, 6
LENGTHS = np.array([3, 7, 1, 5])


def torch_module(spec):
    torch.manual_seed(spec.num_layers)
    options = {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional, "dtype": torch.float64}
    if spec.mode.startswith("rnn"):
        return torch.nn.RNN(spec.input_size, spec.hidden_size, nonlinearity=spec.mode[4:], **options)
    return getattr(torch.nn, spec.mode.upper())(spec.input_size, spec.hidden_size, **options)


def torch_forward(module, x, states, lengths):
    """Outputs and states of the torch module; outputs in the padding are zeros."""
    data = torch.from_numpy(x)
    if lengths is not None:
        data = pack_padded_sequence(data, torch.from_numpy(lengths), enforce_sorted=False)
    tensors = None if states is None else tuple(map(torch.from_numpy, states))
    with torch.no_grad():
        y, after = module(data, tensors[0] if tensors and len(tensors) == 1 else tensors)
    if lengths is not None:
        y, _ = pad_packed_sequence(y, total_length=len(x))
    after = after if isinstance(after, tuple) else (after,)
    return y.numpy(), tuple(state.numpy() for state in after)


def problem(spec, dtype=np.float64, with_states=True):
    rng = np.random.default_rng(spec.num_layers)
    bound = spec.hidden_size**-0.5
    x = rng.standard_normal((T, N, spec.input_size)).astype(dtype)
    params = rng.uniform(-bound, bound, spec.layout.size).astype(dtype)
    states = tuple(rng.uniform(-1, 1, shape).astype(dtype) for shape in spec.state_shape(N))
    return x, params, states if with_states else None


def assert_same(actual, expected, dtype, spec):
    rtol, atol = tolerance(dtype, longest_sum(spec))
    for array, exact in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(array, exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_against_torch(mode, layers, bidirectional, lengths, with_states):
    spec = RNNSpec(mode, I, H, num_layers=layers, bidirectional=bidirectional, dtype="float64")
    x, _, states = problem(spec, with_states=with_states)
    module = torch_module(spec)
    params = spec.layout.pack({name: t.numpy() for name, t in module.state_dict().items()}, names="torch")
    actual = reference.forward(spec, x, params, states, lengths)
    assert actual[0].shape == (T, N, spec.output_size)
    assert tuple(state.shape for state in actual[1]) == spec.state_shape(N)
    assert_same(actual, torch_forward(module, x, states, lengths), "float64", spec)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize("mode", MODES)
def test_any_float_type(mode, dtype):
    spec = RNNSpec(mode, I, H, num_layers=2, bidirectional=True, dtype="float64")
    x, params, states = problem(spec, dtype)
    actual = reference.forward(spec, x, params, states, LENGTHS)
    assert {array.dtype for array in (actual[0], *actual[1])} == {np.dtype(dtype)}
    exact = [np.asarray(array, np.float64) for array in (x, params, *states)]
    expected = reference.forward(spec, exact[0], exact[1], exact[2:], LENGTHS)
    assert_same(actual, expected, np.float64 if dtype is np.longdouble else dtype, spec)


@pytest.mark.parametrize("mode", MODES)
def test_longdouble_is_more_exact(mode):
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is float64 here")
    spec = RNNSpec(mode, I, H)
    x, params, states = problem(spec, np.longdouble)
    long = reference.forward(spec, x, params, states)[0]
    assert np.any(long != long.astype(np.float64))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sequence_of_no_steps_keeps_its_states(bidirectional):
    spec = RNNSpec("lstm", I, H, num_layers=2, bidirectional=bidirectional)
    x, params, states = problem(spec)
    y, after = reference.forward(spec, x, params, states, np.array([0, T, 0, 2]))
    assert not y[:, 0].any()
    assert not y[2:, 3].any()
    assert y[:, 1].all()
    for before, state in zip(states, after, strict=True):
        np.testing.assert_array_equal(state[:, [0, 2]], before[:, [0, 2]])
        assert np.all(state[:, [1, 3]] != before[:, [1, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_never_read(mode):
    spec = RNNSpec(mode, I, H, num_layers=2, bidirectional=True)
    x, params, states = problem(spec)
    expected = reference.forward(spec, x, params, states, LENGTHS)
    x[np.arange(T)[:, None] >= LENGTHS] = np.nan
    actual = reference.forward(spec, x, params, states, LENGTHS)
    for array, exact in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_array_equal(array, exact)


@pytest.mark.parametrize("mode", MODES)
def test_nan_propagates(mode):
    spec = RNNSpec(mode, I, H)
    x, params, _ = problem(spec)
    x[2, 1] = np.nan
    y, _ = reference.forward(spec, x, params)
    assert np.isnan(y[2:, 1]).all()
    assert not np.isnan(np.delete(y, 1, axis=1)).any()
    assert not np.isnan(y[:2]).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_activations_at_the_ends_of_the_range(dtype):
    on = reference.NUMPY
    ends = np.array([-np.inf, np.finfo(dtype).min, -0.0, np.finfo(dtype).max, np.inf], dtype)
    np.testing.assert_array_equal(on.apply("sigmoid", ends), np.array([0, 0, 0.5, 1, 1], dtype))
    np.testing.assert_array_equal(on.apply("tanh", ends), np.array([-1, -1, 0, 1, 1], dtype))
    np.testing.assert_array_equal(on.apply("relu", ends), np.array([0, 0, 0, ends[3], np.inf], dtype))
    assert np.isnan(on.apply("relu", np.array(np.nan, dtype)))
