"""Whole models: accelerate and restore, fit, and files in both directions."""

import copy
import functools
import pickle
import re

import keras
import numpy as np
import pytest
from keras import layers

import fusedrnn.keras
from fusedrnn.keras import accelerate, restore, saving
from fusedrnn.testing.tolerance import tolerance
from keras_calls import IS_OLD, assert_within

N, T, WORDS, H = 8, 6, 11, 5
RNG = np.random.default_rng(0)
X = RNG.integers(0, WORDS, (N, T))  # 0 is masked
Y = RNG.standard_normal((N, 1)).astype("float32")
# fit() runs a few dozen operations between two results that are compared.
RTOL, ATOL = tolerance("float32", 100 * H)


def build_model(optimizer="adam"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((T,)),
            layers.Embedding(WORDS, 4, mask_zero=True),
            layers.Bidirectional(layers.LSTM(H, return_sequences=True)),
            layers.GRU(H, kernel_regularizer="l2", dropout=0.2, seed=1),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse")
    return model


def fit(model, epochs=1):
    history = model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)
    return np.array(history.history["loss"], "float32")


def assert_same_weights(ours, theirs):
    for weight, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert_within(weight, other, RTOL, ATOL)


def test_fit_and_predict(fused):
    ours, theirs = build_model(), build_model()
    assert len(accelerate(ours)) == 4
    assert_within(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), RTOL, ATOL)
    assert_within(fit(ours, 2), fit(theirs, 2), RTOL, ATOL)
    assert_same_weights(ours, theirs)
    assert {(spec.mode, spec.bidirectional) for spec in fused} == {("lstm", True), ("gru", False)}


@pytest.mark.every_backend
def test_accelerated_between_two_fits(fused):
    """The optimizer goes on from where it was, and compiled functions are made anew."""
    ours, theirs = build_model(), build_model()
    for model in (ours, theirs):
        fit(model)
    assert not fused
    variables = [*ours.variables, *ours.optimizer.variables]
    assert accelerate(ours)
    assert all(one is other for one, other in zip([*ours.variables, *ours.optimizer.variables], variables, strict=True))
    assert_within(fit(ours), fit(theirs), RTOL, ATOL)
    assert_same_weights(ours, theirs)
    assert fused
    assert len(restore(ours)) == 4
    fused.clear()
    assert_within(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), RTOL, ATOL)
    assert not fused


class Conversions(keras.callbacks.Callback):
    """Accelerates the model after an epoch, and restores it after the next one.

    Args:
        fused: The specs of the calls of the operator.
    """

    def __init__(self, fused):
        super().__init__()
        self.fused, self.num_calls = fused, []

    def on_epoch_end(self, epoch, logs=None):
        self.num_calls.append(len(self.fused))
        self.fused.clear()
        assert (accelerate, restore)[epoch % 2](self.model)


