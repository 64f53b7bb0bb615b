"""The language of cells: what can be a cell, what cannot and how the error says to write it, names, identity, text."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial, reduce

import numpy as np
import pytest

from fusedrnn import NetworkSpec, RNNOp, RNNSpec, cells, init_params
from fusedrnn.cell import (
    cell,
    chrono,
    clip,
    dropout,
    exp,
    log,
    mask,
    maximum,
    mean,
    relu,
    sigmoid,
    sqrt,
    tanh,
    where,
    zoneout,
)
from fusedrnn.cell.number_arithmetic import NUMBERS
from fusedrnn.cell.trace import traced_cell
from fusedrnn.cell.traversal import evaluate


@cell(gates="f n", states="h c", vectors="beta", scalars="tau")
def sample(x, recurrent, s, p):
    """A cell with one of everything."""
    h = recurrent(s.h)
    c = s.c * sigmoid(x.f + h.f) + p.beta * tanh(x.n + h.n)
    return p.tau * where(c > 0.5, c, abs(c) / (2.0 - clip(c, -1, 1))), c


def of(equations, **options):
    return cell(**{"gates": "a", "name": "wrong", **options})(equations)


@pytest.mark.parametrize(
    ("equations", "error", "message"),
    [
        (lambda x, u, s: x.a if u(s.h).a > 0 else s.h, TypeError, r"write where\(a < b, value, other\), maximum"),
        (lambda x, u, s: x.a if u(s.h).a else s.h, TypeError, r"write where\(a < b, value, other\)"),
        (lambda x, u, s: x.a if s.h == 0 else u(s.h).a, TypeError, r"by == or !=; got 0: write where\(a <= b"),
        (lambda x, u, s: x.a if u(s.h).a * 2 != 1.5 else s.h, TypeError, "by == or !=; got 1.5: write where"),
        (lambda x, u, s: x.a if u(s.h).a in (np.float32(1), 2) else s.h, TypeError, "by == or !=; got .*1"),
        (lambda x, u, s: (x.a + u(s.h).a) ** True, TypeError, "an exponent must be an integer of at least 1; got True"),
        (lambda x, u, s: max(x.a, u(s.h).a), TypeError, r"maximum\(a, b\)"),
        (lambda x, u, s: sum(u(s.h).a), TypeError, "written for all units at once.*cannot be iterated"),
        (lambda x, u, s: u(s.h).a[0], TypeError, "written for all units at once.*has no index"),
        (lambda x, u, s: math.tanh(x.a), TypeError, "use the functions of fusedrnn.cell, not those of math"),
        (lambda x, u, s: np.tanh(x.a), TypeError, "use the functions of fusedrnn.cell, not NumPy's"),
        (lambda x, u, s: int(x.a), TypeError, "an expression is no number"),
        (lambda x, u, s: setattr(s, "h", x.a), AttributeError, "'h' cannot be assigned to: return the new states"),
        (lambda x, u, s: [x.a], TypeError, "must return the new states h, in this order, as a tuple; they return a l"),
        (lambda x, u, s: u().a, TypeError, "recurrent takes one expression, such as s.h; got 0"),
        (lambda x, u, s: x(s.h), TypeError, r"are attributes, such as x.a; recurrent\(...\) alone is called"),
        (lambda x, u, s: x["a"], TypeError, r"write .a instead of \['a'\]"),
        (lambda x, u, s: len(x.a), TypeError, "has no length"),
        (lambda x, u, s: 2 ** x.a, TypeError, r"write exp\(a \* log\(2\)\)"),
        (lambda x, u, s: x.a // 2, TypeError, "its arithmetic is"),
        (lambda x, u, s: u.a, AttributeError, r"write recurrent\(s.h\).a"),
        (lambda x, u: x.a, TypeError, r"a function of \(x, recurrent, s\): p is for"),
        (lambda x, u, s: where((x.a < 0) & (s.h < 0), x.a, s.h), TypeError, "comparisons cannot be combined"),
        (lambda x, u, s: where(s.h == 0, x.a, s.h), TypeError, "by == or !=; got 0: write where"),
        (lambda x, u, s: x.a * 10**400, ValueError, "a number is too large for a float"),
        (lambda x, u, s: reduce(lambda e, _: tanh(e), range(5000), x.a), ValueError, "nested too deeply"),
        (lambda x, u, s: tanh(x), TypeError, "expected an expression or a number; got x: write x.a"),
        (lambda x, u, s: where(x.a, s.h, 0.0), TypeError, "where takes a comparison"),
        (lambda x, u, s: u(s.h).a ** 0.5, TypeError, "an exponent must be an integer of at least 1; got 0.5"),
        (lambda x, u, s: clip(x.a, 1, 0), ValueError, "low must not exceed high; got 1.0 and 0.0"),
        (lambda x, u, s: None, TypeError, "must return the new states h, in this order, each an expression; got None"),
        (lambda x, u, s: 1.0, TypeError, "each an expression; got 1.0"),
        (lambda x, u, s: (x.a, u(s.h).a), ValueError, "must return the new states h, in this order; they return 2"),
        (lambda x, u, s: x.b + u(s.h).a, AttributeError, "the cell has no gate 'b'; its gates are a"),
        (lambda x, u, s: x.a + u(s.c).a, AttributeError, "the cell has no state 'c'; its states are h"),
        (lambda x, u, s: x.a + u.project(s.h), ValueError, r"recurrent\(s.h\)|recurrent.project"),
        (lambda x, u, s: x.a + 0.0 * (u(s.h) is None), ValueError, "no gate takes recurrent product 1"),
        (lambda x, u, s: u(s.h).a * s.h, ValueError, "it reads nothing of the input: write x.a, or x.raw for"),
        (lambda x, u, s: tanh(s.h), ValueError, "gate 'a' has no effect: take it from the input, x.a, or from a pro"),
        (lambda x, u, s: x.a + u(u(s.h).a).a, ValueError, "than one recurrent product, of s.h and of recurrent"),
        (lambda x, u, s: x.a + u(s.h).a - mean(), TypeError, "mean takes at least one expression; got none"),
        (lambda x, u, s: x.a + u(s.h).a - mean(x.a, 1.0), TypeError, "mean takes expressions; got 1.0"),
        (lambda x, u, s: x.a + where(u(s.h).a < 0, s.h, 0.0), ValueError, "through comparisons alone"),
        (lambda x, u, s: (x.a + u(s.h).a) * mask("m", 0), ValueError, "keep must be a probability above 0; got 0.0"),
        (lambda x, u, s: (x.a + u(s.h).a) * mask(1, 0.5), TypeError, "a mask needs a name, such as 'h'; got 1"),
        (lambda x, u, s: dropout("m", x.a + u(s.h).a, 1.0), ValueError, r"a probability in \[0, 1\); got 1.0"),
        (lambda x, u, s: zoneout("m", s.h, x.a + u(s.h).a, -1), ValueError, r"a probability in \[0, 1\); got -1.0"),
        (
            lambda x, u, s: mask("m", 0.5) * x.a + mask("m", 0.6) * u(s.h).a,
            ValueError,
            "two masks have the name 'm'",
        ),
    ],
)
def test_what_cannot_be_a_cell(equations, error, message):
    with pytest.raises(error, match=rf"^cell wrong: .*(?:{message})"):
        of(equations)


INTERNAL_NAMES = (
    "Pre", "State", "Operation", "Condition", "Constant", "Mask(", "Param", "Leaves", "Leaf", "Recurrent", "Primitive",
    "RawInput", "object at 0x",
)  # fmt: skip


@pytest.mark.parametrize(
    ("equations", "message"),
    [
        (lambda x, u, s, p: x.a + (s.h < x.a), "a comparison, no number: write where(s.h < x.a, 1.0, 0.0)"),
        (lambda x, u, s, p: 1 - (s.h >= 0), "0 <= s.h is a comparison, no number: write where(0 <= s.h, 1.0, 0.0)"),
        (lambda x, u, s, p: abs(s.h < 0) * x.a, "s.h < 0 is a comparison, no number: write where(s.h < 0, 1.0, 0.0)"),
        (lambda x, u, s, p: clip(x.a, -p.beta, 1), "low must be a number; got -p.beta"),
        (lambda x, u, s, p: where(x.a - s.h * 2, s.h, 0.0), "where(a < b, value, other); got x.a - s.h * 2"),
        (
            lambda x, u, s, p: where(tanh(sigmoid(relu(x.a * (s.h + 1)))), s.h, 0.0),
            "where(a < b, value, other); got tanh(sigmoid(relu((...))))",
        ),
        (lambda x, u, s, p: x.a**s.h, "an exponent must be an integer of at least 1; got s.h: write sqrt(x), 1 / x"),
        (lambda x, u, s, p: u((s.h, x.raw)).a, "expected an expression or a number; got (s.h, x.raw)"),
        (lambda x, u, s, p: u(s.h) + x.a, "expression or a number; got recurrent(...): write recurrent(...).a"),
        (lambda x, u, s, p: x.a * p, "expected an expression or a number; got p: write p.beta"),
        (lambda x, u, s, p: tanh(u), "expected an expression or a number; got recurrent: write recurrent(s.h).a"),
        (lambda x, u, s, p: u(operand=s.h).a, "recurrent takes its expression by position; got operand= by name"),
        (lambda x, u, s, p: maximum(x.a, b=s.h), "maximum takes its arguments by position; got b= by name"),
        (lambda x, u, s, p: tanh(x.a, s.h), "tanh takes 1 argument; got 2"),
        (lambda x, u, s, p: x.a + "1", "expected an expression or a number; got '1'"),
        (lambda x, u, s, p: s.h(1), "s.h is an expression, which cannot be called"),
        (lambda x, u, s, p: (x.a + u(s.h).a).T, "x.a + recurrent(...).a is an expression, which has no attribute 'T'"),
        (lambda x, u, s, p: ((x.a, s.h),), "in this order, each an expression; got (x.a, s.h)"),
        (lambda x, u, s, p: s, "each an expression; got s: write s.h"),
        (lambda x, u, s, p: s.h < 0, "each an expression; got s.h < 0"),
        (lambda x, u, s, p: mask(s.h, 0.5) * x.a, "a mask needs a name, such as 'h'; got s.h"),
        (lambda x, u, s, p: dropout("m", x.a, mask("n", 0.5)), "rate must be a number; got mask('n', 0.5)"),
        (lambda x, u, s, p: mean(s.h < 0) * x.a, "s.h < 0 is a comparison, no number: write where(s.h < 0, 1.0, 0.0)"),
        (lambda x, u, s, p: np.maximum(x.a, s.h), "is no array: use the functions of fusedrnn.cell, not NumPy's"),
        (lambda x, u, s, p: np.dot(x.a, s.h), "is no array: use the functions of fusedrnn.cell, not NumPy's"),
        (
            lambda x, u, s, p: where(x.a + u(s.h).a < 0, s.h, p.beta),
            "the new states depend on (x.a + recurrent(...).a) through comparisons alone, if at all",
        ),
    ],
)  # fmt: skip
def test_expressions_in_errors_are_as_equations_write_them(equations, message):
    with pytest.raises((TypeError, ValueError, AttributeError)) as error:
        of(equations, vectors="beta")
    text = str(error.value)
    assert text.startswith("cell wrong: ")
    assert text.endswith(message)
    assert not [name for name in INTERNAL_NAMES if name in text]


def test_text_of_equal_parts_does_not_grow():
    value = sample.traced.outputs[0]
    for _ in range(100):
        value = value + value
    assert len(repr(value)) < 200


def test_hashes_of_equations_do_not_change():
    """They are part of the names of compiled kernels and of exported programs."""
    assert cells.minimal_gated_unit.slug == "minimal_gated_unit_f4c7abd6f40ca42d"
    assert cells.zoneout_lstm.slug == "zoneout_lstm_a94f372126f4b4ca"
    assert cells.layer_norm_gru.slug == "layer_norm_gru_fbbb3fe052aa9aef"


def plain(x, u, s, *p):
    return tanh(x.a + u(s.h).a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": ""}, "needs at least one gate"),
        ({"gates": "a a"}, "two gates have the name 'a'"),
        ({"gates": "a for"}, "must be names, each an identifier of at most 64 .* letters, not with _ first; got 'for'"),
        ({"gates": "raw"}, "no gate has the name 'raw': x.raw is the input itself"),
        ({"gates": "a 1"}, "must be names, each an identifier of at most 64 ASCII letters, not with _ first; got '1'"),
        ({"states": ""}, "needs at least one state"),
        ({"states": "h c"}, "must return the new states h, c, in this order; they return 1 value"),
        ({"states": "a b c d e f g"}, "at most 6 states; got 7"),
        ({"vectors": "beta beta"}, "two parameters have the name 'beta'"),
        ({"vectors": "beta", "scalars": "beta"}, "two parameters have the name 'beta'"),
        ({"vectors": "h2h_bias"}, "is that of a weight or bias"),
        ({"vectors": "beta"}, "parameter 'beta' is declared, but has no effect: write p.beta"),
        ({"output": "1"}, "output must be a name, an identifier of at most 64 ASCII letters"),
        ({"output": "h"}, "output 'h' is a state: without output= the first state is the output"),
        ({"output": "y"}, "must return the output y and the new states h, in this order; they return 1 value"),
        ({"name": "not a name"}, "an identifier of at most 64 ASCII letters, not with _ first; got 'not a name'"),
    ],
)
def test_declarations(options, message):
    with pytest.raises(ValueError, match=message):
        of(plain, **options)


def test_the_order_of_gates_is_that_of_products():
    def equations(x, u, s):
        f = sigmoid(x.f + u(s.h).f)
        return tanh(x.n + u(f * s.h).n)

    with pytest.raises(ValueError, match=r"cell own: gates must be in the order .*: write gates='f n'"):
        cell(gates="n f", name="own")(equations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": ("tanh",)}, "activations needs one of the modes"),
        ({"gate_clip": 1.0}, "gate_clip needs one of the modes"),
        ({"projection_size": 2}, "projection_size needs mode 'lstm'; got 2 in mode <cell sample>"),
    ],
)
def test_options_of_the_four_cells_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RNNSpec(sample, 3, 4, **options)


def test_the_spec_of_a_cell():
    spec = RNNSpec(sample, 3, 4, 2)
    assert (spec.mode, spec.mode_name, spec.gates, spec.state_names) == (sample, "sample", ("f", "n"), ("h", "c"))
    params = np.arange(spec.layout.size, dtype=np.float32)
    shapes = {name: array.shape for name, array in spec.layout.unpack(params).items() if name.startswith("l0")}
    assert shapes == {
        "l0_i2h_weight": (8, 3), "l0_h2h_weight": (8, 4), "l0_beta": (4,), "l0_tau": (1,), "l0_i2h_bias": (8,),
        "l0_h2h_bias": (8,),
    }  # fmt: skip
    assert "tau_l1" in spec.layout.unpack(params, names="torch")
    np.testing.assert_array_equal(spec.layout.pack(spec.layout.unpack(params)), params)


def test_the_spec_of_a_cell_without_products():
    """It has no recurrent weights, and one that reads the input itself needs as many features as units."""
    spec = RNNSpec(cells.sru, 4, 4, 2)
    assert (spec.num_recurrent_gates, spec.layout.has("h2h_weight"), spec.layout.has("h2h_bias")) == (0, False, False)
    shapes = [("i2h_weight", (12, 4)), ("v_f", (4,)), ("v_r", (4,)), ("i2h_bias", (12,))]
    assert [*spec.parameter_shapes(1).items()] == shapes
    with pytest.raises(ValueError, match=r"input_size .* hidden_size \(4\), as <cell sru> reads x.raw; got 3"):
        RNNSpec(cells.sru, 3, 4)
    with pytest.raises(ValueError, match=r"output of a layer must have .* hidden_size \(4\).*; got 8: .* x.k of one"):
        RNNSpec(cells.sru, 4, 4, 2, bidirectional=True)
    assert "d x.raw, beside products = dy - v" in cells.sru.explain()


def test_gates_without_input():
    """Each matrix has rows for the gates that it gives, in their order; so have biases and their initial values."""

    @cell(gates="a b c", initial={"a.bias": 3.0, "b.bias": 2.0, "c.bias": 1.0})
    def some(x, recurrent, s):
        h = recurrent(s.h)
        return tanh(h.a + h.b * x.b) + x.c

    spec = RNNSpec(some, 5, 4)
    shapes = {"i2h_weight": (8, 5), "h2h_weight": (8, 4), "i2h_bias": (8,), "h2h_bias": (8,)}
    assert spec.parameter_shapes(0) == shapes and spec.flops(1, 1) == 2 * (8 * 5 + 8 * 4)
    biases = init_params(spec)[-16:].reshape(4, 4)
    np.testing.assert_array_equal(biases, np.repeat([[2], [1], [3], [0]], 4, axis=1))
    with pytest.raises(ValueError, match=r"params must have shape \(88,\), .*; got \(0,\)"):
        RNNOp(spec).forward(np.zeros((1, 1, 5), np.float32), np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"initial of 'a.bias' negates the bias of 'b': both must be of the input"):
        init_params(spec, initial={"a.bias": chrono(5, negated="b")})


def test_errors_name_the_states_of_the_cell():
    op = RNNOp(RNNSpec(cells.slstm, 3, 4))
    x, params = np.zeros((2, 1, 3), np.float32), np.zeros(op.spec.layout.size, np.float32)
    states = [np.zeros((1, 1, 4), np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match=r"states must be .*h0 \(1, 1, 4\), c0 .*, n0 .*, m0 .*; got a sequence of 3"):
        op.forward(x, params, states)
    with pytest.raises(ValueError, match=r"states: m0 must have shape \(1, 1, 4\); got \(1, 1, 5\)"):
        op.forward(x, params, [*states, np.zeros((1, 1, 5), np.float32)])


def test_engines_without_cells_say_so():
    with pytest.raises(NotImplementedError, match="<cell sample>"):
        RNNOp(RNNSpec(sample, 3, 4), "onednn")


def test_cells_are_compared_by_their_equations():
    """So that a cell that is defined again finds its kernels."""

    def make(factor):
        return cell(gates="a", name="scaled")(lambda x, u, s: factor * tanh(x.a + u(s.h).a))

    assert make(0.5) == make(0.5) and hash(make(0.5)) == hash(make(0.5)) and make(0.5).slug == make(0.5).slug
    assert make(0.5) != make(0.25) and make(0.5).slug != make(0.25).slug
    assert RNNSpec(make(0.5), 3, 4) == RNNSpec(make(0.5), 3, 4) != RNNSpec(make(0.25), 3, 4)
    renamed = cell(gates="a", name="other")(lambda x, u, s: 0.5 * tanh(x.a + u(s.h).a))
    assert make(0.5) != renamed and sample.slug.startswith("sample_")


def two_means(first, second):
    """The means of some of the gates a, b, c, and of others of them."""

    def equations(x, recurrent, s):
        h = recurrent(s.h)
        gates = {name: getattr(x, name) + getattr(h, name) for name in "abc"}
        means = [mean(*map(gates.get, names)) for names in (first, second)]
        return tanh(gates["a"] - means[0]) + tanh(gates["c"] - means[1]) * gates["b"]

    return of(equations, gates="a b c")


def mean_after_mean(with_first):
    """A mean of a, and one of a value that needs it; b is part of either mean."""

    def equations(x, recurrent, s):
        a, b = x.a + recurrent(s.h).a, x.b
        first = mean(a, b) if with_first else mean(a)
        later = tanh(a - first)
        return later - (mean(later) if with_first else mean(b, later))

    return of(equations, gates="a b")


@pytest.mark.parametrize(
    ("one", "other"),
    [(two_means("ab", "c"), two_means("a", "bc")), (mean_after_mean(True), mean_after_mean(False))],
    ids=["one stage", "two stages"],
)
def test_cells_that_reduce_the_same_values_in_other_groups_differ(one, other):
    assert one.traced != other.traced and one != other and one.slug != other.slug


def test_equal_operands_are_one_product():
    """However often the equations call ``recurrent`` with one."""
    twice = cell(gates="f n", name="ugrnn")(lambda x, u, s: sigmoid(x.f + u(s.h).f) * tanh(x.n + u(s.h).n))
    h = cell(gates="f n", name="ugrnn")(lambda x, u, s: (lambda h: sigmoid(x.f + h.f) * tanh(x.n + h.n))(u(s.h)))
    assert twice == h and len(twice.traced.stages) == 1


def test_heads():
    """They are another cell, whose kernels do not depend on their number."""
    four, two = cells.slstm.with_heads(4), cells.slstm.with_heads(2)
    assert four == cells.slstm.with_heads(4) and len({four, two, cells.slstm}) == 3
    assert four.slug == two.slug == cells.slstm.slug + "_heads" and four.with_heads(1) is cells.slstm
    assert pickle.loads(pickle.dumps(four)) == copy.deepcopy(four) == four and four.__doc__ == cells.slstm.__doc__
    spec = RNNSpec(four, 3, 8)
    assert spec.parameter_shapes(0)["h2h_weight"] == (32, 2) and spec.parameter_shapes(0)["h2h_bias"] == (32,)
    assert "recurrent weights are block-diagonal" in four.explain()
    for wrong, message in ((0, "heads must be"), (2.5, "heads must be")):
        with pytest.raises((TypeError, ValueError), match=message):
            cells.slstm.with_heads(wrong)
    with pytest.raises(ValueError, match="cell sru has no recurrent products, and so no heads"):
        cells.sru.with_heads(2)
    with pytest.raises(ValueError, match=r"must be a multiple of the heads of <cell slstm.with_heads\(4\)>; got 9"):
        RNNSpec(four, 3, 9)
    with pytest.raises(ValueError, match=r"compute='int8' needs a cell of one head; got <cell slstm.with_heads\(4\)>"):
        RNNSpec(four, 3, 8, compute="int8")
    with pytest.raises(NotImplementedError, match="a head must have a multiple of 16 units in float32; got 2"):
        RNNOp(spec)


def test_rates():
    """They are constants of another cell, with kernels of its own."""
    other = cells.zoneout_lstm.with_rates(c=0.25)
    assert [(mask.name, mask.keep) for mask in other.traced.masks] == [("c", 0.75), ("h", 0.95)]
    both = other.with_rates(h=0.5).with_heads(2)
    assert repr(both) == "<cell zoneout_lstm.with_rates(c=0.25, h=0.5).with_heads(2)>"
    assert both == cells.zoneout_lstm.with_heads(2).with_rates(h=0.5, c=0.25) and both.with_heads(1) != both
    assert len({cells.zoneout_lstm, other, both, both.with_heads(1)}) == 4 and other.slug != cells.zoneout_lstm.slug
    assert other.with_rates(c=0.5) == cells.zoneout_lstm and cells.zoneout_lstm.with_rates() is cells.zoneout_lstm
    assert "mask h / 0.5" in cells.variational_gru.with_rates(h=0.5).explain()
    for of in (other, both, other.expectation, both.expectation):
        assert pickle.loads(pickle.dumps(of)) == copy.deepcopy(of) == of
    assert other.expectation.with_rates(h=0.5).with_heads(2) == both.expectation != other.expectation
    for of, rates, error, message in (
        (other, {"c": 1.0}, ValueError, r"c must be a probability in \[0, 1\); got 1.0"),
        (other, {"c": "1"}, TypeError, "c must be a number; got '1'"),
        (other.expectation, {"o": 0.5}, ValueError, "cell zoneout_lstm has no mask 'o': its masks are c, h"),
        (cells.janet, {"c": 0.5}, ValueError, "cell janet has no mask 'c': it draws none"),
    ):
        with pytest.raises(error, match=message):
            of.with_rates(**rates)


def leaky(x, recurrent, s, dt):
    return s.h + dt * tanh(x.a + recurrent(s.h).a)


def test_equations_run_once():
    """What is derived from a cell has its equations, also if a name that they read has another value by then."""
    dt = 0.25

    @cell(gates="a")
    def euler(x, recurrent, s):
        return zoneout("h", s.h, leaky(x, recurrent, s, dt), 0.5)

    spec = RNNSpec(euler, 3, 4, residual="projection")
    same = cell(gates="a", name="euler")(lambda x, u, s: zoneout("h", s.h, leaky(x, u, s, 0.25), 0.5))
    dt = 1.0
    assert traced_cell(spec.variant) == traced_cell(replace(spec, mode=same).variant)
    assert euler.expectation == same.expectation
    assert euler.with_heads(2) == same.with_heads(2)
    message = "euler are no longer those of its definition, since a name that they read has another value"
    with pytest.raises(ValueError, match=message):
        euler.with_rates(h=0.1)
    dt = 0.25
    assert euler.with_rates(h=0.1) == same.with_rates(h=0.1)


def test_functions_with_arguments_already_bound():
    """A partial function has no name of its own, so no graph can refer to it by that."""
    bound = cell(gates="a", name="bound")(partial(leaky, dt=0.5))
    assert bound == cell(gates="a", name="bound")(lambda x, u, s: leaky(x, u, s, 0.5))
    assert bound.reference.split(":")[1] == "bound"


def test_expectation_of_what_no_float_can_hold():
    """Where NumPy's functions give infinity or NaN."""
    huge = of(lambda x, u, s: tanh(x.a + u(s.h).a) * sigmoid(-1e4 * mask("m", 0.5)))
    assert huge.expectation == of(lambda x, u, s: tanh(x.a + u(s.h).a) * 0.0)
    half = mask("m", 0.5)
    zero = half - 0.5
    infinite = {exp(2000.0 * half): math.inf, log(zero): -math.inf, -2.0 / zero: -math.inf, sqrt(zero): 0.0}
    infinite |= {log(half - 1.0): math.nan, sqrt(half - 1.0): math.nan, zero / zero: math.nan}
    values = evaluate(list(infinite), lambda _: 0.5, NUMBERS)
    assert values == pytest.approx(list(infinite.values()), nan_ok=True)


