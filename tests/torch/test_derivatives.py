"""Every derivative by every way that a layer can be run: torch.nn's numbers, or an error; never a zero in silence."""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fusedrnn import torch as fused

KINDS = ("GRU", "LSTM", "RNN")
T, N, I, H = 3, 2, 3, 4
# What torch's own forward mode, exporter and compilers copy and call.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]


class Output(nn.Module):
    """A layer, of which only the output is looked at."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def model(kind, space):
    torch.manual_seed(0)
    return Output(getattr(space, kind)(I, H, bidirectional=True, dtype=torch.float64))


def data(seed=1):
    return torch.randn(T, N, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- ways to run it ---------------------------------------------------------------------------------------------------


def accelerated(model):
    plain = copy.deepcopy(model)
    fused.restore(plain)
    assert fused.accelerate(plain)
    for name, parameter in model.layer.named_parameters():  # gradients are asked for of these
        setattr(plain.layer, name, parameter)
    return plain


def exported(model):
    return torch.export.export(model, (data(),)).module()


def traced_frozen(model):
    model.requires_grad_(False)
    graph = make_fx(model)(data())
    model.requires_grad_(True)
    return graph


def under_a_mode(model):
    def run(x):
        with FlopCounterMode(display=False):
            return model(x)

    return run


def selective(model):
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def vmapped(model):
    program = torch.export.export(model, (data()[:, :1],)).module()
    return lambda x: torch.func.vmap(program, in_dims=1, out_dims=1)(x[:, :, None])[:, :, 0]


WAYS = {
    "module": lambda model: model,
    "accelerated": accelerated,
    "compiled eager": lambda model: torch.compile(model, backend="eager"),
    "compiled aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
    "exported": exported,
    "traced": lambda model: make_fx(model)(data()),
    "traced frozen": traced_frozen,
    "mode": under_a_mode,
    "checkpoint": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "checkpoint reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=True),
    "checkpoint selective": selective,
    "vmapped": vmapped,
}


# -- what is asked for ------------------------------------------------------------------------------------------------


def backward(run, x, parameters):
    run(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in parameters)]


def grad(run, x, parameters):
    return torch.autograd.grad(run(x).square().sum(), [x])


def grad_of_parameters(run, x, parameters):
    return torch.autograd.grad(run(x).square().sum(), parameters)


def gradient_penalty(run, x, parameters):
    (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    return [gradient, *torch.autograd.grad(gradient.square().sum(), [x, *parameters])]


def batched_grads(run, x, parameters):
    y = run(x)
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)


def dual(run, x, parameters):
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(run(forward_ad.make_dual(x.detach(), data(2)))).tangent]


def dual_of_gradient(run, x, parameters):
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(run(forward_ad.make_dual(x, data(2))).square().sum(), x)
        return [forward_ad.unpack_dual(gradient).tangent]


def jvp(run, x, parameters):
    return torch.func.jvp(run, (x.detach(),), (data(2),))


def linearize(run, x, parameters):
    for parameter in parameters:  # torch.nn's cannot be linearized either while these require gradients
        parameter.requires_grad_(False)
    return [torch.func.linearize(run, x.detach())[1](data(2))]


def vjp(run, x, parameters):
    y, pull = torch.func.vjp(run, x.detach())
    return pull(y)


def jacrev(run, x, parameters):
    return [torch.func.jacrev(run)(x.detach())]


def jacfwd(run, x, parameters):
    return [torch.func.jacfwd(run)(x.detach())]


def hessian(run, x, parameters):
    return [torch.func.hessian(lambda x: run(x).square().sum())(x.detach())]


def jacobian(run, x, parameters):
    return [torch.autograd.functional.jacobian(run, x.detach(), vectorize=True)]


def jacobian_forward(run, x, parameters):
    return [torch.autograd.functional.jacobian(run, x.detach(), vectorize=True, strategy="forward-mode")]


ASKED = (
    backward, grad, grad_of_parameters, gradient_penalty, batched_grads, dual, dual_of_gradient, jvp, linearize, vjp,
    jacrev, jacfwd, hessian, jacobian, jacobian_forward,
)  # fmt: skip
# What PyTorch has not, whatever layer it is: how its error begins.
HOOKS = "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks"
REENTRANT = "When use_reentrant=True, torch.utils.checkpoint is incompatible with"
FUNCTION = "In order to use an autograd.Function with functorch transforms"
NO_JVP = "You must implement the jvp function for custom autograd.Function"
UNUSED = "The differentiated Tensor at index 0 appears to not have been used in the graph"
COMPILED = "Detected that you are using FX to symbolically trace a dynamo-optimized function"
RAISES = {
    ("compiled aot_eager", gradient_penalty): "torch.compile with aot_autograd does not currently support double back",
    **{("compiled eager", asked): "False != True" for asked in (vjp, jacrev, hessian)},  # from Dynamo's own checks
    **{(way, asked): HOOKS for way in ("checkpoint", "checkpoint selective") for asked in (vjp, jacrev, hessian)},
    **{("checkpoint reentrant", asked): REENTRANT for asked in (grad, gradient_penalty, batched_grads, jacobian)},
    ("checkpoint reentrant", grad_of_parameters): UNUSED,
    **{("checkpoint reentrant", asked): NO_JVP for asked in (dual, dual_of_gradient, linearize, jacobian_forward)},
    **{("checkpoint reentrant", asked): FUNCTION for asked in (jvp, vjp, jacrev, jacfwd, hessian)},
    **{(way, linearize): COMPILED for way in ("compiled eager", "compiled aot_eager")},
}


@functools.cache
def truth(kind, asked):
    """Torch.nn's own."""
    network = model(kind, nn)
    return asked(network, data().requires_grad_(), list(network.parameters()))


