"""Where the operator is not asked: PyTorch's own implementation runs, and gives what it gives without us."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn.torch
from fusedrnn import RNNSpec
from fusedrnn.torch import custom_op as ops
from fusedrnn.torch import dispatch, tensor_calls
from fusedrnn.torch.double_backward import Extent
from fusedrnn.torch.network import CallShape, Network
from torch_calls import record_calls
from torch_layers import KINDS, LAYERS, first, flat, input_for, make_pair


@pytest.fixture
def runs(monkeypatch):
    """The calls of the operator, eager and traced, as they come: their specs."""
    seen = SimpleNamespace(eager=[], traced=[])
    record_calls(monkeypatch, seen.eager)
    run = ops.run

    def traced_run(spec, *args, **options):
        seen.traced.append(spec)
        return run(spec, *args, **options)

    monkeypatch.setattr(ops, "run", traced_run)
    return seen


def same(ours, torch_net, function):
    """Both must return the very same, or raise the same."""
    actual = []
    for net in (torch_net, ours):
        try:
            actual.append(function(net))
        except Exception as error:
            actual.append((type(error), str(error)))
    assert type(actual[0]) is type(actual[1])
    if isinstance(actual[0], torch.Tensor):
        assert actual[0].dtype == actual[1].dtype and actual[0].device == actual[1].device
        assert actual[0].is_meta or torch.equal(actual[0], actual[1])
    else:
        assert actual[0] == actual[1]
    return actual[0]


@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4, dtype=torch.complex64)
    same(ours, torch_net, lambda net: first(net(input_for(kind, torch.complex64).fill_(0.5))))
    assert not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_other_devices(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4, device="cpu")
    for net in (ours, torch_net):
        net.to("meta")
    assert same(ours, torch_net, lambda net: first(net(input_for(kind).to("meta")))).is_meta
    same(ours, torch_net, lambda net: first(net(input_for(kind))))
    assert not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_that_is_off(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    x = input_for(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert first(ours(x)).dtype == torch.float32
        torch.testing.assert_close(first(ours(x)), first(torch_net(x)))
    assert [spec.compute for spec in runs.eager] == [None, None]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_on_torch(kind, batch_first, runs):
    """In forward mode, where torch.nn's own runs."""
    ours, torch_net = make_pair(kind, 3, 4, 2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(3, 5, 3)
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad(), forward_ad.dual_level():
        y, final = ours(x, lengths=[2, 5, 3])
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), batch_first, enforce_sorted=False)
    expected, torch_final = torch_net(packed)
    padded = torch.nn.utils.rnn.pad_packed_sequence(expected, batch_first)[0]
    torch.testing.assert_close(y, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first(final), first(torch_final), rtol=1e-5, atol=1e-6)
    assert not runs.eager


