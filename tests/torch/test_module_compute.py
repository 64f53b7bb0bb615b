"""``compute`` on modules: the operator's results in that format; copies, graphs and reports keep the attribute."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn.torch
from fusedrnn import RNNOp
from fusedrnn.testing.tolerance import longest_sum, tolerance
from fusedrnn.torch import LayerReport, accelerate, read, restore
from torch_layers import CELLS, KINDS, LAYERS, first, flat, input_for, make_pair

I, H, T, N = 5, 17, 6, 3
FORMATS = ("bfloat16", "int8", "int8_weights")
# A float32 sum in another order may round an operand to its neighbour.
STEP = {"bfloat16": 2.0**-8, "int8": 1 / 127, "int8_weights": 1 / 127}


def make(kind, compute, **options):
    torch.manual_seed(0)
    return getattr(fusedrnn.torch, kind)(I, H, compute=compute, **options).eval()


def reference(net, x):
    """Output and final states of the NumPy reference, in float64 on operands rounded in the same way."""
    (layer,) = read(net).values()
    y, final, _ = RNNOp(layer.spec, backend="reference").forward(x.numpy(), layer.params)
    return layer.spec, [torch.from_numpy(array) for array in (y, *final)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("compute", FORMATS)
def test_layers_give_the_operators_results(kind, compute):
    net = make(kind, compute, num_layers=2, bidirectional=True)
    x = torch.randn(T, N, I)
    with torch.no_grad():
        actual = flat(net(x))
    spec, expected = reference(net, x)
    assert spec.compute == compute
    rtol, atol = tolerance("float32", longest_sum(spec))
    for a, e in zip(actual, expected, strict=True):
        error = (a - e).abs()
        assert a.dtype == torch.float32 and error.max() < 4 * STEP[compute]
        assert (error <= atol + rtol * e.abs()).float().mean() > 0.9


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("compute", FORMATS)
def test_cells_give_the_operators_results(kind, compute):
    net, x = make(kind, compute), torch.randn(N, I)
    with torch.no_grad():
        actual = flat(net(x))
    spec, (_, *expected) = reference(net, x[None])
    assert spec.compute == compute
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[0], rtol=0, atol=4 * STEP[compute])


@pytest.mark.one_value("kind")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("compute", FORMATS)
def test_forms_of_a_call_agree(kind, compute):
    """Packed, padded, batch first, unbatched: the same bits."""
    net, x, lengths = make(kind, compute), torch.randn(T, N, I), torch.tensor([4, 6, 1])
    with torch.no_grad():
        padded, final = net(x, lengths=lengths)
        packed, packed_final = net(pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert torch.equal(torch.nn.utils.rnn.pad_packed_sequence(packed)[0], padded)
        assert all(map(torch.equal, flat(final), flat(packed_final)))
        assert torch.equal(net(x[:4, 0])[0], padded[:4, 0])
        net.batch_first = True
        assert torch.equal(net(x.transpose(0, 1), lengths=lengths)[0], padded.transpose(0, 1))


# -- training ---------------------------------------------------------------------------------------------------------


def gradients(net, x, create_graph=False):
    loss = sum((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in flat(net(x)))
    return torch.autograd.grad(loss, [x, *net.parameters()], create_graph=create_graph)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trains(kind):
    """Gradients as float32's, up to a few roundings of operands; those of gradients come from rounded operands too."""
    net, x = make(kind, "bfloat16").train(), torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    x.requires_grad_()
    plain = getattr(torch.nn, kind)(I, H)
    plain.load_state_dict(net.state_dict())
    actual, expected, graph = gradients(net, x), gradients(plain, x), gradients(net, x, create_graph=True)
    differ = False
    for a, e, g in zip(actual, expected, graph, strict=True):
        scale = float(e.abs().max())
        torch.testing.assert_close(a, e, rtol=0, atol=8 * 2.0**-8 * scale)
        torch.testing.assert_close(g, a, rtol=0, atol=4 * 2.0**-8 * scale)
        differ |= not torch.allclose(a, e, rtol=0, atol=1e-6 * scale)
    assert differ
    second = torch.autograd.grad(graph[0].pow(2).sum(), x)[0]
    expected_second = torch.autograd.grad(gradients(plain, x, create_graph=True)[0].pow(2).sum(), x)[0]
    torch.testing.assert_close(second, expected_second, rtol=0, atol=0.06 * float(expected_second.abs().max()))


