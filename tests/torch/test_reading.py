"""Layers read from modules and ScriptModules: what is read runs on the operator with the layer's results."""

import io

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations

import fusedrnn.torch
from fusedrnn import RNNOp
from fusedrnn.torch import Layer, read

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*` is (deprecated|not supported):DeprecationWarning", "ignore::torch.jit.TracerWarning",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)
LAYERS = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "dropout": 0.25}),
    ("LSTM", {"proj_size": 2, "batch_first": True, "bias": False}),
    ("GRU", {"num_layers": 3, "batch_first": True}),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True, "batch_first": True}),
    ("RNN", {"bias": False}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("RNNCell", {}),
    ("LSTMCell", {"bias": False}),
    ("GRUCell", {}),
]


class Model(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.before, self.net = torch.nn.Linear(3, 3), net

    def forward(self, x):
        return self.net(x)


def saved(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


FORMS = {
    "torch.nn": lambda net, x: Model(net),
    "ours": lambda net, x: (model := Model(net), fusedrnn.torch.accelerate(model))[0],
    "scripted": lambda net, x: torch.jit.script(Model(net)),
    "scripted, loaded": lambda net, x: saved(torch.jit.script(Model(net))),
    "traced": lambda net, x: torch.jit.trace(Model(net), (x,), check_trace=False),
    "traced, loaded": lambda net, x: saved(torch.jit.trace(Model(net), (x,), check_trace=False)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
def test_layers_that_were_read_give_the_same_results(kind, options, form):
    net, cell = getattr(torch.nn, kind)(3, 4, **options).eval(), kind.endswith("Cell")
    x = torch.randn((2, 3) if cell else (5, 2, 3))
    expected = net(x)
    actual = read(FORMS[form](net, x))
    (layer,) = actual.values()
    assert list(actual) == [layer.name] == ["net"] and layer.kind == kind
    assert layer.batch_first == options.get("batch_first", False) and layer.spec.dropout == options.get("dropout", 0.0)
    steps = x[None] if cell else x.transpose(0, 1) if layer.batch_first else x
    y, states, _ = RNNOp(layer.spec).forward(np.ascontiguousarray(steps.numpy()), layer.params)
    if cell:
        results, final = [], expected if isinstance(expected, tuple) else (expected,)
        states = [state[0] for state in states]
    else:
        results, final = [y.swapaxes(0, 1) if layer.batch_first else y], expected[1]
        final = final if isinstance(final, tuple) else (final,)
    for actual, reference in zip([*results, *states], [*([] if cell else [expected[0]]), *final], strict=True):
        torch.testing.assert_close(torch.from_numpy(np.ascontiguousarray(actual)), reference.detach())


@pytest.mark.parametrize("reverse", [False, True])
def test_tied_weights_of_scripted_layers(reverse):
    net = torch.nn.GRU(4, 4, 1 if reverse else 3, bidirectional=reverse)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        for suffix in ("l0_reverse",) if reverse else ("l1", "l2"):
            setattr(net, f"{name}_{suffix}", getattr(net, f"{name}_l0"))
    expected = read(net)[""]
    for module in (torch.jit.script(net), saved(torch.jit.script(net))):
        actual = read(module)[""]
        assert actual.spec == expected.spec
        assert np.array_equal(actual.params, expected.params)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", ["tied", "parametrized", "weight_norm", "plain"])
def test_changed_weights_of_a_layer(change):
    net, x = fusedrnn.torch.Layer("gru", 4, 4, 2), torch.randn(5, 2, 4)
    if change == "tied":
        net.weight_ih_l1 = net.weight_ih_l0
    elif change == "parametrized":
        parametrizations.weight_norm(net, "weight_ih_l1")
    elif change == "weight_norm":
        torch.nn.utils.weight_norm(net, "weight_ih_l1")
    else:
        for name, parameter in list(net.named_parameters()):
            delattr(net, name)
            setattr(net, name, parameter.detach())
    layer = read(net)[""]
    expected = net(x)[0].detach()
    y, _, _ = RNNOp(layer.spec).forward(x.numpy(), layer.params)
    torch.testing.assert_close(torch.from_numpy(y), expected)


def test_layers_by_name():
    model = torch.nn.ModuleDict({
        "a": torch.nn.Sequential(torch.nn.GRU(3, 4), torch.nn.Linear(4, 4)),
        "b": parametrizations.weight_norm(torch.nn.LSTM(3, 4), "weight_hh_l0").half(),
        "c": torch.nn.LSTMCell(2, 3, dtype=torch.float64),
    })  # fmt: skip
    layers = read(model)
    assert {name: (layer.kind, layer.spec.dtype) for name, layer in layers.items()} == {
        "a.0": ("GRU", "float32"), "b": ("LSTM", "float32"), "c": ("LSTMCell", "float64")
    }  # fmt: skip
    weight = layers["b"].spec.layout.unpack(layers["b"].params, names="torch")["weight_hh_l0"]
    torch.testing.assert_close(torch.from_numpy(weight.copy()), model["b"].weight_hh_l0.detach().float())
    assert list(read(model, ["c", "a.0"])) == ["c", "a.0"] and list(read(model, "c")) == ["c"]
    assert list(read(torch.nn.GRU(3, 4))) == [""] and not read(torch.nn.Linear(3, 4))
    before = layers["a.0"].params.copy()
    with torch.no_grad():
        model["a"][0].weight_ih_l0.zero_()
    assert np.array_equal(layers["a.0"].params, before)


def test_unreadable_layers_are_named():
    model = torch.nn.ModuleDict({"a": torch.nn.GRU(3, 4)})
    with pytest.raises(ValueError, match=r"names must be those of recurrent layers, of 'a'; got 'b'"):
        read(model, ["b"])
    with pytest.raises(ValueError, match="of which there are none; got 'x'"):
        read(torch.nn.Linear(3, 4), "x")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got list"):
        read([model])
    with pytest.raises(ValueError, match=r"^cannot read a: weight_ih_l0 must have values; got a meta tensor"):
        read(model.to("meta"))
    with pytest.raises(TypeError, match=r"^cannot read .*: weight_ih must be of torch.float32, .*got torch.complex64"):
        read(torch.nn.GRUCell(3, 4, dtype=torch.complex64))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_sizes_that_are_not_supported():
    with pytest.raises(ValueError, match=r"^cannot read 1: input_size must be at least 1; got 0$"):
        read(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GRUCell(0, 4)))
    with pytest.raises(ValueError, match=r"^cannot read the model itself: input_size must be at least 1; got 0$"):
        read(torch.nn.GRUCell(0, 4))
    layer = Layer("gru", 3, 4)
    layer.dropout = 3.0
    with pytest.raises(ValueError, match=r"^cannot read 0: dropout must be a probability in \[0, 1\); got 3.0$"):
        read(torch.nn.Sequential(layer))


def test_a_class_with_a_layers_name_is_no_layer():
    class LSTM(torch.nn.Module):
        def forward(self, x):
            return x

    assert not read(torch.jit.script(LSTM()))


def without_layers(kind):
    """A model whose recurrence is no layer any more, and what errors call it."""
    model = torch.nn.Sequential(torch.nn.LSTM(4, 6)).eval()
    if kind == "frozen":
        return torch.jit.freeze(torch.jit.script(model)), r"aten::lstm in its graph"
    if kind == "frozen cell":
        cell = torch.nn.Sequential(torch.nn.GRUCell(4, 6)).eval()
        return torch.jit.freeze(torch.jit.script(cell)), r"aten::gru_cell in its graph"
    if kind == "exported":
        return torch.export.export(model, (torch.randn(2, 1, 4),)).module(), r"aten\.lstm\.input in its graph"
    if kind == "exported ours":
        fusedrnn.torch.accelerate(model)
        return torch.export.export(model, (torch.randn(2, 1, 4),)).module(), r"fusedrnn\.rnn\.default in its graph"
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}), "0: a quantized LSTM"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights.*:UserWarning")
@pytest.mark.parametrize("kind", ["frozen", "frozen cell", "exported", "exported ours", "quantized"])
def test_recurrent_operators_outside_layers_are_named(kind):
    model, words = without_layers(kind)
    with pytest.raises(NotImplementedError, match=words):
        read(model)
    report = fusedrnn.torch.accelerate(model)
    assert not report and len(report.unchanged) == (kind != "exported ours")
    both = torch.nn.ModuleDict({"other": model, "layer": torch.nn.GRU(3, 4)})
    with pytest.raises(NotImplementedError, match=rf"{words}.*; name the others to read them alone: 'layer'"):
        read(both)
    assert list(read(both, ["layer"])) == ["layer"]


def test_a_model_without_recurrence_has_no_layers():
    assert read(torch.nn.Linear(2, 2)) == {}


def test_a_sparse_weight_is_named():
    layer = torch.nn.GRU(3, 4)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().to_sparse(), requires_grad=False)
    with pytest.raises(ValueError, match=r"^cannot read layer: weight_hh_l0 must be dense; got layout torch.sparse"):
        read(torch.nn.ModuleDict({"layer": layer}))


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="names must be a name or several, or None; got int"):
        read(torch.nn.GRU(3, 4), 5)
