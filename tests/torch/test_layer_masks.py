"""Layers of cells that draw random masks: training and eval, seeds, derivatives of any order, compiled programs."""

import copy

import pytest
import torch

from fusedrnn import cells
from fusedrnn.cell import cell, dropout, layer_norm, sigmoid, tanh, zoneout
from fusedrnn.torch import Layer


@cell(gates="f n", vectors="gamma")
def noisy(x, recurrent, s, p):
    """Masks of both kinds, and layer normalization of what they multiply."""
    h = recurrent(dropout("u", s.h, 0.25, per="sequence"))
    f = sigmoid(layer_norm(x.f + h.f))
    n = tanh(x.n + h.n) + 0.1 * p.gamma * layer_norm(dropout("n", x.f, 0.25, per="sequence"), epsilon=0.1)
    return zoneout("h", s.h, f * s.h + (1.0 - f) * n, 0.3)


def seeded(layer, *args):
    torch.manual_seed(3)
    return layer(*args)


def test_training_and_eval():
    layer, x = Layer(cells.zoneout_lstm, 4, 6, num_layers=2), torch.randn(5, 3, 4)
    first, second = seeded(layer, x)[0], layer(x)[0]
    assert (first != second).any()
    torch.testing.assert_close(seeded(layer, x)[0], first, rtol=0, atol=0)
    twin = copy.deepcopy(layer).eval()
    torch.testing.assert_close(twin(x)[0], twin(x)[0], rtol=0, atol=0)
    with torch.no_grad():  # the kernel of inference, and that of training without masks
        torch.testing.assert_close(twin(x)[0], layer.eval()(x)[0])
    layer.train().double()
    with torch.no_grad():
        torch.testing.assert_close(seeded(layer, x.double())[0].float(), first)


@pytest.mark.parametrize("training", [True, False])
def test_derivatives(training):
    layer = Layer(noisy, 2, 3, dtype=torch.float64).train(training)
    x, h = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)

    def run(x, h):
        return seeded(layer, x, h)

    operands = x.requires_grad_(), h.requires_grad_()
    assert torch.autograd.gradcheck(run, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, operands, fast_mode=True)


def test_compiled():
    layer, x = Layer(noisy, 4, 6), torch.randn(5, 3, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        layer.train(mode)
        expected, actual = seeded(layer, x)[0], seeded(compiled, x)[0]
        if not mode:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert actual.shape == expected.shape
        actual.sum().backward()
