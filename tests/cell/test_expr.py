"""Tracing a cell, fusing the sums of its pre-activations, evaluating it."""

from collections import Counter

import numpy as np
import pytest

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.expr import Constant, Leaf, as_expr
from fusedrnn.cell.leaves import PreH, PreSum, PreX, State
from fusedrnn.cell.primitives import ArrayArithmetic, relu, sigmoid, tanh
from fusedrnn.cell.trace import Stage, fuse_gate_sums, trace
from fusedrnn.cell.traversal import evaluate, substitute, walk
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import MODES
from toy_cells import CELLS, TWO_STAGES


def leaves(*roots):
    return {node for node in walk(roots) if isinstance(node, Leaf)}


@pytest.mark.parametrize("mode", MODES)
def test_trace_of_a_built_in_cell(mode):
    cell = CELLS[mode]
    traced = trace(cell)
    assert (traced.gates, traced.states) == (cell.gates, cell.states)
    assert traced.stages == (Stage(State("h"), cell.gates),)
    assert len(traced.outputs) == len(cell.states)
    assert leaves(*traced.outputs) >= {kind(gate) for kind in (PreX, PreH) for gate in cell.gates}
    assert not traced.accumulates_in_place
    assert trace(cell) is traced


@pytest.mark.parametrize("mode", MODES)
def test_only_the_gru_has_no_sums_to_fuse(mode):
    traced = trace(CELLS[mode])
    fused = fuse_gate_sums(traced)
    if mode == "gru":
        assert fused == traced and not fused.accumulates_in_place
    else:
        assert fused.accumulates_in_place
        states = {State(name) for name in traced.states if name == "c"}
        assert leaves(*fused.outputs) == {PreSum(gate) for gate in traced.gates} | states


@pytest.mark.parametrize("cell", [*CELLS.values(), TWO_STAGES], ids=lambda cell: cell.name)
def test_fusing_sums_does_not_change_the_value(cell):
    rng = np.random.default_rng(1)
    traced = trace(cell)
    values = {kind(name): rng.standard_normal(5) for kind in (PreX, PreH) for name in cell.gates}
    values |= {State(name): rng.standard_normal(5) for name in cell.states}
    sums = {PreSum(gate): values[PreX(gate)] + values[PreH(gate)] for gate in cell.gates}
    fused = fuse_gate_sums(traced)
    on = reference.NUMPY
    before = evaluate([*traced.outputs, *(stage.operand for stage in traced.stages)], values, on)
    after = evaluate([*fused.outputs, *(stage.operand for stage in fused.stages)], values | sums, on)
    np.testing.assert_array_equal(after, before)


def test_a_summand_with_another_use_is_not_fused():
    traced = trace(Cell("peeping", ("a",), ("h",), lambda x, recurrent, s: tanh(x.a + recurrent(s.h).a) + x.a))
    assert fuse_gate_sums(traced) is traced


def test_a_summand_that_an_operand_uses_is_not_fused():
    """The first stage's h.a is multiplied by itself; the second's b is only ever added."""
    traced = trace(Cell("relay", ("a", "b"), ("h",), lambda x, recurrent, s: x.b + recurrent(recurrent(s.h).a).b))
    fused = fuse_gate_sums(traced)
    assert [stage.accumulates_in_place for stage in fused.stages] == [False, True]
    assert not fused.accumulates_in_place
    assert fused.outputs == (PreSum("b"),)
    assert fused.stages[1].operand == PreH("a")


def test_two_stages():
    traced = trace(TWO_STAGES)
    r = sigmoid(PreX("r") + PreH("r"))
    assert traced.stages == (Stage(State("h"), ("r", "z")), Stage(r * State("h"), ("n",)))
    fused = fuse_gate_sums(traced)
    assert fused.accumulates_in_place
    operand = sigmoid(PreSum("r")) * State("h")
    assert fused.stages == (
        Stage(State("h"), ("r", "z"), accumulates_in_place=True),
        Stage(operand, ("n",), accumulates_in_place=True),
    )


def test_two_stages_evaluate():
    rng = np.random.default_rng(2)
    N, H = 3, 4
    x = rng.standard_normal((N, 3 * H))
    h = rng.standard_normal((N, H))
    weight = rng.standard_normal((3 * H, H))
    bias = rng.standard_normal(3 * H)

    def logistic(a):
        return 1 / (1 + np.exp(-a))

    r = logistic(x[:, :H] + h @ weight[:H].T + bias[:H])
    z = logistic(x[:, H : 2 * H] + h @ weight[H : 2 * H].T + bias[H : 2 * H])
    n = np.tanh(x[:, 2 * H :] + (r * h) @ weight[2 * H :].T + bias[2 * H :])
    _, (actual,) = reference.step(trace(TWO_STAGES), x, (h,), {"h2h_weight": weight, "h2h_bias": bias})
    np.testing.assert_allclose(actual, (1 - z) * n + z * h, rtol=1e-13, atol=1e-13)