@pytest.mark.one_value("kind")
@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_for_inference_only(kind):
    net, x = make(kind, "int8"), input_for(kind).repeat_interleave(2, -1)[..., :I]
    for tensor in (net, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=r"compute='int8' is for inference only: call it under torch.no_grad"):
            net(x if tensor is net else tensor)
        net.requires_grad_(False)
    with torch.no_grad():
        expected = first(net(x))
    assert torch.equal(first(net(x)), expected)
    assert torch.equal(first(net.train()(x)), expected)
    net.requires_grad_(True)
    with pytest.raises(Exception, match=r"compute='int8' is for inference only: call it under torch.no_grad"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.one_value("kind")
@pytest.mark.parametrize("kind", LAYERS)
def test_int8_in_graphs_is_for_inference_only(kind):
    net, x = make(kind, "int8"), torch.randn(T, N, I)
    with torch.no_grad():
        graph = make_fx(net)(x)
        assert all(map(torch.equal, flat(graph(x)), flat(net(x))))
        with pytest.raises(RuntimeError, match="inference only"):
            torch.func.vmap(graph)(x[None])
    with pytest.raises(RuntimeError, match="inference only"):
        graph(x.requires_grad_())


# -- the attribute ----------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", FORMATS)
def test_copies_and_representation(kind, compute):
    net, plain = make(kind, compute), getattr(torch.nn, kind)(I, H)
    assert net.compute == compute and repr(net) == repr(plain)[:-1] + f", compute={compute})"
    assert list(net.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)
    x = input_for(kind).repeat_interleave(2, -1)[..., :I]
    with torch.no_grad():
        for other in copies:
            assert other.compute == compute and torch.equal(first(other(x)), first(net(x)))
        restored = make(kind, compute)
        restored.load_state_dict(plain.state_dict())
        expected = getattr(fusedrnn.torch, kind)(I, H)
        expected.load_state_dict(plain.state_dict())
        assert expected.compute is None and "compute" not in repr(expected)
        expected.compute = compute
        assert torch.equal(first(restored(x)), first(expected.eval()(x)))


def test_errors():
    with pytest.raises(ValueError, match=r"compute must be one of float32, bfloat16, int8.*; got 'int7'"):
        fusedrnn.torch.LSTM(I, H, compute="int7")
    with pytest.raises(ValueError, match="compute='bfloat16' needs dtype 'float32'; got 'float64'"):
        fusedrnn.torch.GRUCell(I, H, compute="bfloat16", dtype=torch.float64)
    with pytest.raises(ValueError, match="compute='bfloat16' needs dtype 'float32'; got 'float64'"):
        make("LSTM", "bfloat16").double()(torch.randn(T, N, I).double())
    with pytest.raises(TypeError):
        fusedrnn.torch.GRUCell(I, H, True, None, None, "bfloat16")  # keyword only
    assert fusedrnn.torch.LSTM(I, H, compute="float32").compute is None


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("compute", FORMATS)
def test_graphs_keep_the_format(kind, compute):
    net, x = make(kind, compute).requires_grad_(False), input_for(kind).repeat_interleave(2, -1)[..., :I]
    expected = first(net(x))
    assert not torch.equal(expected, first(make(kind, None)(x)))
    program = torch.export.export(net, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for graph in (
        make_fx(net)(x), torch.compile(net, backend="aot_eager", fullgraph=True),
        program.module(), torch.export.load(file).module(),
    ):  # fmt: skip
        assert torch.equal(first(graph(x)), expected)


@pytest.mark.one_value("kind")
@pytest.mark.parametrize("kind", ["RNN", "LSTMCell"])
def test_compiled_training(kind):
    net, x = make(kind, "bfloat16"), input_for(kind).repeat_interleave(2, -1)[..., :I]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(first(run(x)).pow(2).sum(), list(net.parameters())) for run in (net, compiled)]
    assert all(map(torch.equal, *grads))


def test_programs_without_the_argument():
    """Those exported before there was one."""
    net, x = make("GRU", None).requires_grad_(False), torch.randn(T, N, I)
    weights = [net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, net.bias_hh_l0]
    y, _ = torch.ops.fusedrnn.rnn(x, None, None, weights, None, None, None, "gru", H, 1, False, 0.0, 0)
    assert torch.equal(y, net(x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export_is_in_float32():
    pytest.importorskip("onnxscript")
    net, x = make("GRU", "bfloat16"), torch.randn(T, N, I)
    with pytest.warns(UserWarning, match="compute='bfloat16' is not exported: .* dtype of tensors, torch.float32"):
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph if node.op_type == "GRU"] == ["GRU"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torchscript_is_in_float32():
    net, x = make("LSTM", "int8"), torch.randn(T, N, I)
    plain = torch.nn.LSTM(I, H)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(torch.jit.script(torch.nn.Sequential(net))(x)[0], plain(x)[0])


# -- models -----------------------------------------------------------------------------------------------------------


class Doubled(torch.nn.GRU):
    def train(self, mode=True):
        return super().train(mode)

    def forward(self, x):
        return super().forward(2 * x)


def test_accelerate_with_a_format():
    model = torch.nn.ModuleDict({
        "torch": torch.nn.LSTM(I, H), "ours": fusedrnn.torch.GRU(I, H), "float64": torch.nn.GRUCell(I, H).double(),
        "subclass": Doubled(I, H), "same": fusedrnn.torch.RNN(I, H, compute="bfloat16"),
    })  # fmt: skip
    report = accelerate(model, subclasses=True, compute="bfloat16")
    kinds = {"torch": "LSTM", "ours": "GRU", "subclass": "Doubled"}
    assert report.replaced == tuple(LayerReport(*layer) for layer in kinds.items())
    (left,) = report.unchanged
    assert left.name == "float64"
    assert re.match("its parameters are torch.float64, which compute='bfloat16'", left.reason)
    assert [getattr(net, "compute", None) for net in model.values()] == ["bfloat16"] * 2 + [None] + ["bfloat16"] * 2
    assert accelerate(model).replaced == (LayerReport("float64", "GRUCell"),) and model["torch"].compute == "bfloat16"
    assert pickle.loads(pickle.dumps(model["subclass"])).compute == "bfloat16"
    restore(model)
    assert "compute" not in vars(model["torch"]) and type(model["torch"]) is torch.nn.LSTM
    with pytest.raises(ValueError, match="compute must be one of"):
        accelerate(model, compute="int7")


def test_a_module_with_an_attribute_of_that_name_is_left():
    net = torch.nn.GRU(I, H)
    net.compute = "mine"
    (left,) = accelerate(net).unchanged
    assert left.reason == "it has an attribute compute, which is one of ours" and net.compute == "mine"


def test_read_has_the_format():
    layer = read(make("LSTM", "int8"))[""]
    assert layer.spec.compute == "int8" and layer.params.dtype == np.float32


def test_float32_is_unchanged():
    ours, plain = make_pair("LSTM", I, H)
    assert ours.compute is None and "compute" not in vars(ours) and vars(ours).keys() == vars(plain).keys()
