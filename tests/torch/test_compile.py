"""torch.compile: whole graphs, no compilation per length, eager's bits."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from fusedrnn import RNNSpec
from fusedrnn import torch as fused
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from taggers import H, I, Tagger
from torch_layers import MODES, random_state

LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}
CELLS = {"LSTMCell": fused.LSTMCell, "GRUCell": fused.GRUCell, "RNNCell": fused.RNNCell}
# The first compilation is for its sizes alone, the second for all; none is for T = 1 or N = 1, which torch keeps apart.
SIZES = ((3, 2), (4, 3), (9, 5), (2, 7), (17, 17))

# Dynamo sees one operator, whatever the kind of layer: the kinds take turns.
pytestmark = pytest.mark.one_value("kind")
layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def compiled(model, backend="aot_eager"):
    """A compiled model that may not break its graph, and what counts its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def results(model, module, *args, **kwargs):
    """What a call of a model returns, and the gradients of all that needs any."""
    operands = [t for t in (*tree_leaves((args, kwargs)), *module.parameters()) if torch.is_tensor(t)]
    outputs = [t for t in tree_leaves(model(*args, **kwargs)) if torch.is_tensor(t)]
    loss = sum((t * t).sum() for t in outputs if t.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, [t for t in operands if t.requires_grad])]


def check_same(model, module, *args, **kwargs):
    """The compiled model gives what the module gives, bit for bit, gradients too."""
    expected = results(module, module, *args, **kwargs)
    actual = results(model, module, *args, **kwargs)
    assert len(actual) == len(expected)
    for tensor, other in zip(actual, expected, strict=True):
        assert torch.equal(tensor, other)


def data(*shape):
    return torch.randn(*shape, requires_grad=True)


@layer
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_training_compiles_twice(kind, options):
    net = LAYERS[kind](I, H, **options)
    model, counter = compiled(net)
    for T, N in SIZES:
        check_same(model, net, data(T, N, I))
    assert counter.frame_count == 2


@layer
def test_inference_compiles_twice(kind):
    net = LAYERS[kind](I, H, 2, bidirectional=True)
    model, counter = compiled(net)
    with torch.no_grad():
        for T, N in SIZES:
            x = torch.randn(T, N, I)
            for tensor, other in zip(tree_leaves(model(x)), tree_leaves(net(x)), strict=True):
                assert torch.equal(tensor, other)
    assert counter.frame_count == 2


@layer
def test_dimensions_marked_dynamic_compile_once(kind):
    net = LAYERS[kind](I, H)
    model, counter = compiled(net)
    for T, N in SIZES:
        x = torch.randn(T, N, I)
        torch._dynamo.mark_dynamic(x, (0, 1))
        check_same(model, net, x)
    assert counter.frame_count == 1


@layer
def test_inside_a_model_with_states(kind):
    net = LAYERS[kind](I, H, 2, bidirectional=True)
    tagger = Tagger(net)
    model, counter = compiled(tagger)
    for T, N in SIZES:
        check_same(model, tagger, data(T, N, 3), random_state(net, N, requires_grad=True))
    assert counter.frame_count == 2


def test_layers_of_different_sizes_share_a_graph():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fused.LSTM(I, 7), fused.GRU(7, 3, 2, bidirectional=True)
            self.third = fused.RNN(6, 2, nonlinearity="relu")

        def forward(self, x):
            return self.third(self.second(self.first(x)[0])[0])

    stack = Stack()
    model, counter = compiled(stack)
    check_same(model, stack, data(6, 3, I))
    assert counter.frame_count == 1


@layer
def test_unbatched(kind):
    net = LAYERS[kind](I, H)
    model, counter = compiled(net)
    for T in (3, 4, 9, 30):
        check_same(model, net, data(T, I))
    assert counter.frame_count == 2


@layer
def test_accelerated(kind):
    tagger = Tagger(getattr(nn, kind)(I, H, 2))
    fused.accelerate(tagger)
    model, counter = compiled(tagger)
    for T, N in SIZES[:3]:
        check_same(model, tagger, data(T, N, 3))
    assert counter.frame_count == 2


@layer
def test_against_torch(kind):
    torch_layer = getattr(nn, kind)(I, H, 2, bidirectional=True)
    ours = LAYERS[kind](I, H, 2, bidirectional=True)
    ours.load_state_dict(torch_layer.state_dict())
    model, _ = compiled(ours)
    x = data(7, 3, I)
    actual, expected = results(model, ours, x), results(torch_layer, torch_layer, x)
    spec = RNNSpec(MODES[kind], I, H, 2, bidirectional=True)
    outputs = len(tree_leaves(ours(x)))
    for index, (tensor, other) in enumerate(zip(actual, expected, strict=True)):
        tensor, other = tensor.detach().numpy(), other.detach().numpy()
        within = tolerance("float32", longest_sum(spec))
        if index >= outputs:
            within = gradient_tolerance("float32", spec, 7, 3, float(abs(other).max()))
        assert difference(tensor, other, *within) is None


