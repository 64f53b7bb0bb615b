"""Derivatives of expressions and of cells against finite differences, and what forward saves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrnn.cell import derivative
from fusedrnn.cell.cells import Cell
from fusedrnn.cell.derivative import differentiate, vjp
from fusedrnn.cell.expr import Leaf, Operation
from fusedrnn.cell.leaves import (
    NewState,
    OperandCotangent,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    Projected,
    Saved,
    State,
    StateCotangent,
)
from fusedrnn.cell.primitives import relu, sigmoid, tanh
from fusedrnn.cell.trace import fuse_gate_sums, trace, traced_cell
from fusedrnn.cell.traversal import evaluate, walk
from fusedrnn.engines.reference.forward import NUMPY
from fusedrnn.spec import MODES
from toy_cells import CELLS, TWO_STAGES
from variants import variant_spec

DTYPE = np.longdouble  # float64 where there is nothing longer
STEP = np.cbrt(np.finfo(DTYPE).eps)
SIZE = 7
LEAVES = [PreX("a"), PreH("a"), State("h")]


def value(roots, values):
    return evaluate(roots, values, NUMPY)


def slopes(roots, cotangents, values):
    """The gradient of sum(cotangent · root) with respect to each leaf, elementwise, by central differences."""
    gradients = {}
    for leaf in values:
        sides = [value(roots, values | {leaf: values[leaf] + sign * STEP}) for sign in (1, -1)]
        terms = (ct * (up - down) for ct, up, down in zip(cotangents, *sides, strict=True))
        gradients[leaf] = sum(terms) / (2 * STEP)
    return gradients


def assert_slopes(actual, expected, size=1.0):
    """The differences' error is STEP² from the third derivative and eps / STEP from rounding: the same size."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=float(100 * STEP**2 * size))


def random_values(rng, leaves):
    """Values away from zero, where relu has no slope."""
    return {leaf: (rng.uniform(0.05, 1.5, SIZE) * rng.choice([-1, 1], SIZE)).astype(DTYPE) for leaf in leaves}


def saved_values(derivative_of_cell, values):
    return {Saved(index): array for index, array in enumerate(value(derivative_of_cell.saved, values))}


def leaves_of(cell):
    kinds = (PreSum,) if cell.accumulates_in_place else (PreX, PreH)
    return [kind(gate) for kind in kinds for gate in cell.gates] + [State(name) for name in cell.states]


def forms(modes=MODES):
    """Every built-in cell, and those whose gate sums can be fused with fused sums too."""
    plain = [(mode, trace(CELLS[mode])) for mode in modes]
    fused = [(f"{mode}-fused", fuse_gate_sums(cell)) for mode, cell in plain if fuse_gate_sums(cell) is not cell]
    return [pytest.param(cell, id=name) for name, cell in plain + fused]


def expressions():
    leaves = st.sampled_from(LEAVES)
    numbers = st.sampled_from([-1.5, 0.0, 0.5, 2.0])
    # The tanh of a product: no slope becomes too large for a difference.
    binary = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: tanh(a * b)}

    def extend(inner):
        ops = st.sampled_from(sorted(binary))
        unary = st.builds(lambda op, a: op(a), st.sampled_from([sigmoid, tanh]), inner)
        of_two = st.builds(lambda op, a, b: binary[op](a, b), ops, inner, inner)
        number_right = st.builds(lambda op, a, b: binary[op](a, b), ops, inner, numbers)
        number_left = st.builds(lambda op, a, b: binary[op](b, a), ops, inner, numbers)
        return unary | of_two | number_right | number_left

    return st.recursive(leaves, extend, max_leaves=12)


@given(first=expressions(), second=expressions(), seed=st.integers(0, 1000))
def test_gradients_of_any_expression(first, second, seed):
    """Two roots, which may share subexpressions."""
    rng = np.random.default_rng(seed)
    roots = [first, tanh(second * first)]
    values = random_values(rng, LEAVES)
    values |= random_values(rng, [StateCotangent("0"), StateCotangent("1")])
    cotangents = vjp(roots, [StateCotangent("0"), StateCotangent("1")])
    used = [node for node in walk(roots) if isinstance(node, Leaf)]
    assert set(cotangents) == set(used)
    inputs = {leaf: values[leaf] for leaf in used}
    expected = slopes(roots, [values[StateCotangent("0")], values[StateCotangent("1")]], inputs)
    actual = dict(zip(cotangents, value(list(cotangents.values()), values), strict=True))
    for leaf in used:
        assert_slopes(actual[leaf] + np.zeros(SIZE), expected[leaf], size=1000)


@pytest.mark.parametrize("root", [relu(PreX("a")), relu(PreX("a") * 3.0 - PreH("a")) * PreX("a")])
def test_gradients_of_relu(root):
    rng = np.random.default_rng(1)
    values = random_values(rng, [node for node in walk([root]) if isinstance(node, Leaf)])
    ct = rng.standard_normal(SIZE).astype(DTYPE)
    expected = slopes([root], [ct], values)
    for leaf, gradient in vjp([root], [StateCotangent("h")]).items():
        assert_slopes(value([gradient], values | {StateCotangent("h"): ct})[0], expected[leaf])


