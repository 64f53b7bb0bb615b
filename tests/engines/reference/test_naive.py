"""The textbook loops against torch, and as an oracle of the engines that are derived from ``cell/``."""

import numpy as np
import pytest
import torch

from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.reference import naive
from fusedrnn.testing.tolerance import gradient_tolerance

T, N, I, H = 7, 4, 3, 5
CELLS = {
    "lstm": RNNSpec("lstm", I, H, dtype="float64"),
    "gru": RNNSpec("gru", I, H, dtype="float64"),
    "gru_reset_before": RNNSpec("gru", I, H, reset_after=False, dtype="float64"),
    "rnn_tanh": RNNSpec("rnn_tanh", I, H, dtype="float64"),
    "rnn_relu": RNNSpec("rnn_relu", I, H, dtype="float64"),
}


class Case:
    """The arguments of a training step of one cell, and what the loops make of them."""

    def __init__(self, name):
        self.spec = spec = CELLS[name]
        rng = np.random.default_rng(len(name))
        self.x = rng.standard_normal((T, N, I))
        self.params = rng.uniform(-0.7, 0.7, spec.layout.size)
        self.states = tuple(rng.standard_normal(shape) for shape in spec.state_shape(N))
        self.dy = rng.standard_normal((T, N, H))
        self.dstates = tuple(rng.standard_normal(shape) for shape in spec.state_shape(N))
        weights = [spec.layout.view(self.params, 0, 0, kind) for kind in spec.layout.kinds]
        W, U = weights[:2]
        before, after = [state[0] for state in self.states], [dstate[0] for dstate in self.dstates]
        if spec.mode.startswith("rnn"):
            relu = name == "rnn_relu"
            y, *final, saved = naive.rnn(self.x, *before, *weights, relu)
            grads = naive.rnn_backward(self.x, saved, W, U, y, self.dy, *after, relu)
        else:
            y, *final, saved = getattr(naive, name)(self.x, *before, *weights)
            grads = getattr(naive, f"{name}_backward")(self.x, saved, W, U, self.dy, *after)
        dx, *dweights = grads[:5]
        dparams = np.concatenate([gradient.ravel() for gradient in dweights])
        self.results = y, *(state[None] for state in final), dx, dparams, *(dstate[None] for dstate in grads[5:])

    def check(self, results):
        for actual, expected in zip(results, self.results, strict=True):
            rtol, atol = gradient_tolerance("float64", self.spec, T, N, float(np.abs(expected).max()))
            np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [name for name in CELLS if name != "gru_reset_before"])
def test_against_torch(name):
    case = Case(name)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(name, torch.nn.RNN)
    options = {"nonlinearity": name[4:]} if kind is torch.nn.RNN else {}
    module = kind(I, H, dtype=torch.float64, **options)
    weights = case.spec.layout.unpack(case.params, names="torch")
    module.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()})
    x, *states = leaves = [torch.tensor(array, requires_grad=True) for array in (case.x, *case.states)]
    y, final = module(x, tuple(states) if name == "lstm" else states[0])
    outputs = [y, *(final if name == "lstm" else [final])]
    cotangents = [torch.from_numpy(array) for array in (case.dy, *case.dstates)]
    dx, *rest = torch.autograd.grad(outputs, [*leaves, *module.parameters()], cotangents)
    dstates, dweights = rest[: len(states)], rest[len(states) :]
    dparams = torch.cat([gradient.flatten() for gradient in dweights])
    case.check([tensor.detach().numpy() for tensor in (*outputs, dx, dparams, *dstates)])


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", CELLS)
def test_the_engines_agree(name, engine):
    case = Case(name)
    op = RNNOp(case.spec, backend=engine)
    y, final, reserve = op.forward(case.x, case.params, case.states, training=True)
    dx, dparams, dstates = op.backward(case.dy, case.dstates, reserve)
    case.check([y, *final, dx, dparams, *dstates])


@pytest.mark.parametrize("name", CELLS)
def test_gradients_by_finite_differences(name):
    """A random direction in all inputs at once."""
    case, step = Case(name), 1e-6
    rng = np.random.default_rng(1)
    inputs = case.x, case.params, *case.states
    directions = [rng.standard_normal(array.shape) for array in inputs]

    def loss(sign):
        moved = [array + sign * step * direction for array, direction in zip(inputs, directions, strict=True)]
        weights = [case.spec.layout.view(moved[1], 0, 0, kind) for kind in case.spec.layout.kinds]
        function = getattr(naive, name, naive.rnn)
        relu = [True] if name == "rnn_relu" else []
        y, *final, _ = function(moved[0], *(state[0] for state in moved[2:]), *weights, *relu)
        return (y * case.dy).sum() + sum((a * b[0]).sum() for a, b in zip(final, case.dstates, strict=True))

    gradients = case.results[1 + len(case.states) :]
    expected = sum((gradient * d).sum() for gradient, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose((loss(1) - loss(-1)) / (2 * step), expected, rtol=1e-6)