@layer
def test_frozen_parameters_and_data(kind):
    net = LAYERS[kind](I, H, 2)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in ("weight_hh_l0", "bias_ih_l1"))
    model, _ = compiled(net)
    check_same(model, net, torch.randn(6, 3, I))


@layer
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_result(kind, used):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LAYERS[kind](I, H)

        def forward(self, x):
            return tree_leaves(self.net(x))[used]

    part = Part()
    model, _ = compiled(part)
    check_same(model, part, data(6, 3, I))


@layer
def test_parametrized(kind):
    net = weight_norm(LAYERS[kind](I, H), "weight_hh_l0")
    model, _ = compiled(net)
    check_same(model, net, data(6, 3, I))


@layer
def test_lengths(kind):
    net = LAYERS[kind](I, H, 2, bidirectional=True)
    model, counter = compiled(net)
    for T in (3, 4, 9):
        check_same(model, net, data(T, 4, I), lengths=torch.tensor([T, 1, 0, T - 1]))
    assert counter.frame_count == 2
    with pytest.raises(ValueError, match="lengths"):
        model(data(5, 4, I), lengths=torch.tensor([5, 1, 6, 4]))


def packed(T, x, sort):
    lengths = [T, T - 1, T - 1, 2] if sort else [T - 1, T, 2, T - 1]
    x, *rest = pack_padded_sequence(x, lengths, enforce_sorted=sort)
    return PackedSequence(x.detach().requires_grad_(x.requires_grad), *rest)


@pytest.mark.each_value
@layer
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_packed(kind, sort, states):
    """N is from the shape of the states or of the order; without both, torch must be allowed to read it."""
    net = LAYERS[kind](I, H, 2, bidirectional=True)
    model, counter = compiled(net)
    with torch._dynamo.config.patch(capture_scalar_outputs=sort and not states):
        for T in (3, 4, 9, 12):
            batch = packed(T, data(T, 4, I), sort)
            check_same(model, net, batch, *([random_state(net, 4, requires_grad=True)] if states else []))
    assert counter.frame_count == 2


def test_packed_where_the_graph_breaks():
    net = fused.GRU(I, H)
    model = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        for T in (3, 4, 9):
            batch = packed(T, torch.randn(T, 4, I), True)
            for tensor, other in zip(tree_leaves(model(batch)), tree_leaves(net(batch)), strict=True):
                assert tensor is None or torch.equal(tensor, other)


@layer
def test_dropout_draws_in_the_graph(kind):
    net = LAYERS[kind](I, H, 3, dropout=0.5)
    model, counter = compiled(net)
    x = torch.randn(6, 3, I)
    first, second = model(x)[0], model(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    first = results(model, net, x)
    torch.manual_seed(1)
    second = results(model, net, x)
    assert all(map(torch.equal, first, second))
    assert counter.frame_count == 1
    net.eval()
    check_same(model, net, x)


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = CELLS[kind](I, H)

        def forward(self, x):
            state = None
            for step in x.unbind(0):
                state = self.cell(step, state)
            return state

    loop = Loop()
    model, counter = compiled(loop)
    for N in (2, 3, 5, 7):
        check_same(model, loop, data(3, N, I))
    assert counter.frame_count == 2


# Inductor calls what torch deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@layer
def test_inductor(kind):
    """Its own arithmetic around the layer rounds differently; the layer itself does not."""
    net = LAYERS[kind](I, H, 2, bidirectional=True)
    model, counter = compiled(net, "inductor")
    for T, N in SIZES[:4]:
        x = data(T, N, I)
        y, *_ = tree_leaves(net(x))
        compiled_y, *_ = tree_leaves(model(x))
        assert torch.equal(compiled_y, y)
        dy = torch.randn_like(y)
        operands = [x, *net.parameters()]
        expected = torch.autograd.grad(y, operands, dy)
        assert all(map(torch.equal, torch.autograd.grad(compiled_y, operands, dy), expected))
    assert counter.frame_count == 2


def test_dynamos_settings_do_not_change():
    model, _ = compiled(fused.LSTM(I, H))
    model(torch.randn(3, 2, I))
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(nn.LSTM(I, H))[0](torch.randn(3, 2, I))


def test_unsupported_layers_break_the_graph():
    """As torch's own layers do: tracing would unroll them step by step."""
    net = fused.LSTM(I, H, dtype=torch.complex64)
    x = torch.randn(3, 2, I, dtype=torch.complex64)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(net)[0](x)


def test_errors_are_those_of_torch():
    model = torch.compile(fused.LSTM(I, H), backend="eager")
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        model(torch.randn(3, 2, I + 1))


def test_dynamo_is_imported_by_its_user_only():
    code = (
        "import sys, torch, fusedrnn.torch as fused; assert 'torch._dynamo' not in sys.modules;"
        "net = fused.GRU(3, 4); x = torch.randn(5, 2, 3);"
        "y = torch.compile(net, backend='eager', fullgraph=True)(x)[0];"
        "assert torch.equal(y, net(x)[0])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
