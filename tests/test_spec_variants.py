"""The variants of a spec: validation, equality, and the layout of their parameters."""

import pickle

import numpy as np
import pytest

from fusedrnn import Activation, RNNOp, RNNSpec
from fusedrnn.cell.activations import ACTIVATIONS
from fusedrnn.spec import BIASES, OPTIONS
from variants import VARIANTS, variant_spec

I, H = 5, 4


@pytest.mark.parametrize(
    ("mode", "options", "error", "words"),
    [
        ("lstm", {"reset_after": False}, ValueError, "reset_after needs mode 'gru'; got False in mode 'lstm'"),
        ("gru", {"peepholes": True}, ValueError, "peepholes needs mode 'lstm'; got True in mode 'gru'"),
        ("rnn_relu", {"coupled_gates": True}, ValueError, "coupled_gates needs mode 'lstm'; got True in"),
        ("gru", {"reset_after": 0}, TypeError, "reset_after must be True or False; got 0"),
        ("lstm", {"peepholes": None}, TypeError, "peepholes must be True or False; got None"),
        ("lstm", {"gate_clip": 0.0}, ValueError, "gate_clip must be above 0; got 0.0"),
        ("lstm", {"gate_clip": -1}, ValueError, "gate_clip must be above 0; got -1.0"),
        ("lstm", {"gate_clip": float("nan")}, ValueError, "gate_clip must be a number; got nan"),
        ("lstm", {"gate_clip": "3"}, TypeError, "gate_clip must be a number; got '3'"),
        ("gru", {"bias": "both"}, ValueError, "bias must be one of double, single, none; got 'both'"),
        ("gru", {"bias": True}, TypeError, "bias must be one of double, single, none; got True"),
        ("gru", {"reverse": 1}, TypeError, "reverse must be True or False; got 1"),
        ("gru", {"reverse": True, "bidirectional": True}, ValueError, "reverse must be False in a bidirectional"),
        ("gru", {"activations": "tanh"}, TypeError, "activations must be a tuple of 2 of sigmoid"),
        ("gru", {"activations": ("tanh",)}, ValueError, "activations must be 2 of .* in mode 'gru'; got a tuple of 1"),
        ("lstm", {"activations": ("tanh",) * 4}, ValueError, "activations must be 3 of .* in mode 'lstm'; .* of 4"),
        ("rnn_relu", {"activations": ("cos",)}, ValueError, "activations must be one of sigmoid, .*; got 'cos'"),
        ("rnn_relu", {"activations": (None,)}, TypeError, "activations must be one of sigmoid, .*; got None"),
        ("lstm", {"state_clip_nan": True}, ValueError, "state_clip_nan needs state_clip_min and state_clip_max"),
    ],
)
def test_invalid_variants(mode, options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        RNNSpec(mode, I, H, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("elu", "1"), TypeError, "activations: alpha of elu must be a number; got '1'"),
        (("elu", True), TypeError, "activations: alpha of elu must be a number; got True"),
        (("elu", float("inf")), ValueError, "activations: alpha of elu must be finite; got inf"),
        (("elu", float("nan")), ValueError, "activations: alpha of elu must be finite; got nan"),
        (("tanh", 1.0), ValueError, "activations: tanh must have no alpha; got 1.0"),
        (("elu", 1.0, 2.0), ValueError, "activations: elu must have no beta; got 2.0"),
        (("Tanh",), ValueError, "activations must be one of sigmoid"),
    ],
)
def test_invalid_activations(arguments, error, words):
    with pytest.raises(error, match=f"^{words}"):
        Activation(*arguments)


def test_parameters_of_activations():
    assert Activation("hard_sigmoid") == Activation("hard_sigmoid", 0.2, 0.5)
    assert Activation("elu", np.float32(0.5)) == Activation("elu", 0.5)
    assert Activation("elu", 2).alpha == 2.0
    assert str(Activation("scaled_tanh", 1.5, 0.5)) == "scaled_tanh(alpha=1.5, beta=0.5)"
    assert str(Activation("tanh")) == "tanh"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_name_is_an_activation(name):
    spec = RNNSpec("rnn_tanh", I, H, activations=[name])
    assert spec.variant.activations == (Activation(name),)


def test_default_activations_are_the_default_variant():
    plain = RNNSpec("lstm", I, H)
    explicit = RNNSpec("lstm", I, H, activations=["sigmoid", Activation("tanh"), "tanh"])
    assert explicit == plain
    assert hash(explicit) == hash(plain)
    assert RNNOp.get(explicit) is RNNOp.get(plain)
    assert explicit.variant.slug == "lstm"


@pytest.mark.parametrize("name", VARIANTS)
def test_specs_compare_and_pickle_by_value(name):
    spec = variant_spec(name, I, H)
    assert pickle.loads(pickle.dumps(spec)) == spec == variant_spec(name, I, H)
    assert spec != RNNSpec(spec.mode, I, H)
    assert {option for option in OPTIONS if spec.asks_for(option)}


def test_specs_that_share_a_variant():
    plain = RNNSpec("gru", I, H)
    for same in (RNNSpec("gru", I, H, bias="none"), RNNSpec("gru", 9, 8, 3, reverse=True)):
        assert same.variant == plain.variant
    slugs = {variant_spec(name, I, H).variant.slug for name in VARIANTS}
    assert len(slugs) == len({variant_spec(name, I, H).variant for name in VARIANTS})


@pytest.mark.parametrize("bias", BIASES)
def test_biases(bias):
    layout = RNNSpec("gru", I, H, 2, True, bias=bias).layout
    double = RNNSpec("gru", I, H, 2, True).layout
    absent = {"double": 0, "single": 1, "none": 2}[bias]
    assert layout.size == double.size - absent * 3 * H * 4
    assert layout.has("i2h_bias") == (bias != "none")
    assert layout.has("h2h_bias") == (bias == "double")
    params = np.arange(layout.size, dtype=np.float32)
    assert np.array_equal(layout.pack(layout.unpack(params)), params)
    if bias != "double":
        with pytest.raises(ValueError, match="no parameter 'h2h_bias'"):
            layout.entry(0, 0, "h2h_bias")


def test_peepholes_and_coupled_gates():
    spec = RNNSpec("lstm", I, H, peepholes=True)
    assert spec.layout.size == RNNSpec("lstm", I, H).layout.size + 3 * H
    assert list(spec.layout.unpack(np.zeros(spec.layout.size, np.float32)))[2] == "l0_peephole_weight"
    coupled = RNNSpec("lstm", I, H, peepholes=True, coupled_gates=True)
    assert coupled.gates == ("i", "g", "o")
    assert coupled.num_gates == 3
    assert coupled.layout.size == 3 * H * (I + H + 2) + 2 * H
