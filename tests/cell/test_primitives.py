"""The table of primitives: every row's derivative and emitter, and that a row and an emitter add an operation."""

import inspect

import numpy as np
import pytest
import torch

from fusedrnn import RNNOp, RNNSpec
from fusedrnn.cell.activations import ACTIVATIONS, Activation, Function
from fusedrnn.cell.derivative import vjp
from fusedrnn.cell.leaves import PreX, StateCotangent
from fusedrnn.cell.primitives import (
    PRIMITIVES,
    ArrayArithmetic,
    absolute,
    clip,
    maximum,
    minimum,
    primitive,
    relu,
    tanh,
    where,
)
from fusedrnn.cell.traversal import evaluate
from fusedrnn.engines.reference.forward import NUMPY
from fusedrnn.jit import builder
from fusedrnn.jit.host import current_target
from fusedrnn.jit.vector import Vectors
from fusedrnn.testing.tolerance import gradient_tolerance, tolerance
from variants import FUNCTIONS

# Arguments away from kinks: x, then bounds and the like.
ARGUMENTS = {
    "clip": (np.array([-2.0, -0.4, 0.3, 2.0]), -0.5, 0.5),
    "clip_nan": (np.array([-2.0, -0.4, 0.3, 2.0]), -0.5, 0.5),
    "log": (np.array([0.3, 0.9, 1.1, 4.0]),),
    "sqrt": (np.array([0.3, 0.9, 1.1, 4.0]),),
    "rsqrt": (np.array([0.3, 0.9, 1.1, 4.0]),),
}


def arguments(row):
    rng = np.random.default_rng(row.arity)
    signs = rng.choice([-1, 1], (row.arity, 4))
    return ARGUMENTS.get(row.name) or tuple(rng.uniform(0.1, 2.0, (row.arity, 4)) * signs)


@pytest.mark.parametrize("row", [row for row in PRIMITIVES.values() if row.vjp], ids=lambda row: row.name)
def test_derivatives_by_finite_differences(row):
    values = arguments(row)
    leaves = [PreX(str(index)) for index in range(row.arity)]
    cotangents = vjp([row(*leaves)], [StateCotangent("h")])
    ct, step = np.array([1.0, -2.0, 3.0, 0.5]), 1e-6
    at = dict(zip(leaves, values, strict=True)) | {StateCotangent("h"): ct}
    for index, leaf in enumerate(leaves):
        if leaf not in cotangents:
            continue
        sides = [row.array(np, *values[:index], values[index] + d, *values[index + 1 :]) for d in (step, -step)]
        (actual,) = evaluate([cotangents[leaf]], at, NUMPY)
        np.testing.assert_allclose(actual, ct * (sides[0] - sides[1]) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("row", PRIMITIVES.values(), ids=lambda row: row.name)
def test_every_row_has_an_emitter(row):
    vectors = Vectors(builder.Function(builder.Module("emitters"), "emitters", []), current_target(), "float32")
    assert len(inspect.signature(getattr(vectors, row.name)).parameters) == row.arity
    assert len(inspect.signature(row.array).parameters) == row.arity + 1


def test_the_number_of_arguments_is_checked():
    with pytest.raises(TypeError, match="clip takes 3 arguments; got 1"):
        PRIMITIVES["clip"](PreX("a"))


def test_an_operation_of_numbers_is_refused():
    with pytest.raises(TypeError, match=r"tanh takes an expression; got 0\.5: for numbers use the module math"):
        tanh(0.5)


KINKS = {
    "abs": (absolute, torch.abs),
    "relu": (relu, torch.relu),
    "maximum": (lambda a: maximum(a, 1.0 - a * 2.0), lambda a: torch.maximum(a, 1.0 - a * 2.0)),
    "minimum": (lambda a: minimum(1.0 - a * 2.0, a), lambda a: torch.minimum(1.0 - a * 2.0, a)),
    "clip": (lambda a: clip(a, 0.0, 0.5), lambda a: torch.clamp(a, 0.0, 0.5)),
    "where <": (lambda a: where(a < 0.0, a * a, 3.0 * a), lambda a: torch.where(a < 0, a * a, 3.0 * a)),
    "where >=": (lambda a: where(a >= 0.5, 1.0, a), lambda a: torch.where(a >= 0.5, 1.0, a)),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_those_of_torch(name):
    """Values and derivatives at and beside 0, 0.5 and a tie at 1/3, and at infinity."""
    ours, theirs = KINKS[name]
    a = torch.tensor([0.0, -0.0, 1 / 3, 0.5, 0.2, -0.2, 3.0, np.inf, -np.inf], dtype=torch.float64, requires_grad=True)
    expected = theirs(a)
    expected.sum().backward()
    root = ours(PreX("a"))
    values = {PreX("a"): a.detach().numpy(), StateCotangent("h"): np.ones(len(a))}
    (actual,) = evaluate([root], values, NUMPY)
    np.testing.assert_array_equal(actual, expected.detach().numpy())
    with np.errstate(invalid="ignore"):
        (gradient,) = evaluate(list(vjp([root], [StateCotangent("h")]).values()), values, NUMPY)
    np.testing.assert_array_equal(gradient, a.grad.numpy())


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "thresholded_relu", "hard_sigmoid", "elu"])
def test_kinks_of_activations_are_those_of_torch(name):
    """Values and derivatives at and beside 0 and the bounds of the hard sigmoid."""
    activation = Activation(name, *(0.5,) * (name != "relu"), *(0.5,) * (name == "hard_sigmoid"))
    a = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0], dtype=torch.float64, requires_grad=True)
    expected = FUNCTIONS[name](a, 0.5, 0.5)
    expected.sum().backward()
    root = activation(PreX("a"))
    values = {PreX("a"): a.detach().numpy(), StateCotangent("h"): np.ones(len(a))}
    for roots, wanted in (([root], expected.detach()), (vjp([root], [StateCotangent("h")]).values(), a.grad)):
        np.testing.assert_allclose(evaluate([*roots], values, NUMPY)[0], wanted.numpy(), rtol=1e-14)


