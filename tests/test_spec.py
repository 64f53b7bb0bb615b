"""RNNSpec's fields, and the layout of the flat parameter vector."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedrnn.spec import MODES, ParameterLayout, RNNSpec

SIZES = st.integers(1, 7)


@st.composite
def specs(draw):
    mode = draw(st.sampled_from(MODES))
    hidden = draw(SIZES)
    projected = mode == "lstm" and hidden > 1 and draw(st.booleans())
    return RNNSpec(
        mode,
        draw(SIZES),
        hidden,
        num_layers=draw(st.integers(1, 4)),
        bidirectional=draw(st.booleans()),
        projection_size=draw(st.integers(1, hidden - 1)) if projected else None,
        dtype=draw(st.sampled_from(["float32", "float64"])),
    )


def lstm(**changes):
    return RNNSpec(**{"mode": "lstm", "input_size": 3, "hidden_size": 4, **changes})


def numbered(spec):
    """A flat vector in which every element is its own index."""
    return np.arange(spec.layout.size, dtype=spec.dtype)


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers", "projection_size"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "must be at least 1; got 0"),
        (-3, ValueError, "must be at least 1; got -3"),
        (2.0, TypeError, r"must be an integer; got 2\.0"),
        ("2", TypeError, "must be an integer; got '2'"),
        (True, TypeError, "must be an integer; got True"),
        ([2], TypeError, r"must be an integer; got \[2\]"),
    ],
)
def test_invalid_sizes(name, value, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        lstm(**{name: value})


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
def test_sizes_are_required(name):
    with pytest.raises(TypeError, match=f"^{name} must be an integer; got None"):
        lstm(**{name: None})


@pytest.mark.parametrize("name", ["bidirectional", "state_clip_nan"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_invalid_flags(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False; got {value!r}"):
        lstm(**{name: value})


@pytest.mark.parametrize("name", ["dropout", "state_clip_min", "state_clip_max"])
@pytest.mark.parametrize(
    ("value", "error"), [("0.5", TypeError), (True, TypeError), (math.nan, ValueError), (10**400, ValueError)]
)
def test_invalid_numbers(name, value, error):
    with pytest.raises(error, match=f"^{name} must"):
        lstm(**{"state_clip_min": -1, "state_clip_max": 1, name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, math.inf])
def test_dropout_out_of_range(value):
    with pytest.raises(ValueError, match=rf"^dropout must be a probability in \[0, 1\); got {value}"):
        lstm(dropout=value)


@pytest.mark.parametrize("value", [None, 3, ["lstm"]])
def test_mode_of_wrong_type(value):
    with pytest.raises(TypeError, match=r"^mode must be one of rnn_relu, rnn_tanh, lstm, gru; got"):
        lstm(mode=value)


@pytest.mark.parametrize("value", ["", "LSTM", "lstm ", "rnn", "gru\n"])
def test_unknown_mode(value):
    with pytest.raises(ValueError, match=r"^mode must be one of rnn_relu, rnn_tanh, lstm, gru; got"):
        lstm(mode=value)


SWAPPED = np.dtype("float32").newbyteorder()


@pytest.mark.parametrize("value", [None, "float16", "int32", "no such", np.longdouble, 7, {"a": 1}, "f8, f8", SWAPPED])
def test_invalid_dtype(value):
    with pytest.raises(ValueError, match=r"^dtype must be one of float32, float64; got"):
        lstm(dtype=value)


@pytest.mark.parametrize("value", ["float32", np.float32, np.dtype("float32"), "f4"])
def test_dtype_in_any_spelling(value):
    assert lstm(dtype=value) == lstm()
    assert lstm(dtype=value).dtype == "float32"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "lstm"])
@pytest.mark.parametrize("option", [{"projection_size": 2}, {"state_clip_min": -1, "state_clip_max": 1}])
def test_options_of_the_lstm_only(mode, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} needs mode 'lstm'; got .* in mode '{mode}'"):
        lstm(mode=mode, **option)


@pytest.mark.parametrize("size", [4, 5])
def test_projection_must_be_smaller(size):
    with pytest.raises(ValueError, match=rf"^projection_size must be smaller than hidden_size \(4\); got {size}"):
        lstm(projection_size=size)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"state_clip_min": -1}, "^state_clip_max must be given"),
        ({"state_clip_max": 1}, "^state_clip_min must be given"),
        ({"state_clip_nan": True}, "^state_clip_nan needs state_clip_min and state_clip_max"),
        ({"state_clip_min": 2, "state_clip_max": 1}, "^state_clip_min must not exceed state_clip_max; got 2.0 and 1.0"),
    ],
)
def test_incomplete_clip(clip, message):
    with pytest.raises(ValueError, match=message):
        lstm(**clip)


def test_clip():
    spec = lstm(state_clip_min=-np.float32(1), state_clip_max=math.inf, state_clip_nan=np.True_)
    assert (spec.state_clip_min, spec.state_clip_max, spec.state_clip_nan) == (-1.0, math.inf, True)


def test_numpy_scalars_become_python_ones():
    spec = lstm(hidden_size=np.int64(4), bidirectional=np.True_, dropout=np.float32(0.5), projection_size=np.int8(2))
    assert spec == lstm(bidirectional=True, dropout=0.5, projection_size=2)
    kinds = [type(getattr(spec, name)) for name in ("hidden_size", "bidirectional", "dropout", "projection_size")]
    assert kinds == [int, bool, float, int]


def test_names_become_plain_strings():
    names = {"mode": "gru", "bias": "single", "compute": "bfloat16", "residual": "identity"}
    spec = RNNSpec(input_size=3, hidden_size=3, **{name: np.str_(value) for name, value in names.items()})
    assert repr(spec) == repr(RNNSpec(input_size=3, hidden_size=3, **names))


@given(specs())
def test_frozen_and_hashable(spec):
    twin = dataclasses.replace(spec)
    assert spec == twin
    assert hash(spec) == hash(twin)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden_size = 1


def test_derived_sizes():
    spec = lstm(num_layers=3, bidirectional=True, projection_size=2)
    assert (spec.num_directions, spec.num_gates, spec.state_size, spec.output_size) == (2, 4, 2, 4)
    assert [spec.layer_input_size(layer) for layer in range(3)] == [3, 4, 4]
    assert spec.state_names == ("h", "c")
    assert spec.state_shape(5) == ((6, 5, 2), (6, 5, 4))
    gru = RNNSpec("gru", 3, 4)
    assert (gru.num_gates, gru.state_names, gru.state_shape(5)) == (3, ("h",), ((1, 5, 4),))


@given(specs(), st.integers(1, 9), st.integers(1, 9))
def test_flops(spec, steps, batch):
    G, D, L, S = spec.num_gates, spec.num_directions, spec.num_layers, spec.state_size
    expected = 2 * steps * batch * G * spec.hidden_size * D * ((spec.input_size + S) + (L - 1) * (D * S + S))
    expected += 2 * steps * batch * (spec.projection_size or 0) * spec.hidden_size * L * D
    assert spec.flops(steps, batch) == expected
    assert spec.flops(steps, batch, training=True) == 3 * expected


@given(specs())
def test_layout_has_no_gaps(spec):
    G, D, L = spec.num_gates, spec.num_directions, spec.num_layers
    I, H, S = spec.input_size, spec.hidden_size, spec.state_size
    projection = (spec.projection_size or 0) * H * L * D
    assert spec.layout.size == G * H * D * ((I + S + 2) + (L - 1) * (D * S + S + 2)) + projection
    end = 0
    for entry in spec.layout:
        assert entry.offset == end
        assert entry.size == math.prod(entry.shape)
        end += entry.size
    assert end == spec.layout.size
    biases = [entry.kind.endswith("bias") for entry in spec.layout]
    assert biases == sorted(biases)
    assert len(spec.layout) == len(biases)


def test_layout_order_and_shapes():
    layout = lstm(num_layers=2, bidirectional=True, projection_size=2).layout
    weights = [
        *[("l0_i2h_weight", (16, 3)), ("l0_h2h_weight", (16, 2)), ("l0_h2r_weight", (2, 4))],
        *[("r0_i2h_weight", (16, 3)), ("r0_h2h_weight", (16, 2)), ("r0_h2r_weight", (2, 4))],
        *[("l1_i2h_weight", (16, 4)), ("l1_h2h_weight", (16, 2)), ("l1_h2r_weight", (2, 4))],
        *[("r1_i2h_weight", (16, 4)), ("r1_h2h_weight", (16, 2)), ("r1_h2r_weight", (2, 4))],
    ]
    cells = ("l0", "r0", "l1", "r1")
    biases = [(f"{cell}_{kind}", (16,)) for cell in cells for kind in ("i2h_bias", "h2h_bias")]
    assert [(entry.name, entry.shape) for entry in layout] == weights + biases


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projection", [None, 2])
def test_torch_names_and_shapes(mode, bidirectional, projection):
    if projection and mode != "lstm":
        return
    spec = RNNSpec(mode, 3, 4, num_layers=3, bidirectional=bidirectional, projection_size=projection)
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(mode, torch.nn.RNN)
    options = {"proj_size": projection} if projection else {}
    module = kind(3, 4, num_layers=3, bidirectional=bidirectional, **options)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    named = spec.layout.unpack(numbered(spec), names="torch")
    assert {name: array.shape for name, array in named.items()} == expected
    for entry in spec.layout:
        assert named[entry.torch_name].flat[0] == entry.offset


@given(specs())
@pytest.mark.parametrize("names", ["mxnet", "torch"])
def test_pack_is_the_inverse_of_unpack(names, spec):
    flat = numbered(spec)
    views = spec.layout.unpack(flat, names=names)
    packed = spec.layout.pack(views, names=names)
    assert packed.dtype == spec.dtype
    np.testing.assert_array_equal(packed, flat)
    assert not np.shares_memory(packed, flat)
    for name, view in views.items():
        assert np.shares_memory(view, flat), name
        view += 1
    np.testing.assert_array_equal(flat, packed + 1)


@given(specs(), st.data())
def test_view_equals_the_unpacked_parameter(spec, data):
    flat = numbered(spec)
    entry = data.draw(st.sampled_from(list(spec.layout)))
    view = spec.layout.view(flat, entry.layer, entry.direction, entry.kind)
    assert view.shape == entry.shape
    assert view.flat[0] == entry.offset
    assert np.shares_memory(view, flat)
    assert spec.layout.entry(entry.layer, entry.direction, entry.kind) is entry
    np.testing.assert_array_equal(view, spec.layout.unpack(flat)[entry.name])


def test_views_of_a_strided_vector():
    spec = lstm()
    strided = np.zeros(2 * spec.layout.size, np.float32)
    spec.layout.view(strided[::2], 0, 0, "i2h_weight")[...] = 1
    assert strided.sum() == 16 * 3


def test_pack_to_another_dtype():
    spec = lstm()
    assert spec.layout.pack(spec.layout.unpack(numbered(spec)), dtype=np.longdouble).dtype == np.longdouble


@pytest.mark.parametrize("where", [(2, 0, "i2h_weight"), (0, 1, "i2h_weight"), (0, 0, "h2r_weight"), (0, 0, "weight")])
def test_no_such_parameter(where):
    layout = lstm(num_layers=2).layout
    with pytest.raises(ValueError, match=f"no parameter '{where[2]}' for layer {where[0]}, direction {where[1]}"):
        layout.entry(*where)


@pytest.mark.parametrize("method", [ParameterLayout.unpack, lambda layout, x: layout.view(x, 0, 0, "i2h_weight")])
def test_invalid_flat_vector(method):
    layout = lstm().layout
    with pytest.raises(TypeError, match=r"^params must be a NumPy array; got list"):
        method(layout, [0.0] * layout.size)
    for shape in [(layout.size - 1,), (layout.size + 1,), (1, layout.size)]:
        with pytest.raises(ValueError, match=rf"^params must have shape \({layout.size},\); got "):
            method(layout, np.zeros(shape, np.float32))


def test_pack_errors():
    layout = lstm().layout
    arrays = layout.unpack(np.zeros(layout.size, np.float32))
    with pytest.raises(ValueError, match=r"^parameters missing: l0_h2h_bias, l0_i2h_bias$"):
        layout.pack({name: array for name, array in arrays.items() if "bias" not in name})
    with pytest.raises(ValueError, match=r"^parameters unknown: r0_i2h_bias$"):
        layout.pack({**arrays, "r0_i2h_bias": np.zeros(16)})
    with pytest.raises(ValueError, match=r"^parameters missing: l0_i2h_bias; unknown: r0_i2h_bias$"):
        layout.pack({name.replace("l0_i2h_bias", "r0_i2h_bias"): array for name, array in arrays.items()})
    with pytest.raises(ValueError, match=r"^l0_i2h_weight must have shape \(16, 3\); got \(3, 16\)"):
        layout.pack({**arrays, "l0_i2h_weight": np.zeros((3, 16))})
    with pytest.raises(TypeError, match=r"^l0_i2h_weight must be an array without a mask; got MaskedArray$"):
        layout.pack({**arrays, "l0_i2h_weight": np.ma.masked_array(arrays["l0_i2h_weight"], mask=True)})
    with pytest.raises(TypeError, match=r"^params must be a NumPy array; got MaskedArray$"):
        layout.unpack(np.ma.masked_array(np.zeros(layout.size, np.float32), mask=True))


def test_invalid_names():
    layout = lstm().layout
    flat = np.zeros(layout.size, np.float32)
    with pytest.raises(ValueError, match=r"^names must be one of mxnet, torch; got 'keras'"):
        layout.unpack(flat, names="keras")
    with pytest.raises(ValueError, match=r"^names must be one of mxnet, torch; got 'keras'"):
        layout.pack({}, names="keras")


def test_compute_is_checked():
    assert RNNSpec("lstm", 3, 4, compute="float32") == RNNSpec("lstm", 3, 4)
    assert RNNSpec("lstm", 3, 4, dtype="float64", compute="float64").operand_format == "float64"
    assert RNNSpec("lstm", 3, 4, compute="int8").operand_format == "int8"
    for wrong in ("fp8", "", "float64"):
        with pytest.raises(ValueError, match="compute must be one of float32, bfloat16, int8, int8_weights; got"):
            RNNSpec("lstm", 3, 4, compute=wrong)
    with pytest.raises(ValueError, match="compute='int8' needs dtype 'float32'; got 'float64'"):
        RNNSpec("lstm", 3, 4, dtype="float64", compute="int8")


def test_int8_sums_fit():
    """As many products of the largest integers as fit an int32 sum, and not one more."""
    most = (2**31 - 1) // 127**2
    RNNSpec("lstm", most, 4, compute="int8")
    with pytest.raises(ValueError, match=f"compute='int8' needs at most {most} features of a layer; got {most + 1}"):
        RNNSpec("lstm", most + 1, 4, compute="int8")
