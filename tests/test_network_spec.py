"""NetworkSpec: its checks, the stack of a list of sizes, and the layout of its parameters."""

import pickle
import re

import numpy as np
import pytest

from fusedrnn import NetworkSpec, RNNOp, RNNSpec, cells, init_params

LSTM = RNNSpec("lstm", 3, 4)

ERRORS = [
    ("lstm", TypeError, "layers[0] must be an RNNSpec; got str"),
    (LSTM, TypeError, "layers must be a sequence of RNNSpecs; got RNNSpec"),
    ([], ValueError, "layers must have at least one RNNSpec; got none"),
    ([LSTM, "gru"], TypeError, "layers[1] must be an RNNSpec; got str"),
    (
        [RNNSpec("lstm", 3, 4, bidirectional=True), RNNSpec("gru", 4, 5)],
        ValueError,
        "layers[1]: input_size must be the output size of layers[0] (8); got 4",
    ),
    (
        [LSTM, RNNSpec("gru", 4, 5, dtype="float64")],
        ValueError,
        "layers[1]: dtype must be that of layers[0] (float32); got float64",
    ),
]


@pytest.mark.parametrize(("layers", "error", "message"), ERRORS)
def test_errors(layers, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        NetworkSpec(layers)


STACK_ERRORS = [
    ({"hidden_sizes": 4}, TypeError, "hidden_sizes must be a sequence of integers, one for each layer; got 4"),
    ({"hidden_sizes": ()}, ValueError, "hidden_sizes must have a size for each layer; got none"),
    ({"hidden_sizes": (4, 0)}, ValueError, "hidden_sizes[1] must be at least 1; got 0"),
    ({"num_layers": 2}, TypeError, "num_layers must not be given: hidden_sizes has an entry for each layer"),
    (
        {"projection_size": 3},
        ValueError,
        "hidden_sizes[1] of 2: projection_size must be smaller than hidden_size (2); got 3",
    ),
    ({"mode": "lstn"}, ValueError, "mode must be one of rnn_relu, rnn_tanh, lstm, gru; got 'lstn'"),
    ({"input_size": 0}, ValueError, "input_size must be at least 1; got 0"),
    ({"dropout": 1.0}, ValueError, "dropout must be a probability in [0, 1); got 1.0"),
    ({"residual": True}, TypeError, "residual must be one of identity, projection; got True"),
    ({"residual": "add"}, ValueError, "residual must be one of identity, projection; got 'add'"),
    (
        {"residual": "identity"},
        ValueError,
        "residual='identity' needs a layer whose input has the size of its output; "
        "got input_size=3 and outputs of 4, 2",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), STACK_ERRORS)
def test_errors_of_stack(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        NetworkSpec.stack(**{"mode": "lstm", "input_size": 3, "hidden_sizes": (4, 2), **changes})


def test_stack():
    """Layers of one size are one entry; each entry reads both directions of the one before."""
    spec = NetworkSpec.stack("lstm", 3, (8, 8, 5, 8), bidirectional=True, dtype="float64")
    options = {"bidirectional": True, "dtype": "float64"}
    assert spec == NetworkSpec((
        RNNSpec("lstm", 3, 8, 2, **options), RNNSpec("lstm", 16, 5, **options), RNNSpec("lstm", 10, 8, **options)
    ))  # fmt: skip
    assert (spec.input_size, spec.output_size, spec.dtype) == (3, 16, "float64")
    assert spec.flops(5, 2) == sum(layer.flops(5, 2) for layer in spec.layers)
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec))) and not spec.drops
    assert NetworkSpec.stack("lstm", 3, [4, 4], dropout=0.5) == NetworkSpec([RNNSpec("lstm", 3, 4, 2, dropout=0.5)])
    assert NetworkSpec.stack(cells.zoneout_lstm, 3, [4, 5]).drops