@pytest.fixture
def exp(monkeypatch):
    """A new operation: one row, one emitter."""
    monkeypatch.setattr(Vectors, "new_exp", lambda v, x: v.expm1(x) + 1.0, raising=False)
    yield primitive("new_exp", 1, lambda xp, x: xp.exp(x), lambda ct, y, x: (ct * y,), flops=41, instructions=25)
    del PRIMITIVES["new_exp"]


@pytest.fixture
def activation(exp, monkeypatch):
    """An activation that uses it."""
    function = Function(lambda x, alpha, beta: tanh(x) * exp(0.0 - absolute(x)))
    monkeypatch.setitem(ACTIVATIONS, "decaying_tanh", function)
    return "decaying_tanh"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_and_an_emitter_add_an_operation(activation, dtype):
    """The engines agree on outputs and gradients of a cell that uses the new operation."""
    spec = RNNSpec("lstm", 5, 9, 2, True, activations=("sigmoid", activation, "tanh"), dtype=dtype)
    rng = np.random.default_rng(1)
    T, N = 6, 3
    x = rng.standard_normal((T, N, spec.input_size)).astype(dtype)
    params = rng.uniform(-0.5, 0.5, spec.layout.size).astype(dtype)
    dy = rng.standard_normal((T, N, spec.output_size)).astype(dtype)
    results = []
    for engine in ("cpu", "reference"):
        op = RNNOp(spec, backend=engine)
        y, states, reserve = op.forward(x, params, None, training=True)
        dx, dparams, dstates = op.backward(dy, None, reserve)
        results.append({"y": y, "h_n": states[0], "c_n": states[1], "dx": dx, "dparams": dparams, "dh0": dstates[0]})
    actual, expected = results
    for name, value in expected.items():
        scale = float(np.abs(value).max())
        of = gradient_tolerance(dtype, spec, T, N, scale) if name[0] == "d" else tolerance(dtype, 20, scale)
        np.testing.assert_allclose(actual[name], value, rtol=of[0], atol=of[1], err_msg=name)


def test_a_row_works_on_tensors(exp):
    a = torch.linspace(-1.0, 1.0, 5)
    (actual,) = evaluate([exp(PreX("a"))], {PreX("a"): a}, ArrayArithmetic(torch, {}))
    assert torch.equal(actual, torch.exp(a))