def test_a_cell_is_pickled_by_reference():
    spec = RNNSpec(cells.janet, 3, 4)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert pickle.loads(pickle.dumps(cells.janet)) is copy.deepcopy(cells.janet) is cells.janet


def test_kinks():
    assert sample.has_kinks and cells.li_gru.has_kinks and not cells.janet.has_kinks
    assert of(lambda x, u, s: maximum(x.a + u(s.h).a, relu(s.h))).has_kinks


def test_latex():
    assert cells.minimal_gated_unit.latex() == r"""\begin{align}
f_t &= \sigma(W_f x_t + U_f h_{t-1} + b_f) \\
n_t &= \tanh(W_n x_t + U_n (f_t \odot h_{t-1}) + b_n) \\
h_t &= h_{t-1} + f_t \odot (n_t - h_{t-1})
\end{align}"""
    # A gate with the name of a state; a product of a computed value for several gates; a product on its own.
    assert r"\tilde{z}_t &= \tanh(W_z x_t + U_z y_{t-1} + b_z)" in cells.lem.latex()
    lines = cells.multiplicative_lstm.latex().splitlines()
    assert lines[1] == r"v_{1, t} &= (W_m x_t + b_m) \odot (U_m h_{t-1} + d_m) \\"
    assert r"f_t &= \sigma(W_f x_t + U_f v_{1, t} + b_f) \\" in lines
    text = sample.latex()
    assert r"\begin{cases} c_t & 0.5 < c_t \\ \frac{\lvert c_t \rvert}{2 - \mathrm{clip}(c_t, -1, 1)} &" in text
    assert r"h_t &= \tau \, \begin{cases}" in text and r"\beta \odot n_t" in text
    for cell_of_paper in (getattr(cells, name) for name in cells.__all__):
        left = [line.split(" &= ")[0] for line in cell_of_paper.latex().splitlines()[1:-1]]
        assert len(set(left)) == len(left)


