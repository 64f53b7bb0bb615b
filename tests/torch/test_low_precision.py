"""Modules and tensors of bfloat16 and float16: float32 inside the operator, one rounding of the results."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn.torch
from fusedrnn.torch import LayerReport, accelerate
from torch_layers import CELLS, KINDS, LAYERS, first, flat, make_pair, random_state

I, H, T, N = 6, 17, 7, 3
DTYPES = [torch.bfloat16, torch.float16]


def half_pair(kind, dtype, **options):
    """Ours and torch.nn's in a dtype, and torch.nn's in float64 with the same values."""
    ours, plain = make_pair(kind, I, H, **options)
    ours, plain = ours.to(dtype), plain.to(dtype)
    exact = getattr(torch.nn, kind)(I, H, **options).double()
    exact.load_state_dict(ours.state_dict())
    return ours, plain, exact


def input_of(kind, dtype):
    return torch.randn((N, I) if kind in CELLS else (T, N, I)).to(dtype)


def bound(dtype, steps):
    """For results below 1 in magnitude: half a unit of the output; in bfloat16 also h as an operand at every step.

    A rounding of h changes a sum of 17 products by at most 17 / sqrt(17) halves of a unit, and typically much less.
    """
    eps = torch.finfo(dtype).eps
    return eps / 2 + 1e-5 + (4 * steps * eps / 2 if dtype is torch.bfloat16 else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(kind, dtype, runs):
    options = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
    ours, plain, exact = half_pair(kind, dtype, **options)
    x = input_of(kind, dtype)
    hx = tuple(torch.randn(2, N, H)) if kind == "LSTMCell" else torch.randn(N, H)
    hx = random_state(plain, N) if kind in LAYERS else hx
    hx = tuple(state.to(dtype) for state in hx) if isinstance(hx, tuple) else hx.to(dtype)
    in_float64 = tuple(state.double() for state in hx) if isinstance(hx, tuple) else hx.double()
    with torch.no_grad():
        for args, exact_args in (((x,), (x.double(),)), ((x, hx), (x.double(), in_float64))):
            actual, expected, reference = flat(ours(*args)), flat(plain(*args)), flat(exact(*exact_args))
            errors, torch_errors = [], []
            for a, e, r in zip(actual, expected, reference, strict=True):
                assert a.dtype == e.dtype == dtype and a.shape == e.shape
                # A result of magnitude 1 to 2, as c may be, has twice the unit.
                scale = max(1.0, float(r.abs().max()))
                assert (a - r).abs().max() <= bound(dtype, 1 if kind in CELLS else T) * scale
                errors.append((a - r).abs().mean())
                torch_errors.append((e - r).abs().mean())
            assert sum(errors) < 1.5 * sum(torch_errors)
    compute = {torch.bfloat16: "bfloat16", torch.float16: None}[dtype]
    assert {(spec.dtype, spec.compute) for spec in runs} == {("float32", compute)}


def test_float16_is_float32_with_rounded_results():
    """Bit by bit: products of float16 need no rounding of operands."""
    ours, *_ = half_pair("LSTM", torch.float16)
    x = input_of("LSTM", torch.float16)
    full = fusedrnn.torch.LSTM(I, H)
    full.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b.half()) for a, b in zip(flat(ours(x)), flat(full(x.float())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(kind, dtype):
    ours, _, exact = half_pair(kind, dtype)
    x = input_of(kind, dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    cotangent = torch.randn(first(ours(x)).shape).to(dtype)
    actual = torch.autograd.grad(first(ours(x)), [x, *ours.parameters()], cotangent)
    expected = torch.autograd.grad(first(exact(x_exact)), [x_exact, *exact.parameters()], cotangent.double())
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        limit = (1 if dtype is torch.float16 else 8) * torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), e, rtol=limit, atol=limit * float(e.abs().max()))
    (dx,) = torch.autograd.grad(first(ours(x)), x, cotangent, create_graph=True)
    assert torch.autograd.grad(dx.float().pow(2).sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_a_call_agree(kind, dtype, runs):
    net, *_ = half_pair(kind, dtype, bidirectional=True)
    x, lengths = input_of(kind, dtype), torch.tensor([4, 7, 1])
    with torch.no_grad():
        padded, final = net(x, lengths=lengths)
        packed, packed_final = net(pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert torch.equal(pad_packed_sequence(packed)[0], padded) and padded.dtype == dtype
        assert all(map(torch.equal, flat(final), flat(packed_final)))
        net.batch_first = True
        y, _ = net(x.transpose(0, 1), lengths=lengths)
        assert torch.equal(y, padded.transpose(0, 1)) and y.stride() == net(x.transpose(0, 1))[0].stride()
    assert len(runs) >= 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_moves_parameters(dtype, runs):
    torch.manual_seed(0)
    net = fusedrnn.torch.GRU(I, H).to(dtype)
    x, target = input_of("GRU", dtype), torch.randn(T, N, H).to(dtype) / 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(x)[0].float(), target.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and len(runs) >= 30


def test_int8_on_bfloat16_tensors():
    net = fusedrnn.torch.LSTM(I, H, compute="int8", dtype=torch.bfloat16).eval()
    full = fusedrnn.torch.LSTM(I, H, compute="int8").eval()
    full.load_state_dict(net.state_dict())
    x = input_of("LSTM", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(net(x)[0], full(x.float())[0].bfloat16())


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRUCell"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs(kind, dtype):
    net, *_ = half_pair(kind, dtype)
    net.requires_grad_(False)
    x = input_of(kind, dtype)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for graph in (make_fx(net)(x), compiled, torch.export.export(net, (x,)).module()):
        assert torch.equal(first(graph(x)), first(net(x))) and first(graph(x)).dtype == dtype


def test_mixed_dtypes_raise_torchs_errors():
    ours, plain, _ = half_pair("GRU", torch.bfloat16)
    for net in (ours, plain):
        with pytest.raises((ValueError, RuntimeError), match="type"):
            net(torch.randn(T, N, I))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accelerate(dtype, runs):
    model = torch.nn.Sequential(torch.nn.LSTM(I, H)).to(dtype)
    assert accelerate(model).replaced == (LayerReport("0", "LSTM"),)
    assert model(input_of("LSTM", dtype))[0].dtype == dtype and runs
