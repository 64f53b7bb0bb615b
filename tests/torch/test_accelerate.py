"""A model's layers turned into ours and back: what stays, what is left alone, what is said of it."""

import copy
import re

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn.torch
from fusedrnn.torch import LayerReport, accelerate, restore
from torch_layers import KINDS


class Model(torch.nn.Module):
    """Nested, with a layer in two places, dropout, and a cell."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 6)
        self.encoder = torch.nn.ModuleDict({"deep": torch.nn.LSTM(6, 5, 2, bidirectional=True, dropout=0.25)})
        self.shared = torch.nn.GRU(10, 10)
        self.again = torch.nn.ModuleList([self.shared, torch.nn.RNN(10, 7, nonlinearity="relu")])
        self.cell = torch.nn.LSTMCell(7, 4)

    def forward(self, tokens):
        x = self.encoder["deep"](self.embedding(tokens))[0]
        x = self.shared(x)[0]
        for layer in self.again:
            x = layer(x)[0]
        return self.cell(x[-1])[0]


def gradients(model, *args):
    """The output, and the gradient of every parameter of a scalar of it."""
    model.zero_grad()
    y = model(*args)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_alike(actual, expected):
    """Float64 results that may differ by how sums were rounded."""
    assert len(actual) == len(expected)
    for tensor, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, other)


def test_a_whole_model(runs):
    model = Model().double().eval()
    tokens = torch.randint(20, (7, 3))
    expected, state = gradients(model, tokens), model.state_dict()
    modules, parameters = list(model.modules()), list(model.parameters())
    report = accelerate(model)
    assert [layer.name for layer in report.replaced] == ["encoder.deep", "shared", "again.1", "cell"]
    assert report and len(report) == 4 and not report.unchanged
    assert all(map(lambda a, b: a is b, model.modules(), modules))
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert type(model.shared) is fusedrnn.torch.GRU and model.again[0] is model.shared
    assert_alike(gradients(model, tokens), expected)
    assert [spec.mode for spec in runs] == ["lstm", "gru", "gru", "rnn_relu", "lstm"]
    model.load_state_dict(state, strict=True)
    assert not accelerate(model) and type(model.shared) is fusedrnn.torch.GRU
    assert len(restore(model)) == 4
    assert [type(module).__module__.split(".")[0] for module in modules[1:]] == ["torch"] * (len(modules) - 1)
    runs.clear()
    assert_alike(gradients(model, tokens), expected)
    assert not runs and not restore(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_itself_may_be_a_layer(kind):
    torch_class = getattr(torch.nn, kind)
    net = torch_class(3, 4, bias=False)
    before = set(vars(net))
    assert accelerate(net).replaced == (LayerReport("", kind),)
    assert type(net) is getattr(fusedrnn.torch, kind) and repr(net) == repr(torch_class(3, 4, bias=False))
    assert restore(net).replaced == (LayerReport("", kind),)
    assert type(net) is torch_class and set(vars(net)) == before


def test_training_mode_dropout_and_devices_stay():
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4, 2, dropout=0.5), torch.nn.GRU(3, 4).eval(), torch.nn.RNN(3, 4))
    model[2].to("meta")
    accelerate(model)
    assert model[0].training and not model[1].training and model[0].dropout == 0.5
    assert type(model[2]) is fusedrnn.torch.RNN and model[2].weight_ih_l0.is_meta


def test_hooks_stay(runs):
    net, seen = torch.nn.GRU(3, 4, dtype=torch.float64), []
    net.register_forward_pre_hook(lambda module, args: seen.append("before") or (2 * args[0],))
    net.register_forward_hook(lambda module, args, result: seen.append("after") or (result[0] + 1, result[1]))
    net.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    net.weight_ih_l0.register_hook(lambda gradient: seen.append("weight") or 3 * gradient)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = gradients(net, x)
    order = list(seen)
    assert set(order) == {"before", "after", "backward", "weight"}
    seen.clear()
    accelerate(net)
    assert_alike(gradients(net, x), expected)
    assert sorted(seen) == sorted(order) and len(runs) == 1


def shared_weights():
    first, second = torch.nn.GRU(4, 4), torch.nn.GRU(4, 4)
    second.weight_hh_l0 = first.weight_hh_l0
    return torch.nn.ModuleList([first, second])


def test_shared_weights_stay_shared(runs):
    model = shared_weights().double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)

    def run(x):
        return model[1](model[0](x)[0])[0]

    model.forward = run
    expected = gradients(model, x)
    accelerate(model)
    assert model[0].weight_hh_l0 is model[1].weight_hh_l0
    assert_alike(gradients(model, x), expected)
    assert len(runs) == 2


def old_weight_norm(net):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(net, "weight_hh_l0")


def parametrized_twice(net):
    parametrizations.weight_norm(net, "weight_hh_l0")
    parametrize.register_parametrization(net, "weight_hh_l0", torch.nn.Tanh())
    parametrize.register_parametrization(net, "bias_ih_l0", torch.nn.Softplus())
    return net


def pruned(net):
    prune.l1_unstructured(net, "weight_ih_l0", amount=0.5)
    return prune.random_unstructured(net, "weight_hh_l0", amount=0.3)


REWRITES = {
    "weight_norm of old": old_weight_norm,
    "weight_norm": lambda net: parametrizations.weight_norm(net, "weight_hh_l0"),
    "orthogonal": lambda net: parametrizations.orthogonal(net, "weight_hh_l0"),
    "spectral_norm of old": lambda net: torch.nn.utils.spectral_norm(net, "weight_hh_l0"),
    "spectral_norm": lambda net: parametrizations.spectral_norm(net, "weight_ih_l0"),
    "several": parametrized_twice,
    "pruned": pruned,
}


@pytest.mark.parametrize("way", REWRITES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recomputed_weights_are_current_at_every_call(kind, way, runs):
    """Two calls with an optimizer step between them: the second uses the new weights."""
    net = REWRITES[way](getattr(torch.nn, kind)(6, 5).double()).eval()
    torch_class = type(net)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]
    for _ in range(2):
        expected = gradients(net, x)
        assert len(expected) == 1 + len(names)
        assert accelerate(net).replaced[0].kind == torch_class.__name__
        assert isinstance(net, getattr(fusedrnn.torch, kind)) and type(net).__name__ == torch_class.__name__
        assert [name for name, _ in net.named_parameters()] == names
        runs.clear()
        assert_alike(gradients(net, x), expected)
        assert len(runs) == 1 and not accelerate(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)
        changed = gradients(net, x)
        assert not torch.equal(changed[0], expected[0])
        restore(net)
        assert type(net).__bases__ == torch_class.__bases__ and type(net).__name__ == torch_class.__name__
        assert_alike(gradients(net, x), changed)


def test_parametrizations_can_be_removed_after_acceleration(runs):
    net = parametrizations.weight_norm(torch.nn.LSTM(6, 5).double(), "weight_hh_l0")
    accelerate(net)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    before = net(x)[0]
    parametrize.remove_parametrizations(net, "weight_hh_l0")
    assert type(net) is fusedrnn.torch.LSTM and "weight_hh_l0" in dict(net.named_parameters())
    torch.testing.assert_close(net(x)[0], before)
    parametrizations.weight_norm(net, "weight_hh_l0")
    assert type(net).__name__ == "ParametrizedLSTM" and isinstance(net, fusedrnn.torch.LSTM)
    torch.testing.assert_close(net(x)[0], before)
    assert len(runs) == 3


def test_parametrized_layers_copy_as_torchs_do():
    net = parametrizations.weight_norm(torch.nn.GRU(6, 5), "weight_hh_l0")
    accelerate(net)
    x = torch.randn(4, 3, 6)
    net(x)
    other = copy.deepcopy(net)
    assert torch.equal(other(x)[0], net(x)[0])
    with torch.no_grad():
        other.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.equal(other(x)[0], net(x)[0])
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only"):
        net.__getstate__()


def test_parametrizations_are_computed_once_a_call():
    calls = []

    class Counted(torch.nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    net = torch.nn.GRU(3, 4)
    parametrize.register_parametrization(net, "weight_hh_l0", Counted())
    accelerate(net)
    calls.clear()
    net(torch.randn(5, 2, 3))
    assert len(calls) == 1


# -- what is left -----------------------------------------------------------------------------------------------------


class Own(torch.nn.LSTM):
    """A user's."""


