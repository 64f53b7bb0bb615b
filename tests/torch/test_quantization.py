"""``quantize`` in the place of torch's quantize_dynamic: as accurate at least, and a model like any other."""

import copy
import io
import pickle
import re

import pytest
import torch

import fusedrnn.torch
from fusedrnn import cells
from fusedrnn.torch import LayerReport, accelerate, quantize, read, restore
from torch_layers import KINDS, LAYERS, first, flat, input_for

I, H, T, N = 24, 64, 20, 4


class Tagger(torch.nn.Module):
    """A model with layers and a cell of torch.nn's and ours."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(30, I)
        self.lstm = torch.nn.LSTM(I, H, 2, bidirectional=True, dropout=0.3)
        self.gru = fusedrnn.torch.GRU(2 * H, H)
        self.cell = torch.nn.RNNCell(H, H)
        self.out = torch.nn.Linear(H, 5)

    def forward(self, tokens):
        y, _ = self.gru(self.lstm(self.embedding(tokens))[0])
        return self.out(self.cell(y[-1]))


@torch.no_grad()
def run(model, tokens):
    return model(tokens)


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture
def tokens():
    return torch.randint(30, (T, N))


def test_a_copy_of_the_whole_model(tagger, tokens, runs):
    before = copy.deepcopy(tagger.state_dict())
    model, report = quantize(tagger)
    kinds = {"lstm": "LSTM", "gru": "GRU", "cell": "RNNCell"}
    assert report.replaced == tuple(LayerReport(*layer) for layer in kinds.items()) and not report.unchanged
    assert type(tagger.lstm) is torch.nn.LSTM and tagger.gru.compute is None and tagger.training
    assert all(parameter.requires_grad for parameter in tagger.parameters())
    y = run(model, tokens)
    assert [spec.compute for spec in runs] == ["int8"] * 3
    expected = run(tagger.eval(), tokens)
    assert 0 < (y - expected).abs().max() < 0.02
    assert not any(parameter.requires_grad for parameter in model.lstm.parameters())
    assert model.out.weight.requires_grad and model.embedding.weight.requires_grad
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert [*model.state_dict()] == [*before] and "compute=int8" in repr(model.lstm)


def test_in_place(tagger, tokens):
    expected = run(quantize(tagger).model, tokens)
    lstm, weight = tagger.lstm, tagger.lstm.weight_hh_l0
    model, report = quantize(tagger, inplace=True)
    assert model is tagger and len(report) == 3 and tagger.lstm is lstm and lstm.weight_hh_l0 is weight
    assert torch.equal(run(model, tokens), expected)
    again, second = quantize(model)
    assert not second.replaced and not second.unchanged and torch.equal(run(again, tokens), expected)


def test_copies_and_checkpoints(tagger, tokens):
    model, _ = quantize(tagger)
    expected = run(model, tokens)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, tokens), expected) and not other.training
        restore(other)
        assert all(parameter.requires_grad for parameter in other.parameters())
    torch.manual_seed(1)
    other, _ = quantize(Tagger())
    assert not torch.equal(run(other, tokens), expected)
    other.load_state_dict(tagger.state_dict())  # of the float32 model
    assert torch.equal(run(other, tokens), expected)
    tagger.load_state_dict(model.state_dict())
    assert all(spec.spec.compute == "int8" for spec in read(model).values())


def test_training_mode_is_allowed(tagger, tokens):
    """As for torch's quantized modules; what has no gradient, or no dropout, says so when it is called."""
    tagger.lstm.dropout = 0.0
    model, _ = quantize(tagger)
    expected = run(model, tokens)
    assert model.train() is model and all(module.training for module in model.modules())
    assert torch.equal(run(model, tokens), expected)
    embedded = model.embedding(tokens)
    with pytest.raises(RuntimeError, match=r"compute='int8' is for inference only: call it under torch.no_grad"):
        model.lstm(embedded)
    model.out(model.lstm(embedded.detach())[0][..., :H]).sum().backward()  # what is behind the layer trains
    assert model.out.weight.grad.abs().sum() > 0
    model.lstm.dropout = 0.3
    for call in (model, torch.compile(model, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=r"^compute='int8' is for .* only, without dropout; .* call eval\(\)$"):
            run(call, tokens)
    model.eval()
    assert torch.equal(run(model, tokens), expected)


@pytest.mark.parametrize("undo", [restore, lambda model: accelerate(model, compute="bfloat16")])
def test_gradients_after_restore(tagger, undo):
    """A parameter requires a gradient again if it did; weights that two layers share are no exception."""
    tagger.lstm.bias_hh_l1.requires_grad_(False)
    tagger.other = fusedrnn.torch.GRU(2 * H, H)
    tagger.other.weight_hh_l0 = tagger.gru.weight_hh_l0
    before = {name: parameter.requires_grad for name, parameter in tagger.named_parameters()}
    model, _ = quantize(quantize(tagger).model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"lstm", "gru", "other", "cell"}
    undo(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any("_frozen_by_quantize" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_change(kind):
    """A quantized layer reads the parameters that it has at the time of a call."""
    net, _ = quantize(getattr(torch.nn, kind)(3, 4))
    x = input_for(kind)
    before = first(net(x))
    for parameter in net.parameters():
        parameter.data.mul_(-2)
    expected, _ = quantize(copy.deepcopy(net))
    assert torch.equal(first(net(x)), first(expected(x))) and not torch.equal(first(net(x)), before)


class Named(torch.nn.GRU):
    """A user's."""


def test_what_is_left_is_reported():
    model = torch.nn.ModuleDict({
        "wide": torch.nn.LSTM(3, 4).double(), "named": Named(3, 4), "low": torch.nn.GRU(3, 4).bfloat16(),
    })  # fmt: skip
    quantized, report = quantize(model)
    assert report.replaced == (LayerReport("low", "GRU"),)
    assert [layer.name for layer in report.unchanged] == ["wide", "named"]
    wide, named = report.unchanged
    assert re.match("its parameters are torch.float64, which compute='int8'", wide.reason)
    assert named.reason.startswith("it is a subclass of GRU")
    assert all(parameter.requires_grad for parameter in quantized["wide"].parameters())
    both = quantize(model, subclasses=True).report.replaced
    assert both == (LayerReport("named", "Named"), LayerReport("low", "GRU"))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (fusedrnn.torch.Layer(cells.slstm.with_heads(2), 8, 32), "needs a cell of one head"),
        (fusedrnn.torch.Layer("gru", 140_000, 2), "needs at most 133144 features of a layer; got 140000"),
        (torch.nn.GRU(140_000, 2), "needs at most 133144 features of a layer; got 140000"),
        (torch.nn.LSTMCell(140_000, 2), "needs at most 133144 features of a layer; got 140000"),
        (torch.nn.LSTM(2, 70_000, bidirectional=True, proj_size=1, device="meta"), ""),
    ],
    ids=["heads", "Layer", "GRU", "LSTMCell", "projection"],
)
def test_formats_that_a_layer_cannot_have(layer, reason):
    """They are reported. The output of a projected layer has fewer features than units."""
    report = accelerate(layer, compute="int8")
    if not reason:
        assert len(report.replaced) == 1 and not report.unchanged
        return
    [entry] = report.unchanged
    assert entry.reason.startswith("compute='int8'") and reason in entry.reason and not report.replaced
    assert getattr(layer, "compute", None) is None and all(parameter.requires_grad for parameter in layer.parameters())


def test_errors():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got type, a class"):
        quantize(torch.nn.LSTM)
    for compute in ("bfloat16", None, "float32"):
        with pytest.raises(ValueError, match="compute must be a format for inference only"):
            quantize(torch.nn.LSTM(3, 4), compute)
    with pytest.raises(ValueError, match=r"compute must be one of .*; got 'int4'"):
        quantize(torch.nn.LSTM(3, 4), "int4")


# -- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one layer", "deep"])
def test_no_less_accurate_than_quantize_dynamic(kind, options):
    """The error against float32, on weights and input of the usual size."""
    cls = getattr(torch.nn, kind)
    errors, torch_errors = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        net, x = cls(I, H, **options).eval(), torch.randn(T, N, I)
        # As quantize_dynamic returns it for a layer inside a model.
        theirs = torch.ao.quantization.quantize_dynamic(torch.nn.ModuleList([net]), {cls}, torch.qint8)[0]
        assert type(theirs).__module__.startswith("torch.ao.nn.quantized.dynamic")
        with torch.no_grad():
            exact, actual, torchs = net(x)[0], quantize(net).model(x)[0], theirs(x)[0]
        errors.append((actual - exact).square().mean().sqrt())
        torch_errors.append((torchs - exact).square().mean().sqrt())
    assert 0 < sum(errors) <= sum(torch_errors)


@pytest.mark.parametrize("kind", LAYERS)
def test_error_of_a_layer(kind):
    """Below a step of a 7-bit number, with sums of 64 rounded products."""
    torch.manual_seed(0)
    net, x = getattr(torch.nn, kind)(I, H, 2), torch.randn(T, N, I)
    with torch.no_grad():
        for actual, expected in zip(flat(quantize(net).model(x)), flat(net(x)), strict=True):
            assert (actual - expected).abs().max() < 2 / 127
