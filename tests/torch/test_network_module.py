"""fusedrnn.torch.Network against torch.nn's layers, one after the other, and against NetworkOp."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn import NetworkOp, NetworkSpec, cells
from fusedrnn.torch import Network
from torch_layers import flat

T, N, I, SIZES = 6, 3, 4, (8, 5, 5)
LENGTHS = torch.tensor([4, 6, 1])


def networks(kind, bidirectional=True, batch_first=False):
    """Our network and torch.nn's layers, with the same parameters."""
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "batch_first": batch_first, "dtype": torch.float64}
    network, ways = Network(kind, I, SIZES, **options), 1 + bidirectional
    cls = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    theirs = torch.nn.ModuleList([cls(I, 8, **options), cls(8 * ways, 5, 2, **options)])
    theirs.load_state_dict({name.removeprefix("layers."): value for name, value in network.state_dict().items()})
    return network, theirs


def in_turn(theirs, x, states):
    final = []
    for layer, state in zip(theirs, states, strict=True):
        x, state = layer(x, state)
        final.append(state)
    return x, tuple(final)


def problem(kind, form):
    """The input in that form, and states of each layer."""
    batch = () if form == "unbatched" else (N,)
    x = torch.randn(N, T, I, dtype=torch.float64) if form == "batch_first" else torch.randn(T, *batch, I).double()
    x.requires_grad_()
    states = [
        tuple(torch.randn(rows, *batch, size, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for rows, size in ((2, 8), (4, 5))
    ]
    return x, tuple(states) if kind == "lstm" else tuple(h for h, _ in states)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("form", ["batched", "batch_first", "packed", "lengths", "unbatched"])
def test_results_and_gradients(kind, form):
    network, theirs = networks(kind, batch_first=form == "batch_first")
    x, states = problem(kind, form)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False) if form in ("packed", "lengths") else x
    y, final = network(x, states, lengths=LENGTHS) if form == "lengths" else network(packed, states)
    expected_y, expected_final = in_turn(theirs, packed, states)
    if form == "packed":
        y = y.data
        expected_y = expected_y.data
    elif form == "lengths":
        expected_y = pad_packed_sequence(expected_y, total_length=T)[0]
    leaves = [x, *flat(states)]
    found = torch.autograd.grad(y.square().mean() + sum(s.sum() for s in flat(final)),
                                [*leaves, *network.parameters()], retain_graph=True)  # fmt: skip
    expected = torch.autograd.grad(expected_y.square().mean() + sum(s.sum() for s in flat(expected_final)),
                                   [*leaves, *theirs.parameters()])  # fmt: skip
    for one, other in zip([y, *flat(final), *found], [expected_y, *flat(expected_final), *expected], strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_has_the_same_bits():
    """Parameters have the names of the spec's layout."""
    torch.manual_seed(0)
    network = Network(cells.minimal_gated_unit, I, SIZES)
    assert next(iter(network.state_dict())) == "layers.0.weight_ih_l0"
    x, resets = torch.randn(T, N, I), torch.rand(T, N) < 0.3
    spec = network.spec
    params = spec.layout.pack({n: p.detach().numpy() for n, p in network.named_parameters()}, names="torch")
    y, final, _ = NetworkOp.get(spec).forward(x.numpy(), params, resets=resets.numpy())
    with torch.no_grad():
        found_y, found_final = network(x, resets=resets)
    np.testing.assert_array_equal(found_y.numpy(), y)
    for one, (other,) in zip(found_final, final, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    begins = [torch.randn(shape) for (shape,) in spec.state_shape(N)]
    arrays = tuple((begin.numpy(),) for begin in begins)
    y, _, _ = NetworkOp.get(spec).forward(x.numpy(), params, resets=resets.numpy(), reset_states=arrays)
    np.testing.assert_array_equal(network(x, resets=resets, reset_states=begins)[0].detach().numpy(), y)
    with pytest.raises(ValueError, match=r"^reset_states must be None without resets$"):
        network(x, reset_states=begins)
    with pytest.raises(TypeError, match=r"^reset_states must be None or a tuple of 2, the states of each layer; got T"):
        network(x, resets=resets, reset_states=begins[0])


def test_options_of_the_stack():
    """Dropout and residual connections are those of the spec; evaluation drops nothing."""
    options = {"dropout": 0.5, "input_dropout": 0.25, "residual": "projection"}
    network = Network("gru", I, (6, 4), **options)
    assert network.spec == NetworkSpec.stack("gru", I, (6, 4), **options)
    x = torch.randn(T, N, I)
    one, other = network(x)[0], network(x)[0]
    assert not torch.equal(one, other)
    assert torch.equal(network.eval()(x)[0], network(x)[0])


def test_states_of_some_layers():
    network, _ = networks("lstm")
    x, states = problem("lstm", "batched")
    zeros = tuple(torch.zeros_like(state) for state in states[0])
    for one, other in zip(flat(network(x, (None, states[1]))), flat(network(x, (zeros, states[1]))), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("hx", "got"), [((None,), "1 entries"), (torch.zeros(2, 3, 8), "Tensor")], ids=["count", "tensor"]
)
def test_errors(hx, got):
    network, _ = networks("lstm")
    message = f"hx must be None or a tuple of 2, the states of each layer; got {got}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        network(torch.zeros(T, N, I, dtype=torch.float64), hx)


def test_errors_of_the_constructor():
    with pytest.raises(TypeError, match=r"^residual must be one of identity, projection; got True$"):
        Network("lstm", I, (4, 3), residual=True)
    with pytest.raises(ValueError, match=r"^dropout must be "):
        Network("lstm", I, (4, 3), dropout=1.5)
    with pytest.raises(ValueError, match=r"^hidden_sizes\[1\] must be at least 1; got 0$"):
        Network("lstm", I, (4, 0))


def test_the_module_as_an_object():
    network, _ = networks("gru")
    x, states = problem("gru", "batched")
    expected = network(x, states)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x, states)), flat(expected), strict=True))
    before = network.layers[1].weight_hh_l1.clone()
    network.reset_parameters()
    assert not torch.equal(before, network.layers[1].weight_hh_l1)
