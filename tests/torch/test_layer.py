"""Layer: any cell as a PyTorch module, against the papers' equations in torch and torch's own differentiation."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn import RNNOp, cells
from fusedrnn.cell import cell, dropout, sigmoid, tanh
from fusedrnn.torch import Layer, LayerReport, accelerate, cell_references, eager, quantize, read, restore
from fusedrnn.torch.guarded_call import GuardedCall
from paper_cells import cell_problem
from problems import Shape, assert_close, assert_gradients_close
from torch_layers import flat
from toy_cells import TWO_STAGES

# What torch's own forward mode and compilers copy and call.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
I, H, T, N = 3, 4, 5, 3
SHAPE = Shape(T, N, I, 9, layers=2, bidirectional=True, lengths="edges")


@cell(gates="q r n w", states="h c m", vectors="beta gamma", scalars="tau rho")
def mixed(x, recurrent, s, p):
    """Two products, a gate without input, one of the input alone, three states, several vectors and scalars."""
    h = recurrent(s.h * tanh(x.w))
    r = sigmoid(x.r + h.r) * tanh(h.q)
    n = tanh(recurrent(r * s.c).n + p.beta * x.n)
    c = p.tau * s.c + r * x.w
    return tanh(c) * n, c, p.rho * s.m + p.gamma * n


various = pytest.mark.parametrize("cell", [mixed, cells.slstm, cells.sru_projected], ids=lambda cell: cell.name)


def make(cell, **options):
    torch.manual_seed(0)
    return Layer(cell, I, H, **options)


def states_of(net, N, requires_grad=False, **options):
    """Initial states with which every cell is far from infinity."""
    states = tuple((torch.rand(shape, **options) + 0.5).requires_grad_(requires_grad)
                   for shape in net.spec.state_shape(N))
    return states if len(states) > 1 else states[0]


def operands(net, x, hx):
    return [tensor for tensor in (x, *flat(hx), *net.parameters()) if tensor.requires_grad]


def results(net, *args, **options):
    """What a call returns, and the gradients of the sum of its squares with respect to all that needs one."""
    outputs = flat(net(*args, **options))
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, operands(net, args[0], args[1]))]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for tensor, other in zip(actual, expected, strict=True):
        assert torch.equal(tensor, other)


# Of each kind: products, parameters, states, heads, raw input, reductions. The operator has tests of the catalogue.
@pytest.mark.parametrize(
    "name", ["everything", "fast_grnn", "slstm_heads", "sru", "own_output", "layer_norm_gru", "products_alone"]
)
def test_equations_of_papers(name):
    problem, oracle = cell_problem(name, SHAPE)
    spec = problem.spec
    net = Layer(spec.mode, spec.input_size, spec.hidden_size, 2, bidirectional=spec.bidirectional)
    arrays = spec.layout.unpack(problem.params, names="torch")
    net.load_state_dict({label: torch.tensor(array) for label, array in arrays.items()})
    x, *states = (torch.tensor(array, requires_grad=True) for array in (problem.x, *problem.states))
    y, final = net(x, states if len(states) > 1 else states[0], lengths=problem.lengths)
    final = flat(final)
    torch.autograd.backward([y, *final], [torch.tensor(array) for array in (problem.dy, *problem.dstates)])
    actual = y.detach().numpy(), [state.detach().numpy() for state in final]
    assert_close(actual, oracle.forward, "float32", spec)
    dparams = {label: parameter.grad.numpy() for label, parameter in net.named_parameters()}
    grads = x.grad.numpy(), spec.layout.pack(dparams, names="torch"), [state.grad.numpy() for state in states]
    assert_gradients_close(grads, oracle.gradients, "float32", spec, T, N)


@various
def test_derivatives(cell):
    net = Layer(cell, 2, 2, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    states = flat(states_of(net, 2, dtype=torch.float64))
    inputs = [x, *(state.requires_grad_() for state in states), *net.parameters()]

    def run(x, *tensors):
        hx = tensors[: len(states)] if len(states) > 1 else tensors[0]
        return flat(functional_call(net, dict(zip(names, tensors[len(states) :], strict=True)), (x, hx)))

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@various
def test_shapes_of_input(cell):
    net = make(cell, num_layers=2, bidirectional=True)
    x, hx, lengths = torch.randn(T, N, I), states_of(net, N), torch.tensor([T, 1, 3])
    y, final = net(x, hx)
    first = copy.deepcopy(net)
    first.batch_first = True
    z, other = first(x.transpose(0, 1), hx)
    assert_same([z.transpose(0, 1), *flat(other)], [y, *flat(final)])
    unbatched = [state[:, 0] for state in flat(hx)]
    z, other = net(x[:, 0], unbatched if len(unbatched) > 1 else unbatched[0])
    assert_same([z, *flat(other)], [y[:, 0], *(state[:, 0] for state in flat(final))])
    packed, final = net(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    padded, other = net(x, hx, lengths=lengths)
    assert_same([pad_packed_sequence(packed)[0], *flat(final)], [padded, *flat(other)])
    zeros = [torch.zeros_like(state) for state in flat(hx)]
    assert_same(flat(net(x)), flat(net(x, zeros if len(zeros) > 1 else zeros[0])))


@various
def test_composed_is_the_same_function(cell):
    net = make(cell, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5, dtype=torch.float64)
    x, hx = torch.randn(N, T, I, dtype=torch.float64, requires_grad=True), states_of(net, N, dtype=torch.float64)
    packed = pack_padded_sequence(x, [2, T, 1], batch_first=True, enforce_sorted=False)
    for args in ((x, hx), (x, hx, torch.tensor([2, 0, T])), (packed, hx)):
        torch.manual_seed(1)
        expected = flat(net(*args))
        torch.manual_seed(1)
        for tensor, other in zip(flat(net.composed_forward(*args)), expected, strict=True):
            torch.testing.assert_close(tensor, other)


def test_no_sequences():
    for compute in (None, "int8"):
        net = Layer("gru", 3, 5, compute=compute).requires_grad_(False)
        for lengths in (None, []):
            y, final = net(torch.zeros(4, 0, 3), lengths=lengths)
            assert y.shape == (4, 0, 5) and final.shape == (1, 0, 5)


def test_masks_inside_steps():
    """In training as the NumPy operator with that seed; in evaluation their expectation, also where gradients are."""
    net = make(cells.zoneout_lstm, num_layers=2, bidirectional=True, batch_first=False)
    x, hx = torch.randn(T, N, I, requires_grad=True), states_of(net, N, requires_grad=True)
    spec, params = net.spec, read(net)[""].params
    arrays = x.detach().numpy(), params, tuple(state.detach().numpy() for state in hx)
    torch.manual_seed(1)
    y, final = net(x, hx)
    torch.manual_seed(1)
    expected, *_ = RNNOp(spec).forward(*arrays, training=True, seed=eager.draw_seed())
    np.testing.assert_array_equal(y.detach().numpy(), expected)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(y.sum(), x)[0])
    torch.manual_seed(1)
    for tensor, other in zip(flat(net.composed_forward(x, hx)), (y, *final), strict=True):
        torch.testing.assert_close(tensor, other)
    net.eval()
    y, final = net(x, hx)
    expected = RNNOp(spec).forward(*arrays)
    torch.testing.assert_close(y, torch.tensor(expected[0]))
    assert_same([y, *final], flat(net(x.detach(), tuple(state.detach() for state in hx))))


def test_other_devices_and_transforms():
    net = make(mixed, device="meta", num_layers=2, dropout=0.5)
    shapes = [tensor.shape for tensor in flat(net(torch.randn(T, N, I, device="meta")))]
    assert shapes == [(T, N, H), *[(2, N, H)] * 3]
    net, x = make(mixed), torch.randn(T, N, I)
    expected = net(x)[0]
    torch.testing.assert_close(torch.vmap(lambda x: net(x)[0], 1, 1)(x), expected)
    with pytest.warns(torch.jit.TracerWarning):
        torch.testing.assert_close(torch.jit.trace(net, x)(x)[0], expected)


def test_dropout_under_vmap():
    net, x = make("gru", num_layers=2, dropout=0.5), torch.randn(T, 2, N, I)
    torch.manual_seed(1)
    y = torch.vmap(lambda x: net(x)[0], 1, 1, randomness="same")(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y[:, 1], net(x[:, 1])[0])
    with pytest.raises(RuntimeError, match=r"^randomness of torch.vmap must be 'same' .* got 'different'$"):
        torch.vmap(lambda x: net(x)[0], 1, 1, randomness="different")(x)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(lambda x: net(x)[0], 1, 1)(x)


@various
def test_repeated_calls(cell, monkeypatch):
    runs, run = [], GuardedCall.run
    monkeypatch.setattr(GuardedCall, "run", lambda call, *args: runs.append(run(call, *args)) or runs[-1])
    net = make(cell)
    for training in (False, True):
        runs.clear()
        for seed in range(4):
            torch.manual_seed(seed)
            x, hx = torch.randn(1, 1, I), states_of(net, 1)
            with torch.set_grad_enabled(training):
                actual = results(net, x, hx) if training else flat(net(x, hx))
                fresh = copy.deepcopy(net)
                assert_same(actual, results(fresh, x, hx) if training else flat(fresh(x, hx)))
        assert (None not in runs) and len(runs) == 2


@pytest.mark.one_value("cell")
@various
def test_compile(cell):
    net = make(cell, num_layers=2, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(net, backend=counter, fullgraph=True)
    for steps, batch in ((3, 2), (4, 3), (9, 5)):
        x, hx = torch.randn(steps, batch, I, requires_grad=True), states_of(net, batch, requires_grad=True)
        assert_same(results(model, x, hx), results(net, x, hx))
    assert counter.frame_count == 2


@various
def test_export(cell):
    net = make(cell)
    x, hx = torch.randn(T, N, I), states_of(net, N)
    dynamic = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("N", min=2)}
    of_states = {1: dynamic[1]}
    program = torch.export.export(
        net, (x, hx), dynamic_shapes=(dynamic, (of_states,) * len(hx) if isinstance(hx, tuple) else of_states)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x, hx = torch.randn(T + 2, N + 1, I), states_of(net, N + 1)
    assert_same(flat(loaded(x, hx)), flat(net(x, hx)))
    y = flat(loaded(x.requires_grad_(), hx))[0]
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(net(x, hx)[0].sum(), x)[0])


@cell(gates="f n", vectors="beta", scalars="tau", initial={"beta": 2.0, "tau": (3.0, 4.0), "f.bias": 1.0})
def with_initial(x, recurrent, s, p):
    f = sigmoid(x.f + recurrent(s.h).f)
    return f * s.h + (p.beta - p.tau * f) * tanh(x.n)


@cell(gates="a")
def of_any_name(x, recurrent, s):
    return tanh(x.a + recurrent(dropout("of x: 0=1", s.h, 0.5)).a)


def test_references_to_cells(monkeypatch):
    reference = cell_references.reference_to(with_initial)
    monkeypatch.setattr(cell_references, "_CELLS", {})
    assert cell_references.cell_of(reference) is with_initial
    heads = cells.slstm.with_heads(4)
    assert cell_references.cell_of(heads.reference) == heads
    assert repr(Layer(heads, 3, 64)) == "Layer(slstm.with_heads(4), 3, 64)"
    rates = cells.zoneout_lstm.with_rates(h=0.25, c=1e-9).with_heads(4)
    assert all(cell_references.cell_of(of.reference) == of for of in (rates, rates.expectation))
    spaced = of_any_name.with_rates(**{"of x: 0=1": 0.25})
    assert cell_references.cell_of(spaced.reference) == spaced
    module, name, digest = reference.split(":")
    for other, message in (
        (f"{module}:{name}:0", f"cell 'with_initial' of {module} has other equations"),
        (f"{module}:nothing:{digest}", f"cell 'nothing' is unknown here: import {module}"),
        (f"no.module:{name}:{digest}", "cell 'with_initial' is unknown here: import no.module"),
    ):
        with pytest.raises(ValueError, match=message):
            cell_references.cell_of(other)


def test_initial_parameters():
    net = make(with_initial, num_layers=2, bidirectional=True)
    for suffix in ("l0", "l1", "l0_reverse", "l1_reverse"):
        parameters = {name.removesuffix(f"_{suffix}"): value for name, value in net.named_parameters()}
        assert (parameters["beta"] == 2).all() and 3 <= parameters["tau"] <= 4
        assert (parameters["bias_ih"][:H] == 1).all() and (parameters["bias_hh"] == 0).all()
        assert (parameters["bias_ih"][H:].abs() <= H**-0.5).all() and len(set(parameters["bias_ih"][H:].tolist())) == H
    net, theirs = make("gru", num_layers=2), [torch.manual_seed(0), nn.GRU(I, H, 2)][1]
    assert [*net.state_dict()] == [*theirs.state_dict()]
    assert_same([*net.parameters()], [*theirs.parameters()])
    assert {*Layer(with_initial, I, H, bias=False).state_dict()} == {
        "weight_ih_l0", "weight_hh_l0", "beta_l0", "tau_l0",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_initial_parameters_of_parametrized_weights():
    """What the weights are computed from is initialized."""
    net = make(with_initial)
    parametrize.register_parametrization(net, "beta_l0", nn.Softplus())
    parametrizations.weight_norm(net, "weight_ih_l0")
    nn.utils.weight_norm(net, "weight_hh_l0")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(9)
    net.reset_parameters()
    assert (net.parametrizations.beta_l0.original == 2).all()
    parametrized = net.parametrizations.weight_ih_l0
    for parameter in (parametrized.original0, parametrized.original1, net.weight_hh_l0_g, net.weight_hh_l0_v):
        assert (parameter.abs() <= H**-0.5).all()


def test_initial_parameters_of_other_weights():
    """Of pruned weights, and of weights of other shapes; those of submodules and integers stay as they are."""
    net = make(with_initial)
    prune.identity(net, "beta_l0")
    net.weight_ih_l0 = nn.Parameter(torch.zeros(2, 3))
    net.norm, net.count = nn.LayerNorm(5), nn.Parameter(torch.tensor([7]), requires_grad=False)
    with torch.no_grad():
        net.beta_l0_orig.fill_(9)
    net.reset_parameters()
    assert (net.beta_l0_orig == 2).all() and (net.norm.weight == 1).all() and net.count.tolist() == [7]
    assert net.weight_ih_l0.abs().min() > 0 and net.weight_ih_l0.abs().max() <= H**-0.5


def test_copies():
    net = make(cells.slstm, num_layers=2, batch_first=True, bias=False, dropout=0.25, compute="bfloat16")
    text = "Layer(slstm, 3, 4, num_layers=2, bias=False, batch_first=True, dropout=0.25, compute=bfloat16)"
    assert repr(net) == text
    x = torch.randn(N, T, I)
    net.eval()
    expected = flat(net(x))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(other) == text and other.cell is cells.slstm
        assert_same(flat(other(x)), expected)
    other = Layer(cells.slstm, I, H, 2, bias=False)
    other.load_state_dict(net.state_dict())
    other.eval()
    torch.testing.assert_close(other(x.transpose(0, 1))[0].transpose(0, 1), expected[0], rtol=0.1, atol=0.01)


def test_another_cell_with_the_same_parameters():
    """All of a layer follows a change of its cell, such as of a rate."""
    net, x = make(cells.zoneout_gru).eval(), torch.randn(T, N, I)
    before = [net(x)[0] for _ in range(3)][-1]
    net.cell = cells.zoneout_gru.with_rates(h=0.9)
    y = net(x)[0]
    assert not torch.equal(y, before) and "h=0.9" in repr(net)
    assert torch.equal(copy.deepcopy(net)(x)[0], y)
    assert np.array_equal(RNNOp(net.spec).forward(x.numpy(), read(net)[""].params)[0], y.detach().numpy())
    with pytest.raises(ValueError, match=r"cell must have the same parameters as <cell zoneout_gru.*; got 'lstm'"):
        net.cell = "lstm"
    with pytest.raises(TypeError, match="leaky is no cell: decorate the function of its equations with @cell"):
        net.cell = leaky
    assert torch.equal(net(x)[0], y)


def leaky(x, recurrent, s):
    return 0.5 * s.h + tanh(x.a + recurrent(s.h).a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_heads_without_kernels(dtype):
    """They run as a loop of torch's operations: calls, lengths, gradients."""
    cell = cells.slstm.with_heads(2)
    with pytest.warns(UserWarning, match=r"(16|8) units in .*; got 5 in each .*: the layer runs as a loop of PyTorch"):
        net = Layer(cell, I, 10, dtype=dtype)
    x, lengths = torch.randn(T, N, I, dtype=dtype, requires_grad=True), torch.tensor([T, 2, 1])
    y, states = net(x, lengths=lengths)
    assert torch.equal(y, net.composed_forward(x, lengths=lengths)[0])
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    assert dx.isfinite().all() and not dx[2:, 1:].any() and dx[1, 1].any()
    if dtype is torch.bfloat16:
        return
    op = RNNOp(net.spec, backend="reference")
    expected = op.forward(x.detach().numpy(), read(net)[""].params, lengths=lengths.numpy())
    results = y.detach().numpy(), [state.detach().numpy() for state in states]
    assert_close(results, expected, net.spec.dtype, net.spec)


