"""Residual connections and dropout of the input in PyTorch: against a chain of layers, and torch's own derivatives."""

import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn import cells
from fusedrnn.torch import Layer

T, N, H = 5, 3, 6
NETWORKS = {
    "lstm": ("lstm", 4, {"num_layers": 3}),
    "both directions": ("gru", 2 * H, {"num_layers": 2, "bidirectional": True}),
    "cell": (cells.minimal_gated_unit, H, {"num_layers": 2}),
}
named = pytest.mark.parametrize("name", NETWORKS)


def make(name, **options):
    cell, size, sizes = NETWORKS[name]
    torch.manual_seed(0)
    layer = Layer(cell, size, H, residual="identity", **sizes, **options)
    return layer, torch.randn(T, N, size, dtype=options.get("dtype"))


def chain(layer, x, lengths=None):
    """The same by layers without residual connections, one after the other."""
    for number in range(layer.num_layers):
        single = Layer(layer.cell, x.shape[2], H, bidirectional=layer.bidirectional)
        weights = {key: value for key, value in layer.state_dict().items() if f"_l{number}" in key}
        single.load_state_dict({key.replace(f"_l{number}", "_l0"): value for key, value in weights.items()})
        y = single(x, lengths=lengths)[0]
        x = y + x if y.shape == x.shape else y
    return x


@named
def test_a_chain_of_layers(name):
    layer, x = make(name)
    torch.testing.assert_close(layer(x)[0], chain(layer, x))
    lengths = torch.tensor([5, 2, 4])
    y = layer(x, lengths=lengths)[0]
    inside = (torch.arange(T)[:, None] < lengths)[:, :, None]
    torch.testing.assert_close(y, torch.where(inside, chain(layer, x, lengths), 0))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(pad_packed_sequence(layer(packed)[0])[0], y)
    torch.testing.assert_close(layer(x[:, 0])[0], layer(x[:, :1])[0][:, 0])


@named
def test_derivatives(name):
    layer, x = make(name, dtype=torch.float64, dropout=0.2, input_dropout=0.3)
    x = x[:3, :2].clone().requires_grad_()  # second derivatives take a run for each element of x and of y

    def run(x):
        torch.manual_seed(7)
        return layer(x)[0]

    assert gradcheck(run, [x], fast_mode=True)
    assert gradgradcheck(run, [x], fast_mode=True)


@named
def test_compiled(name):
    layer, x = make(name, input_dropout=0.4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(3)
        y = compiled(x)[0]
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert (dx == 0).any() == mode  # the gradient of what is dropped
        if not mode:
            torch.testing.assert_close(y, layer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [None, True])
def test_rates_in_one_compiled_program(dynamic):
    """Dynamo makes a float that differs between modules symbolic; a plan needs its value."""
    x = torch.randn(T, N, 4)
    for rate in (0.0, 0.1, 0.25):
        layer = Layer("gru", 4, H, 2, dropout=rate, input_dropout=rate).eval()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=0, atol=0)
        layer.train().dropout = 0.5
        torch.manual_seed(1)
        y = compiled(x)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(y, layer(x)[0].detach())


def test_dropout_of_the_input_alone_drops_in_training():
    layer, x = Layer("gru", 4, H, input_dropout=0.5), torch.randn(T, N, 4)
    with torch.no_grad():
        assert (layer(x)[0] != layer(x)[0]).any()
        layer.eval()
        torch.testing.assert_close(layer(x)[0], layer(x)[0], rtol=0, atol=0)
    twin = copy.deepcopy(layer)
    assert (twin.residual, twin.input_dropout) == (None, 0.5)
    assert repr(twin) == "Layer(gru, 4, 6, input_dropout=0.5)"
    assert twin.spec.input_dropout == 0.5


def test_errors():
    with pytest.raises(ValueError, match="residual='identity' needs a layer whose input has the size of its output"):
        Layer("gru", 4, H, residual="identity")
    with pytest.raises(ValueError, match="input_dropout must be a probability"):
        Layer("gru", 4, H, input_dropout=-0.1)
    layer = Layer("gru", 4, H, input_dropout=0.5, compute="int8")
    with pytest.raises(RuntimeError, match="for inference only"):
        layer(torch.randn(T, N, 4))
    assert layer.eval().requires_grad_(False)(torch.randn(T, N, 4))[0].shape == (T, N, H)