def test_a_leaf_that_is_a_root():
    a = State("h")
    cotangents = vjp([a, a * a], [StateCotangent("0"), StateCotangent("1")])
    values = {State("h"): 3.0, StateCotangent("0"): 10.0, StateCotangent("1"): 1.0}
    assert value([cotangents[State("h")]], values) == [16.0]


def test_an_operation_without_a_derivative():
    with pytest.raises(NotImplementedError, match="the derivative of 'erf'"):
        vjp([Operation("erf", (PreX("a"),))], [StateCotangent("h")])


@pytest.mark.parametrize("cell", forms())
def test_gradients_of_a_cell(cell):
    rng = np.random.default_rng(2)
    values = random_values(rng, leaves_of(cell))
    known = random_values(rng, [StateCotangent(name) for name in cell.states])
    cotangents = vjp(cell.outputs, list(known))
    for leaf, slope in slopes(cell.outputs, known.values(), values).items():
        actual = value([cotangents[leaf]], values | known)[0] if leaf in cotangents else np.zeros(SIZE)
        assert_slopes(actual, slope)


@pytest.mark.parametrize("cell", forms())
def test_the_derivative_of_a_cell(cell):
    """It uses only the states before and after the step, the saved values, and the gradients of the new states."""
    rng = np.random.default_rng(3)
    values = random_values(rng, leaves_of(cell))
    cotangents = random_values(rng, [StateCotangent(name) for name in cell.states])
    expected = slopes(cell.outputs, cotangents.values(), values)
    result = differentiate(cell)
    available = cotangents | {State(name): values[State(name)] for name in cell.states}
    available |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    available |= saved_values(result, values)
    (stage,) = result.stages
    grads = value(stage.distinct_grads, available)
    assert len(set(stage.distinct_grads)) == len(stage.distinct_grads)
    for kind, indices in ((PreX, stage.x_grads), (PreH, stage.h_grads)):
        assert {*stage.x_grads, *stage.h_grads} == set(range(len(grads)))
        for gate, index in zip(cell.gates, indices, strict=True):
            assert_slopes(grads[index], expected[(PreSum if cell.accumulates_in_place else kind)(gate)])
    for name in cell.states:
        gradients = [result.state_grads[name]] if name in result.state_grads else []
        assert_slopes(sum(value(gradients, available), np.zeros(SIZE)), expected[State(name)])


@pytest.mark.parametrize("cell", forms())
def test_recomputed_values_are_those_of_forward(cell):
    rng = np.random.default_rng(4)
    values = random_values(rng, leaves_of(cell))
    result = differentiate(cell)
    available = {State(name): values[State(name)] for name in cell.states}
    available |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    available |= saved_values(result, values)
    forward = value(list(walk(cell.outputs)), values)
    for recomputed in value(result.recomputed, available):
        assert any(np.array_equal(recomputed, node) for node in forward)


def gate_sum(cell, gate):
    """x + h of a gate, as one leaf or as two."""
    return PreSum(gate) if cell.accumulates_in_place else PreX(gate) + PreH(gate)


@pytest.mark.parametrize("cell", forms(["rnn_relu", "rnn_tanh"]))
def test_a_vanilla_cell_saves_only_states(cell):
    result = differentiate(cell)
    assert (result.saved, result.recomputed, result.state_grads) == ((), (), {})
    (stage,) = result.stages
    assert (stage.x_grads, stage.h_grads) == ((0,), (0,))


@pytest.mark.parametrize("cell", forms(["lstm"]))
def test_an_lstm_saves_its_activations(cell):
    result = differentiate(cell)
    activations = {sigmoid(gate_sum(cell, gate)) for gate in "ifo"} | {tanh(gate_sum(cell, "g"))}
    assert len(result.saved) == 4
    assert set(result.saved) == activations
    assert result.recomputed == (tanh(NewState("c")),)
    (stage,) = result.stages
    assert len(stage.distinct_grads) == 4
    assert stage.x_grads == stage.h_grads
    # h reaches the step through the recurrent weights alone.
    assert "h" not in result.state_grads


@pytest.mark.parametrize("cell", forms(["gru"]))
def test_a_gru_saves_the_recurrent_part_of_n(cell):
    result = differentiate(cell)
    r, z = sigmoid(gate_sum(cell, "r")), sigmoid(gate_sum(cell, "z"))
    n = tanh(PreX("n") + r * PreH("n"))
    assert len(result.saved) == 4
    assert set(result.saved) == {r, z, n, PreH("n")}
    (recomputed,) = result.recomputed
    assert recomputed == State("h") - Saved(result.saved.index(n))
    # r and z have one gradient for both weights, n has two.
    (stage,) = result.stages
    assert len(stage.distinct_grads) == 4
    assert stage.x_grads[:2] == stage.h_grads[:2]
    assert stage.x_grads[2] != stage.h_grads[2]