def test_low_precision():
    net, x = make(cells.slstm, bidirectional=True), torch.randn(T, N, I)
    hx = states_of(net, N)
    expected = flat(net(x, hx))
    low = [state.bfloat16() for state in flat(hx)]
    half = copy.deepcopy(net).bfloat16()(x.bfloat16(), low if len(low) > 1 else low[0])
    resets = torch.rand(T, N) < 0.5
    program = torch.export.export(net, (x, hx, None, resets)).module()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, hx)
        assert_same(flat(program(x, hx, None, resets)), flat(net(x, hx, resets=resets)))
    net.compute = "bfloat16"
    assert_same(flat(net(x, hx)), flat(mixed))
    for tensor, other in zip(flat(half), expected, strict=True):
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), other, rtol=0.05, atol=0.05)


def test_models():
    model = nn.Sequential(make(cells.slstm, bidirectional=True, batch_first=True))
    layer = read(model)["0"]
    assert layer.kind == "Layer" and layer.batch_first and layer.spec.mode is cells.slstm
    x = torch.randn(N, T, I)
    with torch.no_grad():
        y = model(x)[0]
        np.testing.assert_array_equal(
            RNNOp(layer.spec).forward(x.transpose(0, 1).numpy(), layer.params)[0].swapaxes(0, 1), y.numpy()
        )
        quantized, report = quantize(model)
        assert report.replaced == (LayerReport("0", "Layer"),)
        torch.testing.assert_close(quantized(x)[0], y, rtol=0.1, atol=0.05)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert restore(quantized).unchanged == (LayerReport("0", "Layer", "torch.nn has no such layer"),)
    assert all(parameter.requires_grad for parameter in quantized.parameters())
    assert_same(flat(quantized(x)), flat(model(x)))
    assert accelerate(model, compute="bfloat16").replaced == (LayerReport("0", "Layer"),)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "input must be a tensor; got list", lambda net: net([1.0])),
        (ValueError, "input must have dtype torch.float32", lambda net: net(torch.zeros(T, N, I).double())),
        (RuntimeError, "input must be 2-D or 3-D, its last axis 3", lambda net: net(torch.zeros(T, N, I + 1))),
        (RuntimeError, "input must have at least one step", lambda net: net(torch.zeros(0, N, I))),
        (
            TypeError,
            "hx must be a tuple of 2 states, h, c; got Tensor",
            lambda net: net(torch.zeros(T, N, I), torch.zeros(1)),
        ),
        (
            RuntimeError,
            re.escape("the state c must have shape (1, 3, 4); got (1, 3, 5)"),
            lambda net: net(torch.zeros(T, N, I), (torch.zeros(1, N, H), torch.zeros(1, N, H + 1))),
        ),
        (TypeError, "cell must be a mode or a cell", lambda net: Layer(TWO_STAGES, I, H)),
        (TypeError, "mode must be one of", lambda net: Layer(None, I, H)),
        (ValueError, "mode must be one of", lambda net: Layer("GRU", I, H)),
        (ValueError, "dropout must be a probability", lambda net: Layer(cells.ran, I, H, dropout=1.0)),
        (NotImplementedError, "torch.jit.script cannot compile Layer", torch.jit.script),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(Layer(cells.ran, I, H))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dropout", 1.0, "dropout must be a probability in [0, 1); got 1.0"),
        ("input_dropout", 1.0, "input_dropout must be a probability in [0, 1); got 1.0"),
        ("hidden_size", 0, "hidden_size must be at least 1; got 0"),
        ("residual", "sum", "residual must be one of"),
    ],
)
def test_errors_of_attributes_that_have_changed(name, value, message):
    net = Layer(cells.ran, I, H, num_layers=2)
    setattr(net, name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        net(torch.zeros(T, N, I))