def test_pre_activations_that_are_used_once_in_latex():
    """As all that is reduced or multiplied."""
    reduced = of(lambda x, recurrent, s: tanh(x.a + recurrent(s.h).a) + mean(x.b), gates="a b")
    assert reduced.latex().splitlines()[2:4] == [r"b_t &= W_b x_t + b_b \\", r"h_t &= a_t + \operatorname{E}(b_t)"]
    operand = of(lambda x, recurrent, s: tanh(x.a + recurrent(x.b).a), gates="a b")
    assert operand.latex().splitlines()[1] == r"b_t &= W_b x_t + b_b \\"


def test_names_that_look_alike_in_latex():
    @cell(gates="o f f_", states="c", output="o")
    def alike(x, recurrent, s):
        h = recurrent(s.c)
        c = sigmoid(x.f + h.f) * s.c + tanh(x.f_ + h.f_) * mask("50 % ^2", 0.5)
        return sigmoid(x.o + h.o) * c, c

    lines = alike.latex().splitlines()
    left = [line.split(" &= ")[0] for line in lines[1:-1]]
    assert left == ["f_t", r"\mathrm{f\_}_t", "c_t", r"\tilde{o}_t", "o_t"]
    assert r"m_{\mathrm{50\ \%\ \wedge 2}, t}" in lines[3]