def test_dropout_and_residual_of_a_stack():
    """Dropout of the output of one entry is that of the input of the next."""
    stack = NetworkSpec.stack("lstm", 4, (4, 4, 5), dropout=0.5, input_dropout=0.25, residual="identity")
    assert stack == NetworkSpec([
        RNNSpec("lstm", 4, 4, 2, dropout=0.5, input_dropout=0.25, residual="identity"),
        RNNSpec("lstm", 4, 5, dropout=0.5, input_dropout=0.5),
    ])  # fmt: skip
    projected = NetworkSpec.stack("lstm", 4, (4, 5, 5, 5, 3), dropout=0.5, residual="projection")
    assert projected.layers == (
        RNNSpec("lstm", 4, 4, dropout=0.5, residual="identity"),
        RNNSpec("lstm", 4, 5, dropout=0.5, input_dropout=0.5, residual="projection"),
        RNNSpec("lstm", 5, 5, 2, dropout=0.5, input_dropout=0.5, residual="identity"),
        RNNSpec("lstm", 5, 3, dropout=0.5, input_dropout=0.5, residual="projection"),
    )


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"projection_size": 4}, {"compute": "bfloat16"}])
def test_layers_of_one_size_are_the_same_in_one_entry(options):
    """What the stack merges has the bits of separate entries."""
    (merged,) = NetworkSpec.stack("lstm", 5, (9, 9), **options).layers
    first, second = RNNSpec("lstm", 5, 9, **options), RNNSpec("lstm", merged.output_size, 9, **options)
    x = np.random.default_rng(0).standard_normal((6, 3, 5)).astype("f")
    params = init_params(merged, np.random.default_rng(1))
    y, final, _ = RNNOp(merged).forward(x, params)
    named = merged.layout.unpack(params)
    for number, spec in enumerate((first, second)):
        own = {name: named[name[0] + str(number) + name[2:]] for name in spec.layout.unpack(np.empty(spec.layout.size))}
        x, states, _ = RNNOp(spec).forward(x, spec.layout.pack(own))
        rows = slice(number * spec.num_directions, (number + 1) * spec.num_directions)
        for state, all_layers in zip(states, final, strict=True):
            np.testing.assert_array_equal(state, all_layers[rows])
    np.testing.assert_array_equal(x, y)


def test_layout():
    """The vectors of the layers, one behind the other, by names that begin with the layer's number."""
    spec = NetworkSpec([RNNSpec("lstm", 3, 4, 2), RNNSpec(cells.ind_rnn, 4, 5)])
    layout, sizes = spec.layout, [layer.layout.size for layer in spec.layers]
    params = np.arange(sum(sizes), dtype=np.float32)
    assert layout.size == len(params) and layout.parts == (slice(0, sizes[0]), slice(sizes[0], sum(sizes)))
    expected = {
        f"layers.{index}.{name}": view
        for index, (layer, part) in enumerate(zip(spec.layers, np.split(params, [sizes[0]]), strict=True))
        for name, view in layer.layout.unpack(part, names="torch").items()
    }
    unpacked = layout.unpack(params, names="torch")
    assert unpacked.keys() == expected.keys() and "layers.1.u_l0" in unpacked
    for name, view in unpacked.items():
        np.testing.assert_array_equal(view, expected[name])
        assert np.shares_memory(view, params)
    np.testing.assert_array_equal(layout.pack(unpacked, names="torch"), params)
    assert "layers.0.l1_i2h_weight" in layout.unpack(params)
    assert len(layout) == len([*layout]) == sum(len(layer.layout) for layer in spec.layers)
    for one, other in zip(layout.split(params), np.split(params, [sizes[0]]), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"^params must have shape \(334,\); got \(3,\)$"):
        layout.unpack(params[:3])
    with pytest.raises(ValueError, match=r"missing: layers\.0\.l0_h2h_bias, "):
        layout.pack({})


def test_initial_params():
    spec = NetworkSpec.stack("lstm", 3, (4, 5))
    rng = np.random.default_rng(0)
    expected = [init_params(layer, rng, {"f.bias": 1.0}) for layer in spec.layers]
    np.testing.assert_array_equal(
        init_params(spec, np.random.default_rng(0), {"f.bias": 1.0}), np.concatenate(expected)
    )


def test_seeds_of_layers_differ():
    spec = NetworkSpec.stack("lstm", 3, range(1, 9))
    seeds = [seed for first in (0, 1, 2, 2**64 - 1) for seed in spec.layer_seeds(first)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds)
    assert spec.layer_seeds(7)[0] == 7