class OwnCell(torch.nn.GRUCell):
    """A user's."""


def patched():
    net = torch.nn.GRU(3, 4)
    net.forward = lambda x: x
    return net


def mixed():
    net = torch.nn.GRU(3, 4)
    net.weight_hh_l0 = torch.nn.Parameter(net.weight_hh_l0.double())
    return net


LEFT = {
    "a subclass": (Own, (3, 4), "Own", "it is a subclass of LSTM"),
    "a subclass of a cell": (OwnCell, (3, 4), "OwnCell", "it is a subclass of GRUCell"),
    "complex": (
        lambda: torch.nn.GRU(3, 4, dtype=torch.complex64), (), "GRU",
        "its parameters are torch.complex64; ours are torch.float32",
    ),
    "mixed": (mixed, (), "GRU", "its parameters are of several dtypes: torch.float32, torch.float64"),
    "patched": (patched, (), "GRU", "its forward was replaced on the instance"),
    "quantized": (lambda: torch.ao.nn.quantized.dynamic.LSTM(3, 4), (), "LSTM", "it is quantized"),
}


# PyTorch's own kinds of quantization are on their way out.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("what", LEFT)
def test_layers_left_unchanged_are_reported(what):
    make, args, kind, reason = LEFT[what]
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), make(*args))
    before = type(model[1])
    report = accelerate(model)
    assert not report and type(model[1]) is before
    (left,) = report.unchanged
    assert (left.name, left.kind) == ("1", kind)
    assert re.match(reason, left.reason)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_scripted_layers_are_left():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Sequential(torch.nn.LSTM(3, 4))), torch.nn.GRUCell(4, 4))
    report = accelerate(model)
    assert report.replaced == (LayerReport("1", "GRUCell"),)
    reason = "it is a ScriptModule, whose weights fusedrnn.torch.read reads"
    assert report.unchanged == (LayerReport("0.0", "RecursiveScriptModule", reason),)