def test_an_output_that_is_no_state():
    def equations(x, u, s):
        c = tanh(x.a + u(s.c).a)
        return c * s.c, c

    with_output = of(equations, states="c", output="y")
    assert r"y_t &= c_t \odot c_{t-1}" in with_output.latex()
    text = with_output.explain()
    assert "the output is y" in text and "product 1 of c" in text and "  y = " in text and "dy" in text
    spec = RNNSpec(with_output, 3, 4, 2, bidirectional=True)
    assert (spec.state_names, spec.other_states, spec.output_is_state) == (("c",), ("c",), False)
    assert with_output != of(equations, states="c", output="z")
    with pytest.raises(TypeError, match="output must be a string such as 'y'; got 1"):
        of(equations, states="c", output=1)


def test_states_that_stay_in_latex():
    stays = of(lambda x, u, s: (tanh(x.a + u(s.h).a), s.c, s.h * s.h), states="h c q")
    assert stays.latex().splitlines()[2:4] == [r"c_t &= c_{t-1} \\", "q_t &= h_{t-1}^2"]


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        ({"q": 1.0}, ValueError, "initial must name one of beta, tau, f.bias, n.bias; got 'q'"),
        ({"f": 1.0}, ValueError, "initial must name one of"),
        ({"beta": "1"}, TypeError, "initial of 'beta' must be a number; got '1'"),
        ({"beta": (1.0,)}, TypeError, r"initial of 'beta' must be a number, or two as \(low, high\)"),
        ({"beta": (1.0, 0.0)}, ValueError, "low first"),
        ({"beta": (0.0, math.inf)}, ValueError, r"must be at most 1e\+38, which float32 can hold; got \(0.0, inf\)"),
        ({"f.bias": -1e39}, ValueError, "initial of 'f.bias' must be at most 1e"),
        ([1.0], TypeError, "initial must be a mapping"),
        ({"beta": chrono(5, "f")}, ValueError, "negates the bias of 'f': both must be gates"),
        ({"f.bias": chrono(5, "g")}, ValueError, "negates the bias of 'g'"),
    ],
)
def test_initial_values_that_are_none(initial, error, message):
    with pytest.raises(error, match=message):
        cell(gates="f n", vectors="beta", scalars="tau", name="wrong", initial=initial)(everything_used)


