"""Graphs of several calls: operands that depend on each other or change, batched gradients, release of memory."""

import gc
import weakref

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import torch as fused
from fusedrnn.runtime import buffers
from fusedrnn.torch.tensor_calls import Network
from torch_layers import LAYERS, make_pair

kinds = pytest.mark.parametrize("kind", LAYERS)
# Few rows, which use weights where they lie, and more.
lengths = pytest.mark.parametrize("T", [2, 40])


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_alike(results):
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def twice(y, leaves):
    """Gradients, and those of their squares."""
    first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)]


@kinds
def test_second_derivatives_through_a_carried_state(kind):
    x, results = data(8, 2, 3), []
    for net in make_pair(kind, 3, 5, dtype=torch.float64):
        state, parts = None, []
        for t in range(4):
            y, state = net(x[2 * t : 2 * t + 2], state)
            parts.append(y)
        results.append(twice(torch.cat(parts), list(net.parameters())))
    assert_alike(results)


@kinds
def test_second_derivatives_through_layers_with_one_weight(kind):
    results = []
    for net in make_pair(kind, 5, 5, dtype=torch.float64):
        net.weight_ih_l0 = net.weight_hh_l0
        x = data(4, 2, 5).requires_grad_()
        results.append(twice(net(net(x)[0])[0], [x, *net.parameters()]))
    assert_alike(results)


@lengths
@pytest.mark.parametrize("change", ["half", "transposed", "zeros", "none"])
def test_parameters_replaced_before_backward(T, change):
    """The gradient is that of the forward call; no freed memory is read."""
    results = []
    for net in make_pair("GRU", 8, 8, dtype=torch.float64):
        y, _ = net(data(T, 1, 8))
        if change == "half":
            net.half()
        for p in net.parameters():
            if change == "transposed" and p.dim() == 2:
                p.data = p.data.t().contiguous().t()
            elif change == "zeros":
                p.data = torch.zeros_like(p)
        y.sum().backward()
        results.append([p.grad.double() for p in net.parameters()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2 if change == "half" else 1e-9, atol=1e-2)


def test_a_weight_without_memory_is_an_error():
    net = fused.GRU(8, 8)
    y, _ = net(torch.randn(2, 1, 8))
    for p in net.parameters():
        p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of a weight"):
        y.sum().backward()


@kinds
@lengths
def test_operands_that_torch_does_not_save_may_change(kind, T):
    """Biases; and the input if no weight requires a gradient."""
    results = []
    for net in make_pair(kind, 4, 5, dtype=torch.float64):
        y, _ = net(data(T, 2, 4))
        with torch.no_grad():
            net.bias_hh_l0.zero_()
        y.sum().backward()
        actual = [p.grad for p in net.parameters()]
        net.requires_grad_(False)
        x = data(T, 2, 4).requires_grad_()
        changed = x * 1
        y, _ = net(changed)
        changed.add_(1)
        y.sum().backward()
        results.append([*actual, x.grad])
    assert_alike(results)


def test_a_bias_that_changed_has_no_second_derivative():
    net = fused.GRU(4, 5)
    x = torch.randn(3, 2, 4, requires_grad=True)
    y, _ = net(x)
    with torch.no_grad():
        net.bias_hh_l0.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@kinds
def test_input_created_in_inference_mode(kind):
    """It cannot be saved, and need not be if no weight requires a gradient."""
    with torch.inference_mode():
        x = torch.randn(6, 2, 4)
    net = getattr(fused, kind)(4, 5).requires_grad_(False)
    states = [torch.randn(1, 2, 5, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    net(x, tuple(states) if len(states) > 1 else states[0])[0].sum().backward()
    assert all(state.grad.abs().sum() > 0 for state in states)


@kinds
def test_batched_gradients(kind):
    results = []
    for net in make_pair(kind, 3, 4, dtype=torch.float64):
        x = data(2, 1, 3)
        jacobian = torch.autograd.functional.jacobian(lambda x, net=net: net(x)[0], x, vectorize=kind != "LSTM")
        x.requires_grad_()
        results.append([jacobian, torch.autograd.grad(net(x)[0].sum(), x)[0]])
    assert_alike(results)
    ours = make_pair(kind, 3, 4, dtype=torch.float64)[0]
    x = data(2, 1, 3).requires_grad_()
    basis = torch.eye(8, dtype=torch.float64).reshape(8, 2, 1, 4)
    (many,) = torch.autograd.grad(ours(x)[0], x, basis, is_grads_batched=True)
    for row, tensor in zip(many, basis, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(ours(x)[0], x, tensor)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])  # torch.nn's LSTM reads what is not there
def test_a_packed_sequence_with_too_short_an_order_is_refused(kind):
    rows, sizes, order = torch.zeros(2000, 4, dtype=torch.float64), torch.tensor([1000, 1000]), torch.tensor([0])
    messages = []
    for net in make_pair(kind, 4, 5, dtype=torch.float64):
        with pytest.raises(RuntimeError) as error:
            net(PackedSequence(rows, sizes, order, order), torch.zeros(1, 1000, 5, dtype=torch.float64))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_packed_weights_are_freed_with_the_graph(monkeypatch):
    """Although the loss, which training loops store, still exists."""
    net = fused.GRU(64, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    plain, leases = buffers.Lease.__init__, weakref.WeakSet()

    def remembered(self, *args):
        plain(self, *args)
        leases.add(self)

    monkeypatch.setattr(buffers.Lease, "__init__", remembered)
    losses, alive = [], []
    for _ in range(10):
        loss = net(torch.randn(10, 2, 64))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
        gc.collect()
        alive.append(len(leases))
    assert max(alive) - alive[0] <= 1


def test_memory_is_freed_with_the_module():
    """Packed weights, reserves and scratch are freed after the last module of an op is."""
    net = fused.LSTM(33, 77)
    net(torch.randn(20, 4, 33))[0].sum().backward()
    spec = net._plan(torch.float32).spec
    executor = Network.of(spec).executor
    assert executor.weight_cache._owned
    del net
    gc.collect()
    assert not executor.weight_cache._owned
    assert not executor.weight_cache._pool._idle
    assert not executor._reserves._idle
    assert not executor.scratch_pool._idle