@pytest.mark.every_backend
def test_accelerated_within_fit(fused):
    """The running loops go on with the functions that are made anew."""
    ours, theirs = build_model(), build_model()
    conversions = Conversions(fused)
    losses = []
    for model, callbacks in ((ours, [conversions]), (theirs, [])):
        history = model.fit(
            X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0, validation_data=(X, Y), callbacks=callbacks
        ).history
        losses += [np.array(history[name], "float32") for name in ("loss", "val_loss")]
    for own, other in zip(losses[:2], losses[2:], strict=True):
        assert_within(own, other, RTOL, ATOL)
    assert_same_weights(ours, theirs)
    assert [num_calls > 0 for num_calls in conversions.num_calls] == [False, True, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # where Keras breaks the graph
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "SimpleRNN"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_compile(wrapped, kind):
    """A graph has the registered operator."""
    import torch

    layer = getattr(fusedrnn.keras, kind)(H, return_sequences=True)
    layer = fusedrnn.keras.Bidirectional(layer) if wrapped else layer
    x = torch.randn(N, T, 3)
    expected = layer(x)
    graphs = []
    compiled = torch.compile(lambda x: layer(x), backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert_within(*map(keras.ops.convert_to_numpy, (compiled(x), expected)), RTOL, ATOL)
    assert len(graphs) == 1
    assert sum(str(node.target).startswith("fusedrnn.rnn") for node in graphs[0].graph.nodes) == 1


@pytest.mark.every_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_export_of_any_shape(wrapped, masked):
    """A graph that JAX exports takes any T and N."""
    if keras.backend.backend() != "jax":
        pytest.skip("an export of JAX")
    if masked and IS_OLD:
        pytest.skip("Keras's arange takes no symbolic size")
    import jax
    from jax import export

    layer = fusedrnn.keras.GRU(H, return_sequences=True)
    layer = fusedrnn.keras.Bidirectional(layer) if wrapped else layer
    layer.build((N, T, 3))
    t, n = export.symbolic_shape("t, n")
    shapes = [jax.ShapeDtypeStruct((n, t, 3), "float32"), jax.ShapeDtypeStruct((n, t), "bool")]
    exported = export.export(
        jax.jit(lambda x, mask=None: layer(x, mask=mask)),
        disabled_checks=[export.DisabledSafetyCheck.custom_call("fusedrnn_call")],
    )(*shapes[: 1 + masked])
    x = RNG.standard_normal((N + 1, T + 1, 3)).astype("float32")
    operands = [x, RNG.random((N + 1, T + 1)) > 0.4][: 1 + masked]
    expected = layer(x, mask=jax.numpy.asarray(operands[1]) if masked else None)
    assert "fusedrnn_call" in exported.mlir_module()
    assert_within(*map(np.asarray, (exported.call(*operands), expected)), RTOL, ATOL)


class Pair(keras.Model):
    """A subclassed model with a layer in an attribute and others in a list."""

    def __init__(self):
        super().__init__()
        self.first = layers.LSTM(H, return_sequences=True)
        self.others = [layers.TimeDistributed(layers.GRU(H)), keras.Sequential([layers.RNN(layers.GRUCell(H))])]

    def call(self, x):
        return self.others[1](self.others[0](keras.ops.stack([self.first(x)] * 2, axis=1)))


def test_report():
    x = RNG.standard_normal((N, T, 3)).astype("float32")
    model = Pair()
    expected = keras.ops.convert_to_numpy(model(x))
    report = accelerate(model)
    names = [re.sub(r"_\d+", "", layer.name) for layer in report.replaced]
    assert names == ["lstm", "time_distributed/gru", "sequential/rnn"]
    assert not report.unchanged
    assert_within(keras.ops.convert_to_numpy(model(x)), expected, RTOL, ATOL)
    assert len(accelerate(model)) == 0
    assert len(restore(model)) == 3
    assert type(model.first) is layers.LSTM


class Doubled(layers.LSTM):
    """A subclass with a call of its own."""

    def call(self, sequences, **options):
        return 2 * super().call(sequences, **options)


REASONS = {
    "a subclass": (lambda: Doubled(H), "it is a subclass of LSTM"),
    "an activation": (lambda: layers.GRU(H, activation="gelu"), "its activation is gelu"),
    "a recurrent activation": (
        lambda: layers.LSTM(H, recurrent_activation="exponential"), "its recurrent_activation is exponential",
    ),
    "a dtype": (
        lambda: layers.LSTM(H, dtype="mixed_float16"), "it computes in float16; ours are float32, float64, bfloat16",
    ),
    "a cell": (lambda: layers.ConvLSTM1D(H, 3), "it is a subclass of RNN"),
    "a loss of each step": (
        lambda: layers.RNN([layers.GRUCell(H), layers.GRUCell(H, activity_regularizer="l2")]),
        "its cell has an activity_regularizer",
    ),
    "a stack of one": (
        lambda: layers.RNN([layers.GRUCell(H)]), "its cell is a stack of one, whose states Keras nests in a way of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REASONS)
def test_layers_that_are_left(what):
    make, reason = REASONS[what]
    layer = make()
    cls = type(layer)
    report = accelerate(keras.Sequential([layer]))
    assert not report
    (left,) = report.unchanged
    assert left.reason.startswith(reason)
    assert (left.name, left.kind) == (layer.name, cls.__name__)
    assert type(layer) is cls


def test_note_of_dropout_of_states():
    (layer,) = accelerate(layers.GRU(H, recurrent_dropout=0.1)).replaced
    assert str(layer) == "(the model itself): GRU, with recurrent_dropout training runs Keras's own loop"


@pytest.mark.parametrize("convert", [accelerate, restore])
def test_only_layers(convert):
    with pytest.raises(TypeError, match="model must be a Keras model or layer; got list"):
        convert([layers.LSTM(H)])


def forget_our_classes(monkeypatch):
    """As in a process that has not imported fusedrnn.keras."""
    for name in ("REGISTERED_NAMES_TO_OBJS", "REGISTERED_OBJS_TO_NAMES"):
        registered = getattr(keras.src.api_export, name)
        kept = {
            key: value for key, value in registered.items()
            if not any(getattr(each, "__module__", "").startswith("fusedrnn.") for each in (key, value))
        }  # fmt: skip
        monkeypatch.setattr(keras.src.api_export, name, kept)
    monkeypatch.setattr(saving, "_OURS", {})


def test_files(tmp_path, monkeypatch):
    """A file gives our layers where fusedrnn.keras is imported, and Keras's own elsewhere, if ours were saved."""
    ours, theirs = build_model(), build_model()
    accelerate(ours)
    fit(ours)
    expected = ours.predict(X, verbose=0)
    ours.save(tmp_path / "ours.keras")
    theirs.save(tmp_path / "theirs.keras")
    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert type(loaded.layers[1]) is fusedrnn.keras.Bidirectional
    assert type(loaded.layers[1].backward_layer) is fusedrnn.keras.LSTM
    assert_within(loaded.predict(X, verbose=0), expected, RTOL, ATOL)
    forget_our_classes(monkeypatch)
    plain = keras.saving.load_model(tmp_path / "ours.keras")
    assert type(plain.layers[1]) is layers.Bidirectional
    assert type(plain.layers[1].backward_layer) is layers.LSTM
    assert type(plain.layers[2]) is layers.GRU
    assert_within(plain.predict(X, verbose=0), expected, RTOL, ATOL)
    assert_within(fit(plain), fit(loaded), RTOL, ATOL)  # the optimizer is saved too


def test_files_of_keras(tmp_path):
    theirs = build_model()
    fit(theirs)
    theirs.save(tmp_path / "theirs.keras")
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "theirs.keras")
    assert type(loaded.layers[1]) is layers.Bidirectional
    assert len(accelerate(loaded)) == 4
    ours = build_model()
    accelerate(ours)
    fit(ours)
    ours.load_weights(tmp_path / "theirs.weights.h5")
    for model in (loaded, ours):
        assert_within(model.predict(X, verbose=0), theirs.predict(X, verbose=0), RTOL, ATOL)


@pytest.mark.filterwarnings("ignore:.*HDF5:UserWarning")
def test_files_in_hdf5(tmp_path, monkeypatch):
    """Which name classes alone."""
    theirs = build_model()
    theirs.save(tmp_path / "theirs.h5")
    expected = theirs.predict(X, verbose=0)
    loaded = keras.saving.load_model(tmp_path / "theirs.h5", compile=False)
    assert type(loaded.layers[1]) is fusedrnn.keras.Bidirectional
    assert type(loaded.layers[2]) is fusedrnn.keras.GRU
    assert_within(loaded.predict(X, verbose=0), expected, RTOL, ATOL)
    accelerate(loaded)
    loaded.save(tmp_path / "ours.h5")
    again = keras.saving.load_model(tmp_path / "ours.h5", compile=False)
    assert type(again.layers[1].forward_layer) is fusedrnn.keras.LSTM
    forget_our_classes(monkeypatch)
    plain = keras.saving.load_model(tmp_path / "ours.h5", compile=False)
    assert type(plain.layers[1]) is layers.Bidirectional
    assert type(plain.layers[1].backward_layer) is layers.LSTM
    assert_within(plain.predict(X, verbose=0), expected, RTOL, ATOL)


def test_files_of_former_versions():
    """Ours had a registered name, and Keras's had none."""
    saved = keras.saving.serialize_keras_object(layers.GRU(H))
    assert type(keras.saving.deserialize_keras_object(saved)) is layers.GRU
    assert type(keras.saving.deserialize_keras_object({**saved, "registered_name": "GRU"})) is fusedrnn.keras.GRU


def classes_with_names_of_keras():
    """A user's own classes, which are not registered."""

    class LSTM(layers.LSTM):
        def call(self, sequences, initial_state=None):
            return 3 * super().call(sequences, initial_state)

    class GRU(layers.Layer):
        def call(self, x):
            return 2 * x

    class RNN(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    return {cls.__name__: cls for cls in (LSTM, GRU, RNN)}


@pytest.mark.filterwarnings("ignore:.*HDF5:UserWarning")
@pytest.mark.parametrize("names", [("GRU", "LSTM"), ("RNN",)])
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_files_with_other_classes_of_the_same_names(names, suffix, tmp_path):
    x = RNG.standard_normal((N, T, H)).astype("float32")
    classes = classes_with_names_of_keras()
    own = [classes[name](*[H] * (name == "LSTM")) for name in names]
    others = [] if suffix == "h5" else [fusedrnn.keras.LSTM(H, return_sequences=True)]  # HDF5 has one class for a name
    model = keras.Sequential([keras.Input((T, H)), *others, *own])
    expected = keras.ops.convert_to_numpy(model(x))
    model.save(tmp_path / f"model.{suffix}")
    loaded = keras.saving.load_model(tmp_path / f"model.{suffix}", custom_objects=classes)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in (*others, *own)]
    assert_within(keras.ops.convert_to_numpy(loaded(x)), expected, RTOL, ATOL)


def test_constructors_keep_the_class(tmp_path):
    """Also within Keras's own wrapper, which makes its layers from their configuration."""
    for wrapper in (layers.Bidirectional, fusedrnn.keras.Bidirectional):
        wrapped = wrapper(fusedrnn.keras.GRU(H, reset_after=False))
        assert type(wrapped.forward_layer) is type(wrapped.backward_layer) is fusedrnn.keras.GRU
    layer = fusedrnn.keras.RNN([layers.LSTMCell(H), layers.LSTMCell(H)])
    clone = type(layer).from_config(layer.get_config())
    assert type(clone) is fusedrnn.keras.RNN


def test_changed_weights_show(fused):
    """Also changes that PyTorch does not see."""
    layer = fusedrnn.keras.LSTM(H)
    x = RNG.standard_normal((N, T, 3)).astype("float32")
    first = layer(x)
    kernel = layer.cell.kernel.value
    for change in (
        lambda: layer.set_weights([weight + 0.5 for weight in layer.get_weights()]),
        lambda: kernel.data.mul_(-1),
        lambda: kernel.detach().numpy().__setitem__((0, 0), 3.0),
    ):
        change()
        fresh = layers.LSTM(H)
        fresh.build(x.shape)
        fresh.set_weights(layer.get_weights())
        y = layer(x)
        assert_within(*map(keras.ops.convert_to_numpy, (y, fresh(x))), RTOL, ATOL)
        assert not np.allclose(*map(keras.ops.convert_to_numpy, (y, first)))


@pytest.mark.every_backend
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_layers(wrapped):
    layer = layers.Bidirectional(layers.GRU(H)) if wrapped else layers.LSTM(H)
    x = RNG.standard_normal((N, T, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(layer(x))
    accelerate(layer)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(copied) is type(layer) is getattr(fusedrnn.keras, type(layer).__name__)
        assert_within(keras.ops.convert_to_numpy(copied(x)), expected, RTOL, ATOL)


def test_pickled_classes():
    for cls in (fusedrnn.keras.LSTM, fusedrnn.keras.RNN, fusedrnn.keras.Bidirectional):
        assert pickle.loads(pickle.dumps(cls)) is cls
    layer = pickle.loads(pickle.dumps(functools.partial(fusedrnn.keras.LSTM, H)))()
    assert type(layer) is fusedrnn.keras.LSTM
