"""ONNX: both of torch's exporters write the standard's own nodes, and a runtime gives our numbers."""

import io
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fusedrnn import RNNSpec
from fusedrnn import torch as fused
from fusedrnn.onnx import read
from fusedrnn.testing.tolerance import difference, longest_sum, tolerance
from fusedrnn.torch import onnx_export
from torch_layers import MODES, random_state

I, H = 5, 4
LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}
NODES = set(LAYERS)
DYNAMIC = torch.export.Dim.DYNAMIC
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}

# torch's own: what its exporters copy and call, and advice that they give.
pytestmark = [
    pytest.mark.one_value("kind"),  # where every kind of node need not be written
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*TorchScript-based ONNX export.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1.*:UserWarning"),
]

layer = pytest.mark.parametrize("kind", LAYERS)
options = pytest.mark.parametrize("options", OPTIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def exported(model, args, dynamic_shapes):
    file = io.BytesIO()
    program = torch.onnx.export(model, args, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False)
    program.save(file)
    return file.getvalue()


def exported_by_tracing(model, args):
    file = io.BytesIO()
    torch.onnx.export(model, args, file, dynamo=False)
    return file.getvalue()


def nodes(content):
    """The recurrent nodes, after a check of the whole; there is no loop and no other operators' domain."""
    graph = onnx.load_from_string(content)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    kinds = [node.op_type for node in graph.graph.node]
    assert not {"Loop", "Scan", "If"} & set(kinds)
    return [kind for kind in kinds if kind in NODES]


def check_same(content, model, spec, *args):
    """The runtime's results are the model's."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    arrays = [t.numpy() for t in tree_leaves(args)]
    names = [node.name for node in session.get_inputs()]
    actual = session.run(None, dict(zip(names, arrays, strict=True)))
    with torch.no_grad():
        expected = [t.numpy() for t in tree_leaves(model(*args))]
    assert len(actual) == len(expected)
    for tensor, other in zip(actual, expected, strict=True):
        assert difference(tensor, other, *tolerance(np.float32, longest_sum(spec))) is None


def spec_of(kind, options):
    return RNNSpec(MODES[kind], I, H, options.get("num_layers", 1), options.get("bidirectional", False))


@cache
def exported_layer(kind, name):
    """A layer, and its model by torch.export, for any number of steps and sequences."""
    net = LAYERS[kind](I, H, **OPTIONS[name]).eval()
    return net, exported(net, (torch.randn(6, 3, I),), ({0: DYNAMIC, 1: DYNAMIC},))


@cache
def traced_layer(kind, name):
    """A layer, and its model by tracing."""
    net = LAYERS[kind](I, H, **OPTIONS[name]).eval()
    return net, exported_by_tracing(net, (torch.randn(6, 3, I),))


@pytest.mark.each_value
@layer
@options
def test_exporter(kind, options):
    net, content = exported_layer(kind, options)
    assert nodes(content) == [kind] * net.num_layers
    for T, N in ((6, 3), (9, 2), (31, 5)):
        check_same(content, net, spec_of(kind, OPTIONS[options]), torch.randn(T, N, I))


@pytest.mark.each_value
@layer
@options
def test_tracing_exporter(kind, options):
    net, content = traced_layer(kind, options)
    assert nodes(content) == [kind] * net.num_layers
    check_same(content, net, spec_of(kind, OPTIONS[options]), torch.randn(6, 3, I))


@pytest.mark.each_value
@layer
def test_states(kind):
    net = LAYERS[kind](I, H, 2, bidirectional=True).eval()
    states = {1: DYNAMIC}
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, (states, states) if kind == "LSTM" else states)
    content = exported(net, (torch.randn(6, 3, I), random_state(net, 3)), shapes)
    assert nodes(content) == [kind] * 2
    spec = spec_of(kind, {"num_layers": 2, "bidirectional": True})
    for T, N in ((6, 3), (11, 7)):
        check_same(content, net, spec, torch.randn(T, N, I), random_state(net, N))


@layer
def test_lengths(kind):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LAYERS[kind](I, H, bidirectional=True)

        def forward(self, x, lengths):
            return self.net(x, lengths=lengths)

    padded = Padded().eval()
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})
    content = exported(padded, (torch.randn(6, 3, I), torch.tensor([6, 2, 4])), shapes)
    assert nodes(content) == [kind]
    spec = spec_of(kind, {"bidirectional": True})
    check_same(content, padded, spec, torch.randn(9, 4, I), torch.tensor([1, 9, 5, 8]))


def test_relu():
    net = fused.RNN(I, H, nonlinearity="relu", bidirectional=True).eval()
    spec = RNNSpec("rnn_relu", I, H, bidirectional=True)
    for content in (exported(net, (torch.randn(6, 3, I),), None), exported_by_tracing(net, (torch.randn(6, 3, I),))):
        assert nodes(content) == ["RNN"]
        check_same(content, net, spec, torch.randn(6, 3, I))


def test_an_exported_program():
    net = fused.GRU(I, H).eval()
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    program = torch.export.export(net, (torch.randn(6, 3, I),), dynamic_shapes=shapes)
    content = exported(program, (), None)
    assert nodes(content) == ["GRU"]
    check_same(content, net, spec_of("GRU", {}), torch.randn(8, 2, I))


def test_accelerated():
    model = nn.Sequential(nn.Linear(3, I), nn.LSTM(I, H)).eval()
    fused.accelerate(model)
    content = exported(model, (torch.randn(6, 3, 3),), ({0: DYNAMIC, 1: DYNAMIC},))
    assert nodes(content) == ["LSTM"]
    check_same(content, model, spec_of("LSTM", {}), torch.randn(8, 2, 3))


@pytest.mark.each_value
@layer
@options
@pytest.mark.parametrize("export", [exported_layer, traced_layer], ids=["dynamo", "tracing"])
def test_weights_of_exported_models_can_be_read(kind, options, export):
    """Each layer of the module is a node, whose parameters are torch's."""
    net, content = export(kind, options)
    layers = list(read(onnx.load_from_string(content)).values())
    assert len(layers) == net.num_layers
    named = {name: value.detach().numpy() for name, value in net.named_parameters()}
    for number, layer_read in enumerate(layers):
        actual = layer_read.spec.layout.unpack(layer_read.params, names="torch")
        for name, value in actual.items():
            arrays = named.get(name.replace("_l0", f"_l{number}"))
            # Exporters write biases of zeros where there are none.
            np.testing.assert_array_equal(value, np.zeros_like(value) if arrays is None else arrays)


def test_dropout_in_training_is_refused():
    net = fused.LSTM(I, H, 2, dropout=0.5)
    with (
        pytest.warns(UserWarning, match="training mode"),
        pytest.raises(torch.onnx.OnnxExporterError, match=r"call model.eval\(\) before exporting"),
    ):
        exported(net, (torch.randn(6, 3, I),), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "identity"}, "residual='identity'"),
        ({"residual": "projection"}, "residual='projection'"),
        ({"input_dropout": 0.5}, r"dropout of the input: ONNX has none; call model.eval\(\) before exporting"),
    ],
)
def test_what_the_nodes_lack_is_refused(options, message):
    """The exporter passes the arguments of the operator in a graph to decompose."""
    net = fused.Layer("gru", H, H, **options)
    with torch.no_grad():
        graph = make_fx(net)(torch.randn(3, 2, H)).graph
    operator = torch.ops.fusedrnn.rnn.default
    (node,) = (node for node in graph.nodes if node.target == operator)
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        onnx_export.decompose(*node.args)