def everything_used(x, recurrent, s, p):
    h = recurrent(s.h)
    return p.tau * tanh(x.n + h.n) * (x.f + h.f) + p.beta


def test_initial_parameters():
    declared = {"beta": 2.0, "tau": (3.0, 4.0), "f.bias": chrono(100, negated="n")}
    spec = RNNSpec(cell(gates="f n", vectors="beta", scalars="tau", initial=declared)(everything_used), 3, 50, 2)
    params = init_params(spec, np.random.default_rng(0))
    assert params.dtype == np.float32
    for layer in range(2):
        views = {kind: spec.layout.view(params, layer, 0, kind) for kind in spec.layout.kinds}
        assert (views["beta"] == 2).all() and 3 <= views["tau"] <= 4 and not views["h2h_bias"].any()
        forget, other = np.split(views["i2h_bias"], 2)
        np.testing.assert_array_equal(other, -forget)
        assert 0 <= forget.min() < math.log(20) < math.log(80) < forget.max() <= math.log(99)
        weights = abs(views["h2h_weight"])
        assert 0.95 * 50**-0.5 < weights.max() <= 50**-0.5
    again = init_params(spec, np.random.default_rng(0), {"beta": 1.0})
    assert np.count_nonzero(params != again) == 100
    assert (init_params(RNNSpec("lstm", 3, 4), initial={"f.bias": 1.0})[-32:-16].reshape(4, 4)[1] == 1).all()
    with pytest.raises(ValueError, match=r"initial names 'f.bias', and gates have no biases with bias='none'"):
        init_params(RNNSpec("lstm", 3, 4, bias="none"), initial={"f.bias": 1.0})
    network = NetworkSpec([RNNSpec("lstm", 3, 4), RNNSpec("gru", 4, 4)])
    with pytest.raises(ValueError, match=r"layers\[1\]: initial must name one of r.bias, z.bias, n.bias; got 'f.bias'"):
        init_params(network, initial={"f.bias": 1.0})


def test_explain():
    text = cells.minimal_gated_unit.explain()
    for line in (
        "cell minimal_gated_unit: gates f, n; states h",
        "  operand 2 = v1 * h",
        "  product 1 of h: a.f = x.f + h.f",
        "  product 2 of operand 2: a.n = x.n + h.n",
    ):
        assert line in text.splitlines()
    text = cells.layer_norm_li_gru.explain()
    assert "  mean and variance 2.1 over all units of row 2.1, row 2.2" in text.splitlines()
    assert "d variance 2.1, of a unit = " in text
    assert "beta, tau" in sample.explain()
    assert "where(0.5 < " in sample.explain()
    assert sample.__doc__ == "A cell with one of everything."
