"""NetworkOp against one RNNOp after the other, and its errors."""

import copy
import pickle
import re

import numpy as np
import pytest

from fusedrnn import NetworkOp, NetworkSpec, RNNOp, RNNSpec, init_params
from fusedrnn.engines import registry
from fusedrnn.engines.interface import Capabilities
from fusedrnn.engines.reference.engine import ReferenceEngine
from networks import NETWORKS, assert_same, chained, flat, make_network_problem, run

T, N = 4, 3
SPEC = NetworkSpec.stack("lstm", 2, (5, 3))
X = np.ones((T, N, 2), np.float32)
PARAMS = np.full(SPEC.layout.size, 0.1, np.float32)
STATES = tuple(tuple(np.zeros(shape, np.float32) for shape in layer) for layer in SPEC.state_shape(N))
OPTIONS = [(), ("lengths",), ("resets", "reset_states"), ("lengths", "resets", "all_states", "reserve")]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_reference(name, options):
    """Layer after layer on an engine that takes one layer at a time."""
    problem = make_network_problem(NETWORKS[name], 5, 3, options)
    op = NetworkOp.get(problem.spec, "reference")
    assert_same(run(op, problem, training=False), chained(problem, "reference", training=False))
    assert_same(run(op, problem), chained(problem, "reference"))