def test_values_cheap_to_recompute_are_not_saved():
    """To recompute both tanh takes too long; the sum of leaves cannot be recomputed."""

    def equations(x, recurrent, s):
        inner = x.a + recurrent(s.h).a
        return tanh(inner) * tanh(inner * 2.0)

    cell = fuse_gate_sums(trace(Cell("two_tanh", ("a",), ("h",), equations)))
    result = differentiate(cell)
    assert len(result.saved) == 2
    assert result.recomputed == ()
    assert derivative.describe(cell.outputs[0]).count("tanh") == 2


@pytest.mark.parametrize("name", ["reset-before", "projection", "lstm-all", "coupled-peepholes", "gru-gate-clip"])
def test_the_derivative_of_several_stages(name):
    """The gradients of each stage's gates, given those of the operands of the later stages."""
    rng = np.random.default_rng(5)
    cell = fuse_gate_sums(traced_cell(variant_spec(name, 4, 4).variant))
    roots = [*cell.outputs, *cell.operands]
    leaves = [node for node in walk(roots) if isinstance(node, Leaf)]
    values = random_values(rng, leaves)
    inputs = [StateCotangent(name) for name in cell.states]
    inputs += [OperandCotangent(number) for number in range(1, len(cell.stages))]
    cotangents = random_values(rng, inputs)
    expected = slopes(roots, cotangents.values(), values)
    result = differentiate(cell)
    available = cotangents | {leaf: values[leaf] for leaf in leaves if isinstance(leaf, (State, ParamVector))}
    available |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    available |= saved_values(result, values)
    for stage, derived in zip(cell.stages, result.stages, strict=True):
        grads = value(derived.distinct_grads, available)
        if stage.projects:
            assert_slopes(grads[0], expected[Projected()])
        for gate, *indices in zip(stage.gates, derived.x_grads, derived.h_grads, strict=False):
            kinds = (PreSum, PreSum) if stage.accumulates_in_place else (PreX, PreH)
            for kind, index in zip(kinds, indices, strict=True):
                assert_slopes(grads[index], expected[kind(gate)])
        for leaf, index in derived.param_grads.items():
            assert_slopes(grads[index], expected[leaf])
    with_gradients = [leaf for derived in result.stages for leaf in derived.param_grads]
    assert sorted(leaf.name for leaf in with_gradients) == sorted(cell.param_vectors)
    assert {State(name) for name in result.state_grads} == {leaf for leaf in expected if isinstance(leaf, State)}
    for name, gradient in result.state_grads.items():
        assert_slopes(value([gradient], available)[0], expected[State(name)])


def test_final_stage():
    projected = differentiate(fuse_gate_sums(traced_cell(variant_spec("projection", 4, 4).variant)))
    assert [projected.final_stage(name) for name in "hc"] == [1, 0]
    reset_before = differentiate(fuse_gate_sums(trace(TWO_STAGES)))
    assert reset_before.final_stage("h") == 0


def test_the_final_stage_is_not_before_the_gradients_of_other_states():
    """That of h needs the gradient of an operand, and reads that of the new c until then."""

    def equations(x, recurrent, s):
        b = x.b + recurrent(sigmoid(x.a + recurrent(s.h).a) * s.h).b
        return tanh(b), s.c + s.h * b

    result = differentiate(fuse_gate_sums(trace(Cell("late", ("a", "b"), ("h", "c"), equations))))
    assert StateCotangent("c") in walk([result.state_grads["h"]])
    assert [result.final_stage(name) for name in "hc"] == [0, 0]


def test_text_of_a_derivative():
    texts = {mode: str(differentiate(fuse_gate_sums(trace(CELLS[mode])))) for mode in MODES}
    assert texts["rnn_tanh"] == texts["rnn_relu"] == "saves no more than the states"
    saved, recomputed = texts["lstm"].split(";")
    assert all(f"sigmoid({gate})" in saved for gate in "ifo")
    assert "tanh(g)" in saved
    assert "tanh(new c)" in recomputed
    saved, recomputed = texts["gru"].split(";")
    assert "h.n" in saved
    assert "sigmoid(x.r + h.r)" in saved
    assert all(recomputed.count(word) for word in ("recomputes", "h", "tanh("))


def test_the_choice_of_saved_values_takes_linear_time():
    """Each of the steps of a solver uses the one before twice, and forward saves none of them."""

    def equations(x, recurrent, s):
        c, u = s.c, tanh(x.a + recurrent(s.c).a)
        for _ in range(60):
            c = c + 0.1 * (u - c)
        return c * c, c + u

    result = differentiate(fuse_gate_sums(trace(Cell("solver", ("a",), ("c",), equations, output="y"))))
    assert len(result.saved) == 2


def test_a_cell_is_differentiated_once():
    cell = trace(CELLS["gru"])
    assert differentiate(cell) is differentiate(cell)
