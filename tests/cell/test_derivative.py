"""Derivatives of expressions and of cells against finite differences, and what forward is told to keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_expr import TWO_STAGES
from variants import variant_spec

from fusedrnn.cell import derivative
from fusedrnn.cell.autodiff import vjp
from fusedrnn.cell.cells import CELLS, Cell
from fusedrnn.cell.derivative import differentiate
from fusedrnn.cell.expr import Leaf, Operation, evaluate, walk
from fusedrnn.cell.leaves import (
    NewState,
    OperandCotangent,
    Peephole,
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
from fusedrnn.engines.reference.forward import NUMPY
from fusedrnn.spec import MODES

DTYPE = np.longdouble  # float64 where there is nothing longer
STEP = np.cbrt(np.finfo(DTYPE).eps)
SIZE = 7
LEAVES = [PreX("a"), PreH("a"), State("h")]


def value(roots, values):
    return evaluate(roots, values, NUMPY)


def slopes(roots, seeds, values):
    """The gradient of sum(seed · root) with respect to each leaf, by central differences, elements being apart."""
    found = {}
    for name in values:
        sides = [value(roots, values | {name: values[name] + sign * STEP}) for sign in (1, -1)]
        found[name] = sum(seed * (up - down) for seed, up, down in zip(seeds, *sides, strict=True)) / (2 * STEP)
    return found


def assert_slopes(actual, expected, size=1.0):
    """The third derivative's part is STEP², rounding's eps / STEP: the same size."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=float(100 * STEP**2 * size))


def random_values(rng, names):
    """Away from zero, where relu has no slope."""
    return {name: (rng.uniform(0.05, 1.5, SIZE) * rng.choice([-1, 1], SIZE)).astype(DTYPE) for name in names}


def leaves_of(cell):
    kinds = (PreSum,) if cell.accumulates_in_place else (PreX, PreH)
    return [kind(gate) for kind in kinds for gate in cell.gates] + [State(name) for name in cell.states]


def forms(modes=MODES):
    """Every built-in cell, and those that merging changes merged too."""
    plain = [(mode, trace(CELLS[mode])) for mode in modes]
    merged = [(f"{mode}-merged", fuse_gate_sums(cell)) for mode, cell in plain if fuse_gate_sums(cell) is not cell]
    return [pytest.param(cell, id=name) for name, cell in plain + merged]


def expressions():
    leaves = st.sampled_from(LEAVES)
    numbers = st.sampled_from([-1.5, 0.0, 0.5, 2.0])
    # Of products the tanh, so that no slope grows beyond what a difference can see.
    two = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: tanh(a * b)}

    def extend(inner):
        one = st.builds(lambda op, a: op(a), st.sampled_from([sigmoid, tanh]), inner)
        both = st.builds(lambda op, a, b: two[op](a, b), st.sampled_from(sorted(two)), inner, inner)
        left = st.builds(lambda op, a, b: two[op](a, b), st.sampled_from(sorted(two)), inner, numbers)
        right = st.builds(lambda op, a, b: two[op](b, a), st.sampled_from(sorted(two)), inner, numbers)
        return one | both | left | right

    return st.recursive(leaves, extend, max_leaves=12)


@given(first=expressions(), second=expressions(), seed=st.integers(0, 1000))
def test_gradients_of_any_expression(first, second, seed):
    """Two roots, which may share parts."""
    rng = np.random.default_rng(seed)
    roots = [first, tanh(second * first)]
    values = random_values(rng, LEAVES)
    values |= random_values(rng, [StateCotangent("0"), StateCotangent("1")])
    found = vjp(roots, [StateCotangent("0"), StateCotangent("1")])
    used = [node for node in walk(roots) if isinstance(node, Leaf)]
    assert set(found) == set(used)
    inputs = {name: values[name] for name in used}
    expected = slopes(roots, [values[StateCotangent("0")], values[StateCotangent("1")]], inputs)
    actual = dict(zip(found, value(list(found.values()), values), strict=True))
    for name in used:
        assert_slopes(actual[name] + np.zeros(SIZE), expected[name], size=1000)


@pytest.mark.parametrize("root", [relu(PreX("a")), relu(PreX("a") * 3.0 - PreH("a")) * PreX("a")])
def test_gradients_of_relu(root):
    rng = np.random.default_rng(1)
    values = random_values(rng, [node for node in walk([root]) if isinstance(node, Leaf)])
    seed = rng.standard_normal(SIZE).astype(DTYPE)
    found = vjp([root], [StateCotangent("h")])
    expected = slopes([root], [seed], values)
    for name, gradient in found.items():
        assert_slopes(value([gradient], values | {StateCotangent("h"): seed})[0], expected[name])


