"""Keras's layers on TensorFlow inside tf.function, with XLA or without, whichever is faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

fastest = importlib.import_module("fastest").fastest

_KINDS = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}
_SWAPPED = {"gru": (1, 0, 2)}
"""Keras's gates z r h in terms of ours, and ours in terms of Keras's."""

_threads_set = False


def facts() -> dict[str, str]:
    """Versions."""
    return {"keras": keras.__version__, "tensorflow": tf.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result. Sequences come first here, outside of the timing."""
    _set_threads(problem.threads)
    layers = [_layer(problem, number) for number in range(problem.layers)]
    x = tf.constant(problem.x.swapaxes(0, 1))
    rows = len(problem.directions)
    states = [[tf.constant(state[row]) for state in problem.states] for row in range(problem.layers * rows)]
    weights = [weight.value for layer in layers for way in _ways(layer) for weight in _variables(way)]

    def forward(x: Any, states: Any = None) -> Any:
        final = []
        for number, layer in enumerate(layers):
            first = states and [state for each in states[number * rows : (number + 1) * rows] for state in each]
            x, *last = layer(x, initial_state=first)
            final += last
        return x, final

    count = len(problem.state_names)
    upstream = None
    if problem.training:
        dstates = [tf.constant(each[row]) for row in range(len(problem.dstates[0])) for each in problem.dstates]
        upstream = [tf.constant(problem.dy.swapaxes(0, 1)), *dstates]

    def train(x: Any, states: Any) -> Any:
        wanted = [x, *(state for each in states for state in each), *weights]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for each in wanted:
                tape.watch(each)
            y, final = forward(x, states)
        return y, final, tape.gradient([y, *final], wanted, output_gradients=upstream)

    def calling(xla: bool) -> Any:
        if problem.training:
            run = tf.function(train, jit_compile=xla)
            return lambda: _done(run(x, states))
        run = tf.function(forward, jit_compile=xla)
        return lambda: _done(run(x))

    def arrays(made: Any) -> dict[str, Any]:
        found = problem.outputs(made[0].numpy().swapaxes(0, 1), _by_name(made[1], count))
        if problem.training:
            dx, *rest = made[2]
            total = len(states) * count
            dparams = _dparams(problem, [gradient.numpy() for gradient in rest[total:]])
            found.update(problem.gradients(dx.numpy().swapaxes(0, 1), _by_name(rest[:total], count), dparams))
        return found

    return fastest([calling(False), calling(True)]), arrays


def _set_threads(count: int) -> None:
    """TensorFlow takes this once, before its first operation."""
    global _threads_set
    if not _threads_set:
        tf.config.threading.set_intra_op_parallelism_threads(count)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        _threads_set = True


def _done(made: Any) -> Any:
    made[0].numpy()  # waits
    return made


def _layer(problem: Problem, number: int) -> Any:
    kind = _KINDS.get(problem.mode, keras.layers.SimpleRNN)
    options: dict[str, Any] = {"return_sequences": True, "return_state": True, "dtype": problem.dtype}
    if problem.mode == "gru":
        options["reset_after"] = True
    elif problem.mode != "lstm":
        options["activation"] = problem.mode[4:]
    layer: Any = kind(problem.hidden_size, **options)
    size = problem.input_size if number == 0 else len(problem.directions) * problem.hidden_size
    if problem.bidirectional:
        layer = keras.layers.Bidirectional(layer)
    layer.build((problem.x.shape[1], problem.x.shape[0], size))
    for direction, way in zip(problem.directions, _ways(layer), strict=True):
        for variable, value in zip(_variables(way), _theirs(problem, number, direction), strict=True):
            variable.assign(value)
    return layer


def _ways(layer: Any) -> list[Any]:
    """The layers of one direction each."""
    return [layer.forward_layer, layer.backward_layer] if isinstance(layer, keras.layers.Bidirectional) else [layer]


def _variables(layer: Any) -> list[Any]:
    return [layer.cell.kernel, layer.cell.recurrent_kernel, layer.cell.bias]


def _theirs(problem: Problem, layer: int, direction: str) -> list[Any]:
    """Kernel (in, G*H), recurrent kernel (H, G*H) and bias, gates in Keras's order."""
    w_x, w_h, b_x, b_h = (_swap(problem, array) for array in problem.weights(layer, direction))
    return [w_x.T, w_h.T, np.stack([b_x, b_h]) if problem.mode == "gru" else b_x + b_h]


def _dparams(problem: Problem, found: list[Any]) -> dict[str, Any]:
    """Gradients by our names, from those of all layers' variables; a sum of biases has the gradient of either."""
    made, given = {}, iter(found)
    for layer in range(problem.layers):
        for direction in problem.directions:
            w_x, w_h, bias = next(given), next(given), next(given)
            b_x, b_h = bias if problem.mode == "gru" else (bias, bias)
            kinds = {"i2h_weight": w_x.T, "h2h_weight": w_h.T, "i2h_bias": b_x, "h2h_bias": b_h}
            made.update({f"{direction}{layer}_{kind}": _swap(problem, array) for kind, array in kinds.items()})
    return made


def _swap(problem: Problem, array: Any) -> Any:
    """Rows of gates from our order into Keras's, or back."""
    order = _SWAPPED.get(problem.mode)
    if order is None:
        return array
    gates = np.split(array, len(order))
    return np.concatenate([gates[gate] for gate in order])


def _by_name(states: Any, count: int) -> list[Any]:
    """Each state (L*D, N, H), from h and c of each layer and direction in turn."""
    return [np.stack([state.numpy() for state in states[name::count]]) for name in range(count)]
