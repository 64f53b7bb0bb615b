"""Calls of Keras layers on arrays, with all gradients, on any backend."""

import keras
import numpy as np
from keras import ops, tree

from fusedrnn.testing.tolerance import difference

IS_OLD = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15)
"""Whether this is one of the first releases of Keras that the extra allows, which refuse other arguments."""


def assert_within(actual, expected, rtol, atol):
    """Arrays of the same dtype whose elements differ by no more than a tolerance."""
    assert actual.dtype == expected.dtype
    assert (wrong := difference(actual, expected, rtol, atol)) is None, wrong


def weighted_sum(outputs):
    """A scalar that depends on each element of the outputs in a different way."""
    terms = []
    for output in outputs:
        factors = np.cos(np.arange(np.prod(output.shape))).reshape(output.shape)
        terms.append(ops.sum(output * ops.cast(factors, output.dtype)))
    return sum(terms)


def outputs_and_gradients(layer, x, states=None, mask=None, training=False):
    """The outputs of a built layer, and the gradients of x, the initial states and the trainable weights."""
    states = states or []

    def call(x, states):
        options = {"mask": None if mask is None else ops.convert_to_tensor(mask), "training": training}
        outputs = layer(x, initial_state=states or None, **options)
        return tree.flatten(outputs)

    outputs, gradients = _DIFFERENTIATE[keras.backend.backend()](layer, call, x, states)
    return [[ops.convert_to_numpy(array) for array in arrays] for arrays in (outputs, gradients)]


def _with_torch(layer, call, x, states):
    import torch

    operands = [torch.tensor(array, requires_grad=True) for array in (x, *states)]
    outputs = call(operands[0], operands[1:])
    variables = [variable.value for variable in layer.trainable_variables]
    return outputs, torch.autograd.grad(weighted_sum(outputs), [*operands, *variables])


def _with_jax(layer, call, x, states):
    import jax

    @jax.jit
    def results(operands, values):
        def loss(operands, values):
            mapping = list(zip(layer.trainable_variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                outputs = call(operands[0], list(operands[1:]))
            updates = [scope.get_current_value(variable) for variable in layer.non_trainable_variables]
            return weighted_sum(outputs), (outputs, updates)

        return jax.grad(loss, (0, 1), has_aux=True)(operands, values)

    values = [variable.value for variable in layer.trainable_variables]
    (doperands, dvalues), (outputs, updates) = results((x, *states), values)
    for variable, value in zip(layer.non_trainable_variables, updates, strict=True):
        if value is not None:
            variable.assign(value)
    return outputs, (*doperands, *dvalues)


def _with_tensorflow(layer, call, x, states):
    import tensorflow as tf

    operands = [tf.constant(array) for array in (x, *states)]
    with tf.GradientTape() as tape:
        tape.watch(operands)
        outputs = call(operands[0], operands[1:])
        loss = weighted_sum(outputs)
    return outputs, tape.gradient(loss, [*operands, *[variable.value for variable in layer.trainable_variables]])


_DIFFERENTIATE = {"torch": _with_torch, "jax": _with_jax, "tensorflow": _with_tensorflow}