# -- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    x = input_for(kind)

    def gradient(net):
        def loss(parameters):
            return first(torch.func.functional_call(net, parameters, (x,))).square().sum()

        return torch.cat([tensor.flatten() for tensor in torch.func.grad(loss)(dict(net.named_parameters())).values()])

    same(ours, torch_net, gradient)
    same(ours, torch_net, lambda net: torch.func.jacrev(lambda x: first(net(x)).sum(0))(x))
    same(ours, torch_net, lambda net: torch.func.jvp(lambda x: first(net(x)), (x,), (x,))[1])
    same(ours, torch_net, lambda net: torch.func.vmap(lambda x: first(net(x)))(torch.stack([x, x])))
    same(ours, torch_net, lambda net: torch.func.grad(lambda scale: scale * first(net(x)).sum())(torch.tensor(2.0)))
    assert not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    x = input_for(kind)

    def tangent(net):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(first(net(forward_ad.make_dual(x, x)))).tangent

    same(ours, torch_net, tangent)
    assert not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_runs_the_operator(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4, dtype=torch.float64)
    x = input_for(kind, torch.float64)
    swapped = {name: (2 * value.detach()).requires_grad_() for name, value in ours.named_parameters()}
    actual = [first(torch.func.functional_call(net, swapped, (x,))) for net in (ours, torch_net)]
    gradients = [torch.autograd.grad(y.sum(), list(swapped.values())) for y in actual]
    torch.testing.assert_close(actual[0], actual[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert len(runs.eager) == 1 and not any(p.grad is not None for p in ours.parameters())
    assert not torch.equal(first(ours(x)), actual[0])


# -- tensors that are not what they look like -------------------------------------------------------------------------


class Logged(torch.Tensor):
    """A subclass that sees every operation."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_see_torchs_operations(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    x = input_for(kind)
    logs = []
    for net in (torch_net, ours):
        Logged.seen.clear()
        assert isinstance(first(net(x.as_subclass(Logged))), Logged)
        logs.append([name for name in Logged.seen if name.startswith(("rnn", "lstm", "gru"))])
    assert logs[0] == logs[1] and logs[0] and not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_lazily_negated_tensors(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    x = input_for(kind)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg() and torch.equal(negated, x)
    same(ours, torch_net, lambda net: first(net(negated)))
    name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    weight = getattr(torch_net, name).detach()
    for net in (ours, torch_net):
        setattr(net, name, torch.nn.Parameter(torch.complex(torch.zeros_like(weight), -weight).conj().imag))
    assert getattr(ours, name).is_neg()
    same(ours, torch_net, lambda net: first(net(x)))
    assert not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unusual_weights(kind, runs):
    name = "bias_ih" if kind.endswith("Cell") else "bias_ih_l0"
    for value in (None, torch.nn.Parameter(torch.zeros(1))):
        ours, torch_net = make_pair(kind, 3, 4)
        x = input_for(kind)
        for net in (ours, torch_net):
            setattr(net, name, value)
        same(ours, torch_net, lambda net, x=x: first(net(x)))
    assert not runs.eager


@pytest.mark.parametrize("kind", [*KINDS, "Layer"])
def test_plain_tensors_in_the_place_of_all_parameters(kind):
    net = fusedrnn.torch.Layer("gru", 3, 4) if kind == "Layer" else getattr(fusedrnn.torch, kind)(3, 4)
    x, is_cell = input_for(kind), kind.endswith("Cell")
    state = torch.zeros(1, x.shape[-2], 4)
    options = {} if is_cell else {"resets": torch.zeros(x.shape[:2], dtype=torch.bool)}
    options |= {} if is_cell else {"reset_states": (state, state) if kind == "LSTM" else state}

    def call():
        results = [first(net(x, **options))]
        with torch.autocast("cpu", torch.bfloat16):
            results.append(first(net(x)))
        if kind == "Layer":
            results.append(net.composed_forward(x)[0].detach())
        return results

    expected = call()
    for name, parameter in list(net.named_parameters()):
        delattr(net, name)
        setattr(net, name, parameter.detach())
    for one, other in zip(call(), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)
    same(ours, torch_net, lambda net: first(net(input_for(kind)[..., :0, :])))
    assert not runs.eager


def test_inference_tensors_and_parameters_run_the_operator(runs):
    net, x = fusedrnn.torch.LSTM(3, 4), input_for("LSTM")
    states = torch.nn.Parameter(torch.zeros(1, 2, 4)), torch.nn.Parameter(torch.zeros(1, 2, 4))
    net(x, states)[0].sum().backward()
    assert states[0].grad.any() and states[1].grad.any()
    with torch.inference_mode():
        y = net(x.clone(), tuple(tensor.clone() for tensor in states))[0]
    assert y.is_inference() and len(runs.eager) == 2
    with torch.no_grad():
        assert torch.equal(net(x)[0], y)


# -- tracing ----------------------------------------------------------------------------------------------------------

DEPRECATED = "ignore:`torch.jit.*` is (deprecated|not supported):DeprecationWarning"


# torch.nn's checks of shapes are not traced.
@pytest.mark.filterwarnings(DEPRECATED, "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_keeps_no_constants(kind):
    ours, torch_net = make_pair(kind, 3, 4)
    x, other = input_for(kind), input_for(kind)
    traced = torch.jit.trace(ours, (x,), check_trace=False)
    assert torch.equal(first(traced(other)), first(torch_net(other)))


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("kind", KINDS)
def test_jit_script_compiles_torchs_layers(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ours

        def forward(self, x):
            return self.net(x)

    x = input_for(kind)
    whole = Whole()
    scripted = torch.jit.script(whole)
    assert torch.equal(first(scripted(x)), first(torch_net(x))) and not runs.eager
    assert [name for name, _ in scripted.named_parameters()] == [f"net.{name}" for name, _ in ours.named_parameters()]
    with torch.no_grad():
        next(ours.parameters()).zero_()
        next(torch_net.parameters()).zero_()
    assert torch.equal(first(scripted(x)), first(torch_net(x)))
    assert type(ours) is getattr(fusedrnn.torch, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_our_modules_are_leaves_of_fx_graphs(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4, dtype=torch.float64)
    x = input_for(kind, torch.float64)
    for _ in range(3):  # before the first call, and when calls are prepared to be repeated
        runs.eager.clear()
        graphs = [torch.fx.symbolic_trace(torch.nn.Sequential(net)) for net in (ours, torch_net)]
        shapes = [[(node.op, node.name, node.target) for node in graph.graph.nodes] for graph in graphs]
        assert shapes[0] == shapes[1] and not runs.eager
        torch.testing.assert_close(first(graphs[0](x)), first(graphs[1](x)))
        assert len(runs.eager) == 1


@pytest.mark.parametrize("base", [fusedrnn.torch.GRU, torch.nn.GRU, fusedrnn.torch.GRUCell, torch.nn.GRUCell])
def test_fx_refuses_the_forward_of_a_subclass(base):
    """As torch.nn's does; a node would run that code again. As a leaf, it runs once."""
    class Doubled(base):
        def forward(self, x, hx=None):
            return super().forward(2 * x, hx)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Doubled)

    net = torch.nn.Sequential(Doubled(3, 4))
    fusedrnn.torch.accelerate(net, subclasses=True)
    with pytest.raises(torch.fx.proxy.TraceError, match=r"^torch.fx cannot trace the forward of Doubled"):
        torch.fx.symbolic_trace(net)
    x = torch.rand(5, 3)
    assert torch.equal(first(torch.fx.GraphModule(net, Leaves().trace(net))(x)), first(net(x)))


@pytest.mark.parametrize("kind", LAYERS)
def test_fx_keeps_states_and_lengths(kind, runs):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = getattr(fusedrnn.torch, kind)(3, 4)

        def forward(self, x, h, lengths):
            return self.net(x, (h, h) if kind == "LSTM" else h, lengths=lengths)

    whole = Whole()
    args = input_for(kind), torch.randn(1, 2, 4), torch.tensor([2, 5])
    actual, expected = torch.fx.symbolic_trace(whole)(*args), whole(*args)
    assert torch.equal(actual[0], expected[0]) and torch.equal(first(actual[1]), first(expected[1]))
    assert len(runs.eager) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_modes_see_one_operator(kind, runs):
    ours, torch_net = make_pair(kind, 3, 4, dtype=torch.float64)
    x = input_for(kind, torch.float64)
    graph = make_fx(lambda x: first(ours(x)))(x)
    assert sum(str(node.target).startswith("fusedrnn") for node in graph.graph.nodes) == 1
    torch.testing.assert_close(graph(x), first(torch_net(x)))
    with FlopCounterMode(display=False):
        assert torch.equal(first(ours(x)), graph(x))
    assert len(runs.traced) == 2 and not runs.eager


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind, runs):
    with FakeTensorMode():
        ours, torch_net = make_pair(kind, 3, 4)
        x = input_for(kind)
        assert first(ours(x)).shape == first(torch_net(x)).shape and len(runs.traced) == 1


