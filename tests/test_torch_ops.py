"""The operators in torch's registry keep the contract of any operator there."""

import pytest
import torch

import fusedrnn.torch.ops  # noqa: F401 -- registers the operators
from fusedrnn import torch as fused

I, H = 5, 4
LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}
MODES = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}

layer = pytest.mark.parametrize("kind", LAYERS)


def arguments(kind, x, lengths, sizes, seed, options=(2, True), bias=True, states=True, grad=True, projection=0):
    """Arguments of the operators, by their schemas."""
    more = {"proj_size": projection} if projection else {}
    net = LAYERS[kind](I, H, options[0], bidirectional=options[1], bias=bias, dtype=x.dtype, **more)
    net.requires_grad_(grad)
    weights = []
    for names in net._all_weights:
        matrices = [name for name in names if "weight" in name]  # torch has the projection behind the biases
        weights += [getattr(net, name) for name in matrices]
        weights += [getattr(net, name) for name in names if "bias" in name] if bias else [None] * 2
    N = int(sizes[0]) if sizes is not None else x.shape[1]
    rows = options[0] * (1 + options[1])
    h0 = torch.randn((rows, N, projection or H), dtype=x.dtype, requires_grad=grad) if states else None
    c0 = torch.randn((rows, N, H), dtype=x.dtype, requires_grad=grad) if states and kind == "LSTM" else None
    dropout = 0.0 if seed is None else 0.25
    return (x, h0, c0, weights, lengths, sizes, seed, MODES[kind], H, *options, dropout, projection)


def problems(grad):
    """Operands of every sort."""

    def x(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, requires_grad=grad)

    sizes = torch.tensor([3, 3, 2, 1])
    yield "plain", (x(6, 3, I), None, None, None), {}
    yield "no states, no bias", (x(6, 3, I), None, None, None), {"states": False, "bias": False}
    yield "float64", (x(4, 2, I, dtype=torch.float64), None, None, None), {}
    yield "lengths", (x(6, 3, I), torch.tensor([6, 2, 4]), None, None), {}
    yield "packed", (x(9, I), None, sizes, None), {}
    yield "dropout", (x(6, 3, I), None, None, torch.tensor(7)), {}


@layer
@pytest.mark.parametrize("problem", [name for name, *_ in problems(False)])
def test_operators_keep_torchs_contract(kind, problem):
    """Schema, autograd, fake kernels and AOT dispatch with dynamic shapes, by torch's own check."""
    ops = torch.ops.fusedrnn
    ((_, operands, options),) = [one for one in problems(True) if one[0] == problem]
    torch.library.opcheck(ops.rnn.default, arguments(kind, *operands, **options))
    ((_, operands, options),) = [one for one in problems(False) if one[0] == problem]
    given = arguments(kind, *operands, **options, grad=False)
    # Not the comparison of results after tracing: what lies between the parts of a reserve is never written.
    without = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward_training.default, given, test_utils=without)
    y, *final, reserve = ops.forward_training(*given)
    gradients = [torch.randn_like(t) for t in (y, *final)] + [None] * (2 - len(final))
    needed = [t is not None for t in (*given[:3], *given[3])]
    torch.library.opcheck(ops.backward.default, (*gradients, reserve, *given, needed))


def test_operators_keep_torchs_contract_with_a_projection():
    x = torch.randn(6, 3, I, requires_grad=True)
    torch.library.opcheck(torch.ops.fusedrnn.rnn.default, arguments("LSTM", x, None, None, None, projection=2))


@pytest.mark.parametrize(("kind", "projection"), [*((kind, 0) for kind in LAYERS), ("LSTM", 2)])
def test_fakes_know_shapes(kind, projection):
    given = arguments(kind, torch.randn(6, 3, I), None, None, None, projection=projection)
    real = torch.ops.fusedrnn.forward_training(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.fusedrnn.forward_training(mode.from_tensor(given[0]), *given[1:])
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@layer
@pytest.mark.parametrize("problem", [name for name, *_ in problems(False)])
def test_gradients_of_gradients(kind, problem):
    """By finite differences: of the operator, and of its backward, which graphs may hold as a node of its own."""
    ((_, (x, *others), options),) = [one for one in problems(True) if one[0] == problem]
    x = x.detach().to(torch.float64).requires_grad_()
    _, h0, c0, weights, *rest = arguments(kind, x, *others, **options)
    tensors = [x, h0, c0, *weights]
    places = [place for place, tensor in enumerate(tensors) if tensor is not None]
    given = [tensors[place] for place in places]

    def call(*leaves):
        whole = [None] * len(tensors)
        for place, leaf in zip(places, leaves, strict=True):
            whole[place] = leaf
        return (*whole[:3], whole[3:], *rest)

    def rnn(*leaves):
        return tuple(torch.ops.fusedrnn.rnn(*call(*leaves)))

    *results, reserve = torch.ops.fusedrnn.forward_training(*call(*given))
    cotangents = [torch.randn_like(one).requires_grad_() for one in results]

    def backward(*leaves):
        given, kept = leaves[: len(results)], call(*leaves[len(results) :])
        missing = [None] * (3 - len(results))
        return tuple(torch.ops.fusedrnn.backward(*given, *missing, reserve, *kept, [t is not None for t in tensors]))

    assert torch.autograd.gradgradcheck(rnn, given, fast_mode=True)
    once = torch.autograd.grad(results, given, cotangents)
    again = backward(*cotangents, *given)
    for one, other in zip(again, once, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(backward, [*cotangents, *given], fast_mode=True)
