"""Keras layers on TensorFlow inside tf.function, with or without XLA, as is faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

fastest = importlib.import_module("fastest").fastest

_KINDS = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}
_SWAPPED = {"gru": (1, 0, 2)}
"""Our index of each of Keras's gates z r h. It is also Keras's index of each of our gates."""

_threads_set = False


def facts() -> dict[str, str]:
    """Versions."""
    return {"keras": keras.__version__, "tensorflow": tf.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays. The batch axis comes first in Keras."""
    _set_threads(work.threads)
    layers = [_layer(work, number) for number in range(work.layers)]
    x = tf.constant(work.x.swapaxes(0, 1))
    rows = len(work.directions)
    states = [[tf.constant(state[row]) for state in work.states] for row in range(work.layers * rows)]
    weights = [weight.value for layer in layers for one_way in _one_way_layers(layer) for weight in _variables(one_way)]

    def forward(x: Any, states: Any = None) -> Any:
        final = []
        for number, layer in enumerate(layers):
            own = states and states[number * rows : (number + 1) * rows]
            initial = own and [state for direction in own for state in direction]
            x, *last = layer(x, initial_state=initial)
            final += last
        return x, final

    count = len(work.state_names)
    upstream = _upstream(work) if work.training else None

    def train(x: Any, states: Any) -> Any:
        sources = [x, *(state for direction in states for state in direction), *weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for source in sources:
                tape.watch(source)
            y, final = forward(x, states)
        return y, final, tape.gradient([y, *final], sources, output_gradients=upstream)

    def call_with(xla: bool) -> Any:
        if work.training:
            run = tf.function(train, jit_compile=xla)
            return lambda: _wait(run(x, states))
        run = tf.function(forward, jit_compile=xla)
        return lambda: _wait(run(x))

    def arrays(result: Any) -> dict[str, Any]:
        results = work.outputs(result[0].numpy().swapaxes(0, 1), _by_name(result[1], count))
        if work.training:
            dx, *rest = result[2]
            total = len(states) * count
            dparams = _dparams(work, [gradient.numpy() for gradient in rest[total:]])
            results.update(work.gradients(dx.numpy().swapaxes(0, 1), _by_name(rest[:total], count), dparams))
        return results

    return fastest([call_with(False), call_with(True)]), arrays


def _upstream(work: Workload) -> list[Any]:
    """Gradients of the output and of the final states of each layer and direction."""
    dstates = [tf.constant(gradient[row]) for row in range(len(work.dstates[0])) for gradient in work.dstates]
    return [tf.constant(work.dy.swapaxes(0, 1)), *dstates]


def _set_threads(count: int) -> None:
    """Set the number of threads, which TensorFlow accepts only once, before its first operation."""
    global _threads_set
    if not _threads_set:
        tf.config.threading.set_intra_op_parallelism_threads(count)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        _threads_set = True


def _wait(result: Any) -> Any:
    result[0].numpy()  # blocks until the result is computed
    return result


def _layer(work: Workload, number: int) -> Any:
    kind = _KINDS.get(work.mode, keras.layers.SimpleRNN)
    options: dict[str, Any] = {"return_sequences": True, "return_state": True, "dtype": work.dtype}
    if work.mode == "gru":
        options["reset_after"] = True
    elif work.mode != "lstm":
        options["activation"] = work.mode[4:]
    layer: Any = kind(work.hidden_size, **options)
    size = work.input_size if number == 0 else len(work.directions) * work.hidden_size
    if work.bidirectional:
        layer = keras.layers.Bidirectional(layer)
    layer.build((work.x.shape[1], work.x.shape[0], size))
    for direction, one_way in zip(work.directions, _one_way_layers(layer), strict=True):
        for variable, value in zip(_variables(one_way), _keras_weights(work, number, direction), strict=True):
            variable.assign(value)
    return layer


def _one_way_layers(layer: Any) -> list[Any]:
    """The layer of each direction."""
    return [layer.forward_layer, layer.backward_layer] if isinstance(layer, keras.layers.Bidirectional) else [layer]


def _variables(layer: Any) -> list[Any]:
    return [layer.cell.kernel, layer.cell.recurrent_kernel, layer.cell.bias]


def _keras_weights(work: Workload, layer: int, direction: str) -> list[Any]:
    """Kernel (in, G*H), recurrent kernel (H, G*H) and bias, gates in Keras's order."""
    w_x, w_h, b_x, b_h = (_swap(work, array) for array in work.weights(layer, direction))
    return [w_x.T, w_h.T, np.stack([b_x, b_h]) if work.mode == "gru" else b_x + b_h]


def _dparams(work: Workload, gradients: list[Any]) -> dict[str, Any]:
    """Gradients by our names, from those of the variables of all layers. Both biases have the gradient of their sum."""
    dparams, remaining = {}, iter(gradients)
    for layer in range(work.layers):
        for direction in work.directions:
            w_x, w_h, bias = next(remaining), next(remaining), next(remaining)
            b_x, b_h = bias if work.mode == "gru" else (bias, bias)
            kinds = {"i2h_weight": w_x.T, "h2h_weight": w_h.T, "i2h_bias": b_x, "h2h_bias": b_h}
            dparams.update({f"{direction}{layer}_{kind}": _swap(work, array) for kind, array in kinds.items()})
    return dparams


def _swap(work: Workload, array: Any) -> Any:
    """Gate rows from our order to Keras's, or back."""
    order = _SWAPPED.get(work.mode)
    if order is None:
        return array
    gates = np.split(array, len(order))
    return np.concatenate([gates[gate] for gate in order])


def _by_name(states: Any, count: int) -> list[Any]:
    """Each state as (L*D, N, H), from h and c of each layer and direction."""
    return [np.stack([state.numpy() for state in states[name::count]]) for name in range(count)]