def test_fake_tensors_of_other_devices_run_on_torch(runs):
    with torch.device("meta"):
        net = fusedrnn.torch.GRU(3, 4)
        assert net(torch.randn(5, 2, 3))[0].is_meta and not runs.eager
        other = copy.deepcopy(net).to_empty(device="cpu")
        assert other(torch.randn(5, 2, 3, device="cpu"))[0].device.type == "cpu" and len(runs.eager) == 1


@pytest.mark.parametrize("kind", ["GRU", "Layer"])
def test_torchs_operations_under_a_default_device(kind, monkeypatch):
    """It is that of the user's new tensors alone."""
    net = fusedrnn.torch.GRU(3, 4, bidirectional=True) if kind == "GRU" else fusedrnn.torch.Layer("gru", 3, 4)
    x, lengths, resets = torch.randn(5, 3, 3), torch.tensor([5, 2, 4]), torch.zeros(5, 3, dtype=torch.bool)
    resets[2, 1] = True
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    both = {"resets": resets, "lengths": lengths}
    calls = [(x, {"lengths": lengths}), (packed, {}), (x, {"resets": resets}), (x, both)]
    monkeypatch.setattr(dispatch, "runner", lambda: None)
    for data, options in calls:
        expected = flat(net(data, **options))
        with torch.device("meta"):
            actual = flat(net(data, **options))
        assert all(map(torch.equal, actual, expected))


def test_backward_under_a_default_device():
    """Autograd runs it without one, but a graph may call it under one."""
    memory, lengths = torch.arange(200, dtype=torch.uint8)[1:], torch.tensor([5, 2, 4])
    shape = CallShape(Network.of(RNNSpec("gru", 3, 4)), torch.randn(5, 3, 3), lengths, None)
    with torch.device("meta"):
        assert torch.equal(tensor_calls._aligned(memory), memory)
        assert torch.equal(Extent.of(shape).valid.sum(0), lengths)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_as_in_torch():
    """They have no shape that can be read; torch.nn takes them where it does not use oneDNN, as for a GRU."""
    nested = torch.nested.nested_tensor([*torch.randn(5, 2, 3)])
    layer, expected = fusedrnn.torch.GRU(3, 4), torch.nn.GRU(3, 4)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer(nested)[0], expected(nested)[0])