class Counting:
    """The arithmetic of NumPy, which counts the operations."""

    def __init__(self):
        self.calls = Counter()

    def const(self, value):
        self.calls["const"] += 1
        return reference.NUMPY.const(value)

    def apply(self, op, *args):
        self.calls[op] += 1
        return reference.NUMPY.apply(op, *args)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("rnn_relu", {"add": 1, "relu": 1}),
        ("lstm", {"add": 5, "mul": 3, "sigmoid": 3, "tanh": 2}),
        ("gru", {"add": 4, "mul": 2, "sub": 1, "sigmoid": 2, "tanh": 1}),
    ],
)
def test_each_node_is_computed_once(mode, expected):
    traced, on = trace(CELLS[mode]), Counting()
    evaluate(traced.outputs, lambda name: np.float64(0.5), on)
    assert on.calls == expected


def test_equal_subexpressions_are_computed_once():
    a, on = PreX("a"), Counting()
    roots = [tanh(a + 1) * tanh(a + 1), tanh(a + 1)]
    product, single = evaluate(roots, {PreX("a"): 0.25}, on)
    assert (single, product) == (np.tanh(1.25), np.tanh(1.25) ** 2)
    assert on.calls == {"const": 1, "add": 1, "tanh": 1, "mul": 1}


def test_a_deep_chain_of_shared_nodes_takes_linear_time():
    on = Counting()
    assert evaluate([nested_sums(60)], {PreX("a"): 1.0}, on) == [2.0**60]
    assert on.calls == {"add": 60}


def test_a_power_squares():
    on = Counting()
    assert evaluate([PreX("a") ** 1000], {PreX("a"): 2.0}, on) == [2.0**1000]
    assert on.calls["mul"] < 20


def test_numbers_on_either_side():
    a = PreX("a")
    values = evaluate([a + 2, 2 + a, a - 2, 2 - a, a * 3, 3 * a, relu(-1 * a)], {PreX("a"): 5.0}, Counting())
    assert values == [7.0, 7.0, 3.0, -3.0, 15.0, 15.0, 0.0]
    assert as_expr(2) == Constant(2.0)
    assert as_expr(a) is a


def test_zeros_of_different_sign():
    """They are different numbers: 1 / 0.0 is not 1 / -0.0."""
    a, on = PreX("a"), ArrayArithmetic(np, {})
    positive, negative = a * 0.0, a * -0.0
    assert as_expr(0.0) == Constant(0.0) != as_expr(-0.0) and positive != negative
    assert len({positive, negative}) == 2
    for root in (positive, negative) * 2:
        (value,) = evaluate([root], {a: np.float64(1.0)}, on)
        assert np.signbit(value) == (root is negative)


def test_walk_visits_arguments_first_and_each_node_once():
    traced = trace(CELLS["lstm"])
    order = list(walk(traced.outputs))
    assert len(order) == len(set(order))
    position = {node: index for index, node in enumerate(order)}
    assert all(position[arg] < position[node] for node in order for arg in node.args)


def test_substitute_takes_the_outermost_match():
    a, b = PreX("a"), PreX("b")
    changes = {a + b: b, a: b}
    assert substitute([tanh(a + b), tanh(a)], changes.get) == [tanh(b), tanh(b)]


def test_an_unknown_gate():
    with pytest.raises(AttributeError, match="the cell has no gate 'q'; its gates are a"):
        trace(Cell("wrong", ("a",), ("h",), lambda x, recurrent, s: x.q))


def test_a_gate_from_two_stages():
    def equations(x, recurrent, s):
        return recurrent(s.h).a + recurrent(recurrent(s.h).b).a

    with pytest.raises(ValueError, match="gate 'a' takes part in more than one recurrent product"):
        trace(Cell("twice", ("a", "b"), ("h",), equations))


def nested_sums(depth, leaf="a"):
    node = PreX(leaf)
    for _ in range(depth):
        node = node + node
    return node


def test_comparing_shared_nodes_takes_linear_time():
    """Equal nodes that are not the same ones, which a cell defined twice has; the number of paths is 2⁶⁰."""
    assert nested_sums(60) == nested_sums(60)
    assert nested_sums(60) != nested_sums(60, "b") and nested_sums(60) != nested_sums(59)
    assert tanh(PreX("a")) != relu(PreX("a")) and tanh(PreX("a")) != PreX("a") and PreX("a") != tanh(PreX("a"))


def test_nodes_with_equal_hashes_may_differ():
    one, other = tanh(PreX("a")), tanh(PreX("b"))
    vars(other)["_hash"] = hash(one)
    assert one != other and len({one, other}) == 2