def test_a_leaf_that_is_a_root():
    a = State("h")
    found = vjp([a, a * a], [StateCotangent("0"), StateCotangent("1")])
    values = {State("h"): 3.0, StateCotangent("0"): 10.0, StateCotangent("1"): 1.0}
    assert value([found[State("h")]], values) == [16.0]


def test_an_operation_without_a_derivative():
    with pytest.raises(NotImplementedError, match="the derivative of 'exp'"):
        vjp([Operation("exp", (PreX("a"),))], [StateCotangent("h")])


@pytest.mark.parametrize("cell", forms())
def test_gradients_of_a_cell(cell):
    rng = np.random.default_rng(2)
    values = random_values(rng, leaves_of(cell))
    seeds = random_values(rng, [StateCotangent(name) for name in cell.states])
    found = vjp(cell.outputs, list(seeds))
    expected = slopes(cell.outputs, seeds.values(), values)
    for name, slope in expected.items():
        actual = value([found[name]], values | seeds)[0] if name in found else np.zeros(SIZE)
        assert_slopes(actual, slope)


@pytest.mark.parametrize("cell", forms())
def test_the_derivative_of_a_cell(cell):
    """From no more than the states on both sides, what is kept, and the gradients of the new states."""
    rng = np.random.default_rng(3)
    values = random_values(rng, leaves_of(cell))
    seeds = random_values(rng, [StateCotangent(name) for name in cell.states])
    expected = slopes(cell.outputs, seeds.values(), values)
    found = differentiate(cell)
    at_hand = seeds | {State(name): values[State(name)] for name in cell.states}
    at_hand |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    at_hand |= {Saved(place): kept for place, kept in enumerate(value(found.saved, values))}
    (stage,) = found.stages
    slots = value(stage.distinct_grads, at_hand)
    assert len(set(stage.distinct_grads)) == len(stage.distinct_grads)
    for kind, places in ((PreX, stage.x_grads), (PreH, stage.h_grads)):
        assert {*stage.x_grads, *stage.h_grads} == set(range(len(slots)))
        for gate, place in zip(cell.gates, places, strict=True):
            assert_slopes(slots[place], expected[(PreSum if cell.accumulates_in_place else kind)(gate)])
    for name, gradient in zip(cell.states, found.state_grads, strict=True):
        actual = np.zeros(SIZE) if gradient is None else value([gradient], at_hand)[0]
        assert_slopes(actual, expected[State(name)])


@pytest.mark.parametrize("cell", forms())
def test_what_is_recomputed_is_what_forward_had(cell):
    rng = np.random.default_rng(4)
    values = random_values(rng, leaves_of(cell))
    found = differentiate(cell)
    at_hand = {State(name): values[State(name)] for name in cell.states}
    at_hand |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    at_hand |= {Saved(place): kept for place, kept in enumerate(value(found.saved, values))}
    had = value(list(walk(cell.outputs)), values)
    for again in value(found.recomputed, at_hand):
        assert any(np.array_equal(again, one) for one in had)


def part(cell, gate):
    """x + h of a gate, as one leaf or as two."""
    return PreSum(gate) if cell.accumulates_in_place else PreX(gate) + PreH(gate)


@pytest.mark.parametrize("cell", forms(["rnn_relu", "rnn_tanh"]))
def test_a_vanilla_cell_keeps_nothing_but_states(cell):
    found = differentiate(cell)
    assert (found.saved, found.recomputed, found.state_grads) == ((), (), (None,))
    (stage,) = found.stages
    assert (stage.x_grads, stage.h_grads) == ((0,), (0,))


@pytest.mark.parametrize("cell", forms(["lstm"]))
def test_an_lstm_keeps_its_activations(cell):
    found = differentiate(cell)
    activations = {sigmoid(part(cell, gate)) for gate in "ifo"} | {tanh(part(cell, "g"))}
    assert len(found.saved) == 4
    assert set(found.saved) == activations
    assert found.recomputed == (tanh(NewState("c")),)
    (stage,) = found.stages
    assert len(stage.distinct_grads) == 4
    assert stage.x_grads == stage.h_grads
    # h reaches the step through the recurrent weights alone.
    assert found.state_grads[0] is None