def test_text_of_a_report():
    model = torch.nn.ModuleDict({"a": torch.nn.LSTM(3, 4), "b": Own(3, 4), "c": torch.nn.Linear(3, 4)})
    report = accelerate(model)
    assert str(report).splitlines() == [
        "1 replaced, 1 unchanged",
        "  replaced   a: LSTM",
        "  unchanged  b: Own, it is a subclass of LSTM; subclasses=True puts ours beneath its code",
    ]
    assert str(accelerate(torch.nn.GRU(3, 4))).endswith("(the model itself): GRU")
    assert str(accelerate(torch.nn.Linear(3, 4))) == "the model has no recurrent layer"
    with pytest.raises(AttributeError):
        report.replaced = ()


@pytest.mark.parametrize("function", [accelerate, restore])
@pytest.mark.parametrize("model", [None, torch.nn.LSTM, [torch.nn.GRU(3, 4)], "model"])
def test_objects_that_are_no_modules_are_refused(function, model):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module; got {type(model).__name__}"):
        function(model)


def test_a_users_subclass_of_ours_is_left_by_restore():
    class Mine(fusedrnn.torch.GRU):
        pass

    model = torch.nn.Sequential(Mine(3, 4), fusedrnn.torch.RNN(4, 4))
    report = restore(model)
    assert report.replaced == (LayerReport("1", "RNN"),)
    assert report.unchanged == (LayerReport("0", "Mine", "it is a subclass of GRU"),)
    assert type(model[0]) is Mine and type(model[1]) is torch.nn.RNN


def test_an_accelerated_model_changes_dtype_and_back(runs):
    model = torch.nn.GRU(3, 4)
    accelerate(model)
    x = torch.randn(5, 2, 3)
    assert model.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16 and runs
    runs.clear()
    plain = torch.nn.GRU(3, 4).double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.double()(x.double())[0], plain(x.double())[0])
    assert model.float()(x)[0].dtype == torch.float32 and [spec.dtype for spec in runs] == ["float64", "float32"]
