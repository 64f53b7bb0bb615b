"""Jobs that differ have different keys: XLA's calls find their prepared calls by these."""

from dataclasses import fields, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from fusedrnn import Activation, RNNOp, RNNSpec, cells
from fusedrnn.jax import calls, rnn
from fusedrnn.jax.array_layout import ArrayLayout, Piece
from problems import Shape, assert_gradients_close, problem_of

GATES = Activation("hard_sigmoid", 0.2, 0.5), Activation("tanh"), Activation("tanh")
LSTM = RNNSpec("lstm", 4, 8, 2, state_clip_min=-1.0, state_clip_max=1.0, activations=GATES, gate_clip=3.0)
CHANGES = {
    "mode": ["rnn_tanh", "rnn_relu", "gru"],
    "input_size": [5], "hidden_size": [12], "num_layers": [3], "bidirectional": [True],
    "dropout": [0.1, 0.2], "projection_size": [3, 4], "dtype": ["float64"],
    "state_clip_min": [-2.0], "state_clip_max": [2.0], "state_clip_nan": [True],
    "reset_after": [False], "peepholes": [True], "coupled_gates": [True], "gate_clip": [None, 2.0],
    "activations": [None, *((Activation("hard_sigmoid", *own), *GATES[1:]) for own in ((0.3, 0.5), (0.2, 0.4)))],
    "bias": ["single", "none"], "reverse": [True], "compute": ["bfloat16", "int8", "int8_weights"],
    "residual": ["identity", "projection"], "input_dropout": [0.1],
}  # fmt: skip
FLASH, ZONEOUT = cells.flash_gru, cells.zoneout_lstm
CELLS = (
    *map(FLASH.with_heads, (1, 2, 4)),
    ZONEOUT, ZONEOUT.expectation, ZONEOUT.with_rates(c=0.3), ZONEOUT.with_rates(h=0.3), ZONEOUT.with_heads(2),
    ZONEOUT.with_rates(c=0.3).expectation, cells.ind_rnn,
)  # fmt: skip


def changed(name, value):
    """A spec with that value, in the mode that has the option."""
    if name == "mode":
        return RNNSpec(value, 4, 8)
    return RNNSpec("gru", 4, 8, reset_after=value) if name == "reset_after" else replace(LSTM, **{name: value})


def test_each_change_of_a_spec_changes_the_key():
    assert set(CHANGES) == {field.name for field in fields(RNNSpec)}
    specs = [LSTM, *(changed(name, value) for name, values in CHANGES.items() for value in values)]
    specs += [RNNSpec(cell, 4, 8, residual=residual) for cell in CELLS for residual in (None, "projection")]
    assert len(set(specs)) == len(specs)
    kinds = ("forward", None), ("training", None), ("backward", calls.Needs(True, True, False))
    keys = {calls.describe(calls.NetworkJob(calls.Call(spec), *kind))[0] for spec, kind in product(specs, kinds)}
    assert len(keys) == len(specs) * len(kinds)


def test_each_change_of_a_call_changes_the_key():
    options = [(), *((name,) for name in calls.OPTIONAL), calls.OPTIONAL]
    size = LSTM.layout.size
    layouts = None, *(ArrayLayout(((1, size),), pieces) for pieces in (
        (Piece(0, 0, size),), (Piece(0, 0, 1), Piece(0, 1, size - 1)), (Piece(0, 1, size - 1), Piece(0, 0, 1)),
    ))  # fmt: skip
    all_calls = [calls.Call(LSTM, *rest) for rest in product(options, (False, True), layouts)]
    needs = [calls.Needs(*flags) for flags in product((False, True), repeat=3)]
    jobs = [calls.NetworkJob(call, "backward", own) for call, own in product(all_calls, needs)]
    assert len({calls.describe(job)[0] for job in jobs}) == len(jobs)


def test_heads_do_not_share_a_call():
    shape = Shape(5, 3, 8, 64)
    for heads in (1, 2, 4):
        spec = RNNSpec(FLASH.with_heads(heads), 8, 64)
        problem, op = problem_of(spec, shape), RNNOp(spec)

        def loss(x, params, states, problem=problem):
            y, _ = rnn(problem.spec, params, x, states)
            return (y * problem.dy).sum(), y

        arguments = problem.x, problem.params, tuple(map(jnp.asarray, problem.states))
        np.testing.assert_array_equal(rnn(spec, problem.params, problem.x, problem.states)[0],
                                      op.forward(problem.x, problem.params, problem.states)[0])  # fmt: skip
        gradients, y = jax.grad(loss, (0, 1, 2), has_aux=True)(*arguments)
        expected_y, _, reserve = op.forward(problem.x, problem.params, problem.states, training=True)
        np.testing.assert_array_equal(y, expected_y)
        expected = op.backward(problem.dy, None, reserve)
        gradients = jax.tree.map(np.asarray, gradients)
        assert_gradients_close(gradients, expected, spec.dtype, spec, shape.T, shape.N)