@pytest.mark.parametrize("cell", forms(["gru"]))
def test_a_gru_keeps_the_recurrent_part_of_n(cell):
    found = differentiate(cell)
    r, z = sigmoid(part(cell, "r")), sigmoid(part(cell, "z"))
    n = tanh(PreX("n") + r * PreH("n"))
    assert len(found.saved) == 4
    assert set(found.saved) == {r, z, n, PreH("n")}
    (again,) = found.recomputed
    assert again == State("h") - Saved(found.saved.index(n))
    # r and z have one gradient for both weights, n has two.
    (stage,) = found.stages
    assert len(stage.distinct_grads) == 4
    assert stage.x_grads[:2] == stage.h_grads[:2]
    assert stage.x_grads[2] != stage.h_grads[2]


def test_what_is_cheap_to_compute_again_is_not_kept():
    """At a hundred operations an element is worth its memory; a sum of leaves cannot be had otherwise."""

    def equations(x, recur, s):
        inner = x.a + recur(s.h).a
        return tanh(inner) * tanh(inner * 2.0)

    cell = fuse_gate_sums(trace(Cell("two_tanh", ("a",), ("h",), equations)))
    found = differentiate(cell)
    assert len(found.saved) == 2
    assert found.recomputed == ()
    assert derivative.describe(cell.outputs[0]).count("tanh") == 2


@pytest.mark.parametrize("name", ["reset-before", "projection", "lstm-all", "coupled-peepholes", "gru-gate-clip"])
def test_the_derivative_of_several_stages(name):
    """What reaches each stage's gates, given what reaches the operands of the stages behind it."""
    rng = np.random.default_rng(5)
    cell = fuse_gate_sums(traced_cell(variant_spec(name, 4, 4).variant))
    roots = [*cell.outputs, *cell.operands]
    leaves = [node for node in walk(roots) if isinstance(node, Leaf)]
    values = random_values(rng, leaves)
    names = [StateCotangent(name) for name in cell.states]
    names += [OperandCotangent(number) for number in range(1, len(cell.stages))]
    seeds = random_values(rng, names)
    expected = slopes(roots, seeds.values(), values)
    found = differentiate(cell)
    at_hand = seeds | {one: values[one] for one in leaves if isinstance(one, (State, Peephole))}
    at_hand |= {NewState(n): after for n, after in zip(cell.states, value(cell.outputs, values), strict=True)}
    at_hand |= {Saved(place): kept for place, kept in enumerate(value(found.saved, values))}
    for stage, derived in zip(cell.stages, found.stages, strict=True):
        slots = value(derived.distinct_grads, at_hand)
        if stage.projects:
            assert_slopes(slots[0], expected[Projected()])
        for gate, *places in zip(stage.gates, derived.x_grads, derived.h_grads, strict=False):
            kinds = (PreSum, PreSum) if stage.accumulates_in_place else (PreX, PreH)
            for kind, place in zip(kinds, places, strict=True):
                assert_slopes(slots[place], expected[kind(gate)])
        own = [gate for gate in cell.peepholes if gate in stage.gates]
        for gate, place in zip(own, derived.peephole_grads, strict=True):
            assert_slopes(slots[place], expected[Peephole(gate)])
    for name, gradient in zip(cell.states, found.state_grads, strict=True):
        if gradient is not None:
            assert_slopes(value([gradient], at_hand)[0], expected[State(name)])
        else:
            assert State(name) not in expected


def test_states_are_settled_where_they_can_be():
    projected = differentiate(fuse_gate_sums(traced_cell(variant_spec("projection", 4, 4).variant)))
    assert [projected.final_stage(name) for name in "hc"] == [1, 0]
    reset_before = differentiate(fuse_gate_sums(trace(TWO_STAGES)))
    assert reset_before.final_stage("h") == 0


def test_another_operand_is_refused():
    cell = Cell("of_c", ("a",), ("h", "c"), lambda x, recur, s: (tanh(x.a + recur(s.c).a), s.h))
    with pytest.raises(NotImplementedError):
        differentiate(trace(cell))


def test_in_words():
    texts = {mode: str(differentiate(fuse_gate_sums(trace(CELLS[mode])))) for mode in MODES}
    assert texts["rnn_tanh"] == texts["rnn_relu"] == "saves no more than the states"
    kept, again = texts["lstm"].split(";")
    assert all(f"sigmoid({gate})" in kept for gate in "ifo")
    assert "tanh(g)" in kept
    assert "tanh(new c)" in again
    kept, again = texts["gru"].split(";")
    assert "h.n" in kept
    assert "sigmoid(x.r + h.r)" in kept
    assert all(again.count(word) for word in ("recomputes", "h", "tanh("))


def test_a_cell_is_differentiated_once():
    cell = trace(CELLS["gru"])
    assert differentiate(cell) is differentiate(cell)
