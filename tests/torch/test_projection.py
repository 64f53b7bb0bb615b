"""torch.nn.LSTM's proj_size on the fused operator: results and gradients of torch's own, every kind of call."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn.torch
from fusedrnn import RNNSpec
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from torch_layers import flat

# What PyTorch says of its own, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

I, H, P, T, N = 5, 17, 6, 7, 3


def pair(dtype=torch.float32, **options):
    torch.manual_seed(1)
    options = {"num_layers": 2, "bidirectional": True, "proj_size": P, **options}
    ours = fusedrnn.torch.LSTM(I, H, **options, dtype=dtype)
    torch_net = torch.nn.LSTM(I, H, **options, dtype=torch.float64)
    torch_net.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    return ours, torch_net


def compare(ours, torch_net, call, x, hx=None):
    """Results, and gradients of their sum with random weights, of everything."""
    spec = RNNSpec("lstm", I, H, ours.num_layers, ours.bidirectional, projection_size=P)
    dtype = ours.weight_ih_l0.dtype
    name = str(dtype).removeprefix("torch.")
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *(hx or ()))]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    actual = flat(call(ours, leaves[0], tuple(leaves[1:]) or None))
    expected = flat(call(torch_net, exact[0], tuple(exact[1:]) or None))
    rtol, atol = tolerance(name, longest_sum(spec))
    for tensor, other in zip(actual, expected, strict=True):
        assert tensor.dtype is dtype
        assert difference(tensor.detach().numpy(), other.detach().numpy(), rtol, atol) is None
    seeds = [torch.randn_like(tensor) for tensor in actual]
    sum((tensor * seed).sum() for tensor, seed in zip(actual, seeds, strict=True)).backward()
    sum((tensor * seed.double()).sum() for tensor, seed in zip(expected, seeds, strict=True)).backward()
    pairs = [*zip(leaves, exact, strict=True), *zip(ours.parameters(), torch_net.parameters(), strict=True)]
    for tensor, other in pairs:
        scale = float(other.grad.abs().max())
        limits = gradient_tolerance(name, spec, T, N, scale)
        assert difference(tensor.grad.numpy(), other.grad.numpy(), *limits) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 1, "bidirectional": False}, {"num_layers": 3}])
@pytest.mark.parametrize("states", [False, True])
def test_results_and_gradients(dtype, options, states, runs):
    ours, torch_net = pair(dtype, **options)
    x = torch.randn(T, N, I, dtype=dtype)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    hx = tuple(torch.randn(rows, N, size, dtype=dtype) for size in (P, H)) if states else None
    compare(ours, torch_net, lambda net, x, hx: net(x, hx), x, hx)
    with torch.no_grad():
        y, _ = ours(x, hx)
    assert y.shape == (T, N, (2 if ours.bidirectional else 1) * P)
    assert len(runs) == 2
    assert all(spec.projection_size == P for spec in runs)


def test_packed_padded_and_unbatched(runs):
    ours, torch_net = pair()
    lengths = torch.tensor([4, 7, 2])
    x = torch.randn(T, N, I)
    compare(ours, torch_net, lambda net, x, hx: net(pack_padded_sequence(x, lengths, enforce_sorted=False), hx), x)
    y, final = ours(x, lengths=lengths)
    packed, torch_final = torch_net(pack_padded_sequence(x.double(), lengths, enforce_sorted=False))
    assert torch.allclose(final[0].double(), torch_final[0], atol=1e-5)
    assert not y[4:, 0].any()
    compare(ours, torch_net, lambda net, x, hx: net(x, hx), torch.randn(T, I))
    assert len(runs) == 3
    assert packed.data.shape[1] == 2 * P


def test_gradients_of_gradients():
    ours, _ = pair(torch.float64, num_layers=1)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(2, 2, size, dtype=torch.float64, requires_grad=True) for size in (P, H))

    def call(x, h, c):
        return flat(ours(x, (h, c)))

    assert torch.autograd.gradcheck(call, (x, *hx))
    # One random direction; test_autograd checks every element, of a smaller network.
    assert torch.autograd.gradgradcheck(call, (x, *hx), fast_mode=True)


def test_accelerate():
    model = torch.nn.Sequential(torch.nn.LSTM(I, H, proj_size=P))
    report = fusedrnn.torch.accelerate(model)
    assert type(model[0]) is fusedrnn.torch.LSTM
    assert not report.unchanged


def test_compiled_and_exported(runs):
    ours, _ = pair()
    x = torch.randn(T, N, I)
    expected = ours(x)[0]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], expected)
    compiled(x)[0].sum().backward()
    program = torch.export.export(ours.eval(), (x,))
    assert torch.equal(program.module()(x)[0], expected)


def test_onnx_refuses_a_projection():
    ours, _ = pair()
    with pytest.raises(Exception, match="projection") as caught:
        torch.onnx.export(ours.eval(), (torch.randn(T, N, I),), dynamo=True, verbose=False)
    assert "proj_size=6" in str(caught.value) or "proj_size=6" in str(caught.value.__cause__)
