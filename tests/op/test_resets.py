"""Arguments of calls with resets, and engines that have none."""

import re

import numpy as np
import pytest

from fusedrnn import RNNOp, RNNSpec, cells

T, N, I, H = 4, 3, 2, 5
SPEC = RNNSpec("lstm", I, H)
X = np.ones((T, N, I), np.float32)
PARAMS = np.full(SPEC.layout.size, 0.1, np.float32)
RESETS = np.zeros((T, N), bool)
ROWS = tuple(np.zeros(shape, np.float32) for shape in SPEC.state_shape(N))

ERRORS = [
    ({"resets": RESETS.astype(np.float32)}, TypeError, "resets must be bools of shape (4, 3); got float32"),
    ({"resets": RESETS.T}, ValueError, "resets must be bools of shape (4, 3); got (3, 4)"),
    ({"resets": RESETS[0]}, ValueError, "resets must be bools of shape (4, 3); got (3,)"),
    ({"resets": np.ma.masked_array(RESETS)}, TypeError, "resets must be bools of shape (4, 3); got MaskedArray"),
    ({"resets": [[True], []]}, TypeError, "resets must be bools of shape (4, 3); got [[True], []]"),
    ({"reset_states": ROWS}, ValueError, "reset_states must be None without resets"),
    (
        {"resets": RESETS, "reset_states": ROWS[0]},
        TypeError,
        "reset_states must be a tuple of 2: reset h (1, 3, 5), reset c (1, 3, 5); got ndarray",
    ),
    (
        {"resets": RESETS, "reset_states": (ROWS[0][:, :1], None)},
        ValueError,
        "reset_states: reset h must have shape (1, 3, 5); got (1, 1, 5)",
    ),
    ({"all_states": 1}, TypeError, "all_states must be True or False; got 1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        RNNOp.get(SPEC, "reference").forward(X, PARAMS, **arguments)


def test_errors_of_backward():
    op = RNNOp.get(SPEC, "reference")
    every, _, reserve = op.forward(X, PARAMS, training=True, all_states=True)
    assert [array.shape for array in every] == [(T, N, H), (T, N, H)]
    with pytest.raises(TypeError, match=r"^dy must be None or a tuple of 2: dy, dc; got ndarray$"):
        op.backward(every[0], None, reserve)
    with pytest.raises(ValueError, match=r"^dy: dc must have shape \(4, 3, 5\); got \(3, 5\)$"):
        op.backward((None, every[1][0]), None, reserve)
    with pytest.raises(ValueError, match=r"^grad_req must have keys among x, params, states; got 'reset_states'$"):
        op.backward(None, None, reserve, grad_req={"reset_states": "null"})
    reserve = op.forward(X, PARAMS, training=True, resets=RESETS, reset_states=ROWS)[2]
    with pytest.raises(ValueError, match=r"^out: dreset_states must be given where grad_req is 'add'; got None$"):
        op.backward(None, None, reserve, grad_req={"reset_states": "add"})


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_arguments_may_change_before_backward(lengths):
    """Marks and states are copied; marks may be a list."""
    op = RNNOp.get(SPEC)
    resets, rows = RESETS.copy(), tuple(row + 1 for row in ROWS)
    resets[2] = True
    options = {"training": True, "lengths": lengths, "reset_states": rows}
    _, _, reserve = op.forward(X, PARAMS, resets=resets, **options)
    expected = op.backward(X[..., :1] + np.zeros(H, np.float32), None, reserve)
    _, _, reserve = op.forward(X, PARAMS, resets=resets.tolist(), **options)
    resets[:], rows[0][:] = False, np.nan
    for actual, exact in zip(op.backward(X[..., :1] + np.zeros(H, np.float32), None, reserve), expected, strict=True):
        np.testing.assert_array_equal(actual, exact)


def test_gradients_of_a_state_named_as_the_output():
    op = RNNOp(RNNSpec(cells.lem, 4, 4, residual="identity"))  # states y and z
    x, params = np.ones((3, 2, 4), np.float32), np.zeros(op.spec.layout.size, np.float32)
    outputs, _, reserve = op.forward(x, params, training=True, all_states=True)
    assert len(outputs) == 3
    dx, _, _ = op.backward(tuple(map(np.ones_like, outputs)), None, reserve)
    np.testing.assert_array_equal(dx, np.ones_like(x))  # through the residual connection: all weights are zero
    with pytest.raises(ValueError, match=r"^dy must be None or a tuple of 3: dy, d of state y, dz; got .* of 2$"):
        op.backward(outputs[:2], None, reserve)
