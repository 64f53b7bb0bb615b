"""Values in the padding do not affect derivatives of any order."""

import math

import pytest
import torch

from fusedrnn import torch as fused

KINDS = ("RNN", "LSTM", "GRU")
T, N, I, H = 6, 5, 4, 3
LENGTHS = torch.tensor([3, 0, 6, 2, 1])
PADDING = torch.arange(T)[:, None] >= LENGTHS
DEEP = {"num_layers": 2, "bidirectional": True}

kinds = pytest.mark.parametrize("kind", KINDS)
fills = pytest.mark.parametrize("fill", [math.nan, math.inf])


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def network(kind, **options):
    return getattr(fused, kind)(I, H, **DEEP, **options, dtype=torch.float64)


def hidden(kind, states):
    return tuple(states) if kind == "LSTM" else states[0]


def padded(tensor, fill):
    """A leaf with that in its padding."""
    return tensor.masked_fill(PADDING[:, :, None], fill).requires_grad_()


def twice(outputs, leaves, cotangents):
    """First derivatives, and those of their squares."""
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    sources = [*leaves, *cotangents]
    total = sum(tensor.square().sum() for tensor in first)
    return [*first, *torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True)]


@kinds
@fills
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_gradients_of_gradients(kind, fill, dropout, where):
    torch.manual_seed(0)
    net = network(kind, dropout=dropout)
    states = [data(4, N, H).requires_grad_() for _ in range(1 + (kind == "LSTM"))]
    x, dy = data(T, N, I), data(T, N, 2 * H)
    dfinal = [data(4, N, H).requires_grad_() for _ in states]
    results = []
    for value in (0.0, fill):
        torch.manual_seed(1)
        x_padded = padded(x, value if where == "x" else 0.0)
        cotangent = padded(dy, value if where == "dy" else 0.0)
        y, final = net(x_padded, hidden(kind, states), lengths=LENGTHS)
        outputs = [y, *(final if kind == "LSTM" else [final])]
        results.append(twice(outputs, [x_padded, *states, *net.parameters()], [cotangent, *dfinal]))
    for tensor, other in zip(*results, strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(tensor, other)
    assert not results[1][0][PADDING].any()


@kinds
def test_states_of_empty_sequences(kind):
    """They are returned unchanged, and do not affect other gradients."""
    torch.manual_seed(0)
    net, x = network(kind), data(T, N, I).requires_grad_()
    dy = data(T, N, 2 * H).requires_grad_()
    results = []
    for fill in (0.0, math.nan):
        states = [torch.zeros(4, N, H, dtype=torch.float64) for _ in range(1 + (kind == "LSTM"))]
        for state in states:
            state[:, LENGTHS == 0] = fill
        y, _ = net(x, hidden(kind, states), lengths=LENGTHS)
        once = torch.autograd.grad(y, [x, *net.parameters()], dy, retain_graph=True)
        results.append([y, *once, *twice([y], [x, *net.parameters()], [dy])])
    assert all(map(torch.equal, *results))


@kinds
def test_batched_gradients(kind):
    torch.manual_seed(0)
    net, x, dy = network(kind), data(T, N, I), data(2, T, N, 2 * H)
    results = []
    for fill in (0.0, math.nan):
        x_padded = padded(x, fill)
        y, _ = net(x_padded, lengths=LENGTHS)
        cotangents = dy.masked_fill(PADDING[:, :, None], fill)
        results.append(torch.autograd.grad(y, [x_padded, *net.parameters()], cotangents, is_grads_batched=True))
    assert all(map(torch.equal, *results))