ERRORS = [
    ({"x": X[..., :1]}, ValueError, "x must have shape (T, N, 2); got (4, 3, 1)"),
    ({"params": PARAMS[1:]}, ValueError, "params must have shape (300,), as the network's layout has it; got (299,)"),
    ({"params": PARAMS.astype("d")}, TypeError,
     "params must have dtype float32; got float64: convert it with astype, or use a spec of dtype='float64'"),
    ({"states": STATES[0]}, TypeError, "states[0] must be a tuple of 2: h0 (1, 3, 5), c0 (1, 3, 5); got ndarray"),
    ({"states": STATES[:1]}, ValueError,
     "states must be None or a tuple of 2: states[0], states[1]; got a sequence of 1"),
    ({"states": X}, TypeError, "states must be None or a tuple of 2: states[0], states[1]; got ndarray"),
    ({"states": (None, STATES[0])}, ValueError, "states[1]: h0 must have shape (1, 3, 3); got (1, 3, 5)"),
    ({"lengths": [5, 1, 1]}, ValueError, "lengths must be from 0 to 4, the steps of x; got 1 to 5"),
    ({"reset_states": STATES}, ValueError, "reset_states must be None without resets"),
    (
        {"resets": np.zeros((T, N), bool), "reset_states": (None, STATES[0])},
        ValueError,
        "reset_states[1]: reset h must have shape (1, 3, 3); got (1, 3, 5)",
    ),
    ({"training": 1}, TypeError, "training must be True or False; got 1"),
    ({"reserve": "all"}, ValueError, "reserve must be one of gates, states; got 'all'"),
    ({"seed": -1}, ValueError, "seed must be from 0 to 2**64 - 1; got -1"),
    ({"out": X}, ValueError, "out must have shape (4, 3, 3); got (4, 3, 2)"),
    ({"out": np.lib.stride_tricks.as_strided(STATES[1][0], (T, N, 3), (0, 12, 4))}, ValueError,
     "out must have its last axis contiguous and no shared rows; got strides (0, 12, 4)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        NetworkOp.get(SPEC).forward(**{"x": X, "params": PARAMS, **changes})


def test_out_must_share_no_memory():
    """With the initial states of any layer, too."""
    whole = np.zeros((T, N, 3), np.float32)
    states = None, (whole[:1], None)
    with pytest.raises(ValueError, match=r"^out must not share memory with states$"):
        NetworkOp.get(SPEC).forward(X, PARAMS, states, out=whole)


def dstates_with(value):
    return (*STATES[:1], value)


BACKWARD_ERRORS = [
    ({"dy": X}, ValueError, "dy must have shape (4, 3, 3); got (4, 3, 2)"),
    (
        {"dstates": dstates_with((X, None))},
        ValueError,
        "dstates[1]: dh_n must have shape (1, 3, 3); got (4, 3, 2)",
    ),
    ({"grad_req": "keep"}, ValueError, "grad_req must be one of write, add, null; got 'keep'"),
    (
        {"grad_req": {"states": "add"}},
        ValueError,
        "out: dstates must be given where grad_req is 'add'; got None",
    ),
    (
        {"out": (None, None, STATES[:1])},
        ValueError,
        "out: dstates must be a tuple of 2: dstates[0], dstates[1]; got a sequence of 1",
    ),
    (
        {"out": (None, None, dstates_with((X, X)))},
        ValueError,
        "out: dstates[1]: dh0 must have shape (1, 3, 3); got (4, 3, 2)",
    ),
    (
        {"out": (None, None, (STATES[0][:1] * 2, STATES[1]))},
        ValueError,
        "out: dstates[0]: dc0 must not share memory with out: dstates[0]: dh0",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BACKWARD_ERRORS)
def test_errors_of_backward(changes, error, message):
    op = NetworkOp.get(SPEC)
    reserve = op.forward(X, PARAMS, training=True)[2]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        op.backward(**{"dy": None, "dstates": None, "reserve": reserve, **changes})


def test_errors_of_the_op():
    with pytest.raises(TypeError, match=r"^spec must be a NetworkSpec; got RNNSpec$"):
        NetworkOp(SPEC.layers[0])
    with pytest.raises(ValueError, match=r"^backend must be one of "):
        NetworkOp(SPEC, "gpu")
    with pytest.raises(TypeError, match=r"^backend must be "):
        NetworkOp.get(SPEC, [])
    with pytest.raises(TypeError, match=r"^reserve must be one of "):
        [NetworkOp.get(SPEC).forward(X, PARAMS, reserve=np.array(["gates"])) for _ in range(3)]
    peephole = NetworkSpec([RNNSpec("gru", 2, 5), RNNSpec("lstm", 5, 3, peepholes=True)])
    registry.register("plain", ReferenceEngine, Capabilities(), order=2000, automatic=False)
    try:
        with pytest.raises(NotImplementedError, match=r"^layers\[1\]: peepholes is not supported by engine 'pl"):
            NetworkOp(peephole, "plain")
    finally:
        registry.unregister("plain")
    int8 = NetworkSpec([SPEC.layers[0], RNNSpec("gru", 5, 3, compute="int8_weights")])
    op = NetworkOp(int8)
    params, first = init_params(int8), SPEC.layers[0]
    with pytest.raises(NotImplementedError, match=r"^layers\[1\]: training with compute='int8_weights' is not supp"):
        op.forward(X, params, training=True)
    with pytest.raises(TypeError, match=r"^params must be a NumPy array, which compute= of .*; got QuantizedParams$"):
        op.forward(X, RNNOp(int8.layers[1]).quantize(params[-int8.layers[1].layout.size :]))
    with pytest.raises(ValueError, match=r"^reserve must come from an op of NetworkSpec"):
        NetworkOp(SPEC).backward(None, None, RNNOp(first).forward(X, params[: first.layout.size], training=True)[2])
    with pytest.raises(TypeError, match=r"^reserve must be what forward returned with training=True; got None$"):
        NetworkOp(SPEC).backward(None, None, None)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [(), ("lengths", "resets", "reset_states")], ids=["plain", "options"])
def test_grad_req(backend, options):
    """Gradients are added or left out, for all layers alike; states may be given for some layers only."""
    problem = make_network_problem(NETWORKS["cells"], 5, 3, options)
    op = NetworkOp.get(problem.spec, backend)
    written = run(op, problem)[2]
    begun = [np.full_like(array, 0.5) for array in flat(written)]
    buffers = pack_like(written, iter(begun))
    added = run(op, problem, grad_req="add", out=buffers)[2]
    for one, other, buffer in zip(flat(added), flat(written), begun, strict=True):
        assert one is buffer
        np.testing.assert_allclose(one, other + np.float32(0.5), rtol=1e-5, atol=1e-5)
    dx, dparams, dstates, *_ = run(op, problem, grad_req={"params": "null"})[2]
    assert dparams is None
    assert_same((dx, dstates), (written[0], written[2]))
    assert not any(flat(run(op, problem, grad_req="null")[2]))


def pack_like(results, arrays):
    if isinstance(results, tuple):
        return tuple(pack_like(entry, arrays) for entry in results)
    return next(arrays)


def test_the_op_as_an_object():
    op = NetworkOp.get(SPEC)
    assert NetworkOp.get(SPEC) is op and op.backend == "cpu" and repr(op).startswith("NetworkOp(NetworkSpec(")
    for other in (copy.copy(op), pickle.loads(pickle.dumps(op))):
        assert other.spec == SPEC and other.backend == "cpu"
    assert op.compile(True) is op
    reserve = op.forward(X, PARAMS, training=True)[2]
    assert reserve.nbytes == op.reserve_size(T, N) and reserve.spec is SPEC and reserve.seed == 0
    assert NetworkOp(SPEC, "reference").reserve_size(T, N) > 0


def test_states_of_some_layers():
    op = NetworkOp.get(SPEC)
    given = tuple(state + np.float32(0.5) for state in STATES[1])
    expected = op.forward(X, PARAMS, (STATES[0], given))[:2]
    assert_same(op.forward(X, PARAMS, (None, given))[:2], expected)
    assert_same(op.forward(X, PARAMS, [(None, None), list(given)])[:2], expected)


def test_each_call_draws_a_new_seed():
    op = NetworkOp.get(NETWORKS["drops"])
    x, params = np.ones((T, N, 7), np.float32), init_params(op.spec, np.random.default_rng(0))
    (one, _, first), (other, _, second) = (op.forward(x, params, training=True) for _ in range(2))
    assert first.seed != second.seed and not np.array_equal(one, other)
    np.testing.assert_array_equal(op.forward(x, params, training=True, seed=first.seed)[0], one)