@pytest.fixture(autouse=True)
def clean_traceback(monkeypatch):
    # A selective checkpoint that raises leaves its marks here, which Inductor would find.
    monkeypatch.setattr(torch.fx.traceback, "current_meta", {})


def check(run, asked, kind):
    expected = truth(kind, asked)
    network = model(kind, fused)
    actual = asked(run(network), data().requires_grad_(), list(network.parameters()))
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-9)


CELLS = [(way, asked) for way in WAYS for asked in ASKED]


@pytest.mark.parametrize(("way", "asked"), CELLS, ids=[f"{way}-{asked.__name__}" for way, asked in CELLS])
def test_derivative(way, asked):
    """The kinds take turns: no way to differentiate depends on the kind."""
    kind = KINDS[(list(WAYS).index(way) + ASKED.index(asked)) % len(KINDS)]
    # torch.nn's LSTM and GRU split gates by what has no batching rule in jacobian_forward; to linearize a larger cell
    # takes seconds.
    if asked is jacobian_forward or (asked is linearize and way != "module"):
        kind = "RNN"
    error = RAISES.get((way, asked))
    if error is None:
        check(WAYS[way], asked, kind)
        return
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError), match=re.escape(error)):
        check(WAYS[way], asked, kind)


@pytest.mark.parametrize("asked", [backward, gradient_penalty, dual, jvp, batched_grads])
def test_derivative_by_inductor(asked):
    """A few cases only, since a compilation takes seconds and treats the operator as aot_eager does."""

    def inductor(model):
        return torch.compile(model, backend="inductor")

    if asked is gradient_penalty:
        with pytest.raises(RuntimeError, match=r"support double backward|requires create_graph=False"):
            check(inductor, asked, "GRU")
    else:
        check(inductor, asked, "GRU")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [grad, batched_grads, dual, jvp, jacrev])
def test_derivatives_of_a_graph_of_gradients(kind, asked):
    """Make_fx records forward_training and backward, which are then differentiated."""
    network, torch_network = model(kind, fused), model(kind, nn)
    graph = make_fx(lambda x: torch.autograd.grad(network(x).sum(), x)[0])(data().requires_grad_())
    names = [str(node.target) for node in graph.graph.nodes]
    assert "fusedrnn.forward_training.default" in names and "fusedrnn.backward.default" in names
    hessian_of_sum = torch.func.hessian(lambda x: torch_network(x).sum())(data())
    tangent, x = data(2), data().requires_grad_()
    squares = torch.einsum("abcdef,abc->def", hessian_of_sum, 2 * graph(data()).detach())
    rows = torch.stack([torch.ones_like(tangent), tangent])
    expected = {
        grad: squares,
        batched_grads: torch.einsum("abcdef,gabc->gdef", hessian_of_sum, rows),
        dual: torch.einsum("abcdef,def->abc", hessian_of_sum, tangent),
    }.get(asked)
    if asked in (jvp, jacrev):  # within which nothing can be differentiated as a node's backward is
        with pytest.raises(RuntimeError, match=re.escape("attempting to call Tensor.requires_grad_()")):
            asked(graph, x, None)
        return
    if asked is batched_grads:
        (actual,) = torch.autograd.grad(graph(x), x, rows, is_grads_batched=True)
    else:
        actual = asked(graph, x, None)[-1]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
