"""The operators in torch's registry keep the contract of any operator there."""

import pytest
import torch

import fusedrnn.torch.ops  # noqa: F401 -- registers the operators
from fusedrnn import RNNSpec
from fusedrnn import torch as fused
from fusedrnn.torch import call

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
    """As of the eager call, which finite differences are tested on; also where graphs hold the operators' own parts."""
    ((_, (x, *others), options),) = [one for one in problems(True) if one[0] == problem]
    x = x.detach().to(torch.float64).requires_grad_()
    given = arguments(kind, x, *others, **options)
    _, h0, c0, weights, lengths, sizes, seed, mode, *_, dropout, _ = given
    tensors = x, h0, c0, *weights
    leaves = [tensor for tensor in tensors if tensor is not None]
    states = tuple(state for state in (h0, c0) if state is not None) or None
    spec = RNNSpec(mode, I, H, 2, True, dropout, dtype="float64")
    number = 0 if seed is None else int(seed)
    y, final = call.run(spec, x, states, weights, lengths=lengths, batch_sizes=sizes, seed=number)
    cotangents = [torch.randn_like(one).requires_grad_() for one in (y, *final)]

    def twice(results, gradients=None):
        first = gradients or torch.autograd.grad(results, leaves, cotangents, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), [*leaves, *cotangents])
        return [*first, *second]

    expected = twice([y, *final])
    *results, reserve = torch.ops.fusedrnn.forward_training(*given)
    missing, needed = [None] * (3 - len(results)), [tensor is not None for tensor in tensors]
    gradients = torch.ops.fusedrnn.backward(*cotangents, *missing, reserve, *given, needed)
    for found in (twice(torch.ops.fusedrnn.rnn(*given)), twice(results), twice(None, gradients)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
