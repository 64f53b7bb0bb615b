"""Every error of a cell names the argument, what was given and what was expected."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

from fusedrnn import cells
from fusedrnn.mxnet.rnn import BidirectionalCell, FusedRNNCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell

T, N, I, H = 5, 3, 4, 6


def params_of(cell, dtype="float32"):
    return {name: np.zeros(shape, dtype) for name, shape in cell.param_shapes(I).items()}


def lstm():
    cell = LSTMCell(H)
    cell.set_params(params_of(cell))
    return cell


def fused():
    cell = FusedRNNCell(H)
    cell.set_params(params_of(cell))
    return cell


X = np.zeros((T, N, I), np.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LSTMCell(0), ValueError, r"^num_hidden must be at least 1; got 0"),
        (lambda: GRUCell(2.0), TypeError, r"^num_hidden must be an integer; got 2\.0"),
        (lambda: RNNCell(H, "sigmoid"), ValueError, r"^activation must be 'tanh' or 'relu'; got 'sigmoid'"),
        (lambda: LSTMCell(H, None), TypeError, r"^prefix must be a string; got None"),
        (lambda: LSTMCell(H, params=[1]), TypeError, r"^params must be a dict of named arrays; got list"),
        (lambda: FusedRNNCell(0), ValueError, r"^num_hidden must be at least 1; got 0"),
        (lambda: FusedRNNCell(H, num_layers=0), ValueError, r"^num_layers must be at least 1; got 0"),
        (lambda: FusedRNNCell(H, mode="mlp"), ValueError, r"^mode must be one of rnn_relu, .*; got 'mlp'"),
        (lambda: FusedRNNCell(H, mode=cells.ran), TypeError, r"^mode must be one of rnn_relu, .*; got"),
        (lambda: FusedRNNCell(H, bidirectional=1), TypeError, r"^bidirectional must be True or False; got 1"),
        (lambda: FusedRNNCell(H, dropout=1), ValueError, r"^dropout must be a probability .*; got 1"),
        (lambda: FusedRNNCell(H, get_next_state=1), TypeError, r"^get_next_state must be True or False; got 1"),
        (lambda: FusedRNNCell(H, forget_bias="1"), TypeError, r"^forget_bias must be a number; got '1'"),
        (lambda: LSTMCell(H, forget_bias=None), TypeError, r"^forget_bias must be a number; got None"),
        (lambda: FusedRNNCell(H, prefix=1), TypeError, r"^prefix must be a string or None; got 1"),
        (lambda: BidirectionalCell(LSTMCell(H), 3), TypeError, r"^r_cell must be a cell; got int"),
        (lambda: BidirectionalCell(LSTMCell(H), LSTMCell(H)), ValueError, r"^r_cell .* prefix of its own; 'lstm_' is"),
        (lambda: SequentialRNNCell().add(None), TypeError, r"^cell must be a cell; got NoneType"),
        (lambda: SequentialRNNCell().unroll(N, X), ValueError, r"^SequentialRNNCell must hold at least one cell"),
        (lambda: SequentialRNNCell().output_size, ValueError, r"^SequentialRNNCell must hold at least one cell"),
        (lambda: LSTMCell(H).param_shapes(0), ValueError, r"^input_size must be at least 1; got 0"),
        (lambda: FusedRNNCell(H).param_shapes("4"), TypeError, r"^input_size must be an integer; got '4'"),
        (lambda: LSTMCell(H).begin_state(0), ValueError, r"^batch_size must be at least 1; got 0"),
        (lambda: LSTMCell(H).begin_state(N, int), TypeError, r"^dtype must be a floating type; got <class 'int'>"),
    ],
)
def test_constructors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_prefixes_in_nested_groups():
    inner, outer = SequentialRNNCell(), SequentialRNNCell()
    outer.add(LSTMCell(H))
    outer.add(BidirectionalCell(inner, LSTMCell(H, "r_")))
    for prefix in ("lstm_", "r_"):
        with pytest.raises(ValueError, match=rf"^cell must have a prefix of its own; '{prefix}' is taken"):
            inner.add(LSTMCell(H, prefix))
    assert inner.prefixes == ()
    inner.add(LSTMCell(H, "l_"))
    assert outer.prefixes == ("lstm_", "l_", "r_")


def test_a_group_that_is_held_twice():
    inner, outer = SequentialRNNCell(), SequentialRNNCell()
    outer.add(inner)
    outer.add(inner)
    with pytest.raises(ValueError, match=r"^cell must have a prefix of its own; 'lstm_' is taken"):
        inner.add(LSTMCell(H))


def test_groups_that_would_hold_themselves():
    first, second, third = (SequentialRNNCell() for _ in range(3))
    first.add(second)
    second.add(third)
    for cell in (first, second, third):
        with pytest.raises(ValueError, match=r"^cell must be another cell; got the one that it is added to, or one"):
            third.add(cell)
    assert third.prefixes == ()


def nested():
    """A network and the network in it."""
    inner, outer = SequentialRNNCell(), SequentialRNNCell()
    outer.add(LSTMCell(H))
    outer.add(inner)
    return inner, outer


def test_a_dropped_network_reserves_no_prefixes():
    inner, outer = nested()
    dropped = weakref.ref(outer)
    gc.disable()
    try:
        del outer
        assert dropped() is None  # without a collection: there is no cycle
    finally:
        gc.enable()
    inner.add(LSTMCell(H))
    assert inner.prefixes == ("lstm_",)


@pytest.mark.parametrize("right", [LSTMCell(H, "r_"), LSTMCell(H)], ids=["params", "prefix"])
def test_a_constructor_that_fails_reserves_no_prefixes(right):
    inner = SequentialRNNCell()
    inner.add(LSTMCell(H))
    with pytest.raises(ValueError, match=r"^(params must hold|r_cell must have)") as raised:
        BidirectionalCell(inner, right, params={})
    inner.add(LSTMCell(H, "r_"))
    assert inner.prefixes == ("lstm_", "r_")
    del raised  # until here, its traceback holds the cell that failed


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cell: pickle.loads(pickle.dumps(cell))])
def test_copies_of_nested_groups(duplicate):
    inner, outer = nested()
    alone = duplicate(inner)  # without what holds it
    alone.add(LSTMCell(H))
    copied = duplicate(outer)
    with pytest.raises(ValueError, match=r"^cell must have a prefix of its own; 'lstm_' is taken"):
        copied._cells[1].add(LSTMCell(H))
    copied._cells[1].add(LSTMCell(H, "l_"))
    assert (outer.prefixes, copied.prefixes) == (("lstm_",), ("lstm_", "l_"))


def test_a_copy_of_a_part_does_not_hold_the_whole():
    inner, outer = nested()
    size = len(pickle.dumps(inner))
    outer._cells[0].set_params(params_of(outer._cells[0]))
    assert len(pickle.dumps(inner)) == size


def test_a_shallow_copy_of_a_nested_group():
    inner, outer = nested()
    copied = copy.copy(outer)
    copied.add(LSTMCell(H, "top_"))
    assert (outer.prefixes, copied.prefixes) == (("lstm_",), ("lstm_", "top_"))
    with pytest.raises(ValueError, match=r"^cell must have a prefix of its own; 'top_' is taken"):
        inner.add(LSTMCell(H, "top_"))


@pytest.mark.parametrize("make", [lstm, fused])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"length": 0}, ValueError, r"^length must be at least 1; got 0"),
        ({"length": "5"}, TypeError, r"^length must be an integer; got '5'"),
        ({"length": 4}, ValueError, r"^inputs must have length \(4\) steps on axis T of TNC; got 5"),
        ({"length": 4, "inputs": list(X)}, ValueError, r"^inputs must hold length \(4\) steps; got 5"),
        ({"inputs": None}, TypeError, r"^inputs must be a NumPy array; got NoneType"),
        ({"inputs": X[0]}, ValueError, r"^inputs must have shape \(T, N, C\), each at least 1; got \(3, 4\)"),
        ({"inputs": X[:, :0]}, ValueError, r"^inputs must have shape .* got \(5, 0, 4\)"),
        ({"inputs": X.astype(int)}, TypeError, r"^inputs must hold floating-point numbers; got dtype int64"),
        ({"inputs": X[:, :, :3]}, ValueError, r"^inputs of .*'lstm_' must have 4 features, .*; got 3"),
        ({"inputs": X.astype("f8")}, TypeError, r"^inputs of .*'lstm_' must have dtype float32, .*; got float64"),
        ({"inputs": [*X[:4], None]}, TypeError, r"^inputs\[4\] must be a NumPy array; got NoneType"),
        ({"inputs": [*X[:4], X[4, :2]]}, ValueError, r"^inputs\[4\] must have shape \(3, 4\); got \(2, 4\)"),
        ({"inputs": [*X[:4], X[4].astype("f8")]}, TypeError, r"^inputs\[4\] must have dtype float32, .* got float64"),
        ({"layout": "NCT"}, ValueError, r"^layout must be 'NTC' or 'TNC'; got 'NCT'"),
        ({"merge_outputs": "yes"}, TypeError, r"^merge_outputs must be True, False or None; got 'yes'"),
        ({"begin_state": X}, TypeError, r"^begin_state must be a list of arrays; got ndarray"),
        ({"begin_state": [X]}, ValueError, r"^begin_state must hold 2 arrays; got 1"),
        ({"begin_state": [None, X]}, TypeError, r"^begin_state\[0\] must be a NumPy array; got NoneType"),
        ({"begin_state": [X, X]}, ValueError, r"^begin_state\[0\] must have shape .*3, 6\); got \(5, 3, 4\)"),
    ],
)
def test_unroll(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make().unroll(**{"length": T, "inputs": X, "layout": "TNC", **arguments})


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [np.ma.masked_array, np.matrix])
def test_arrays_with_another_arithmetic(kind):
    got = kind(X[0])
    refused = pytest.raises(TypeError, match=rf"must be a NumPy array; got {type(got).__name__}")
    cell = lstm()
    states = cell.begin_state(N)
    for inputs, given in ((got, states), (X[0], [kind(states[0]), states[1]])):
        with refused:
            cell(inputs, given)
    with refused:
        cell.unroll(2, [X[0], got])
    for name in ("lstm_i2h_weight", "lstm_h2h_weight"):
        with refused:
            cell.set_params({**params_of(cell), name: kind(params_of(cell)[name])})


@pytest.mark.parametrize("make", [lstm, fused])
def test_dtype_of_states(make):
    cell = make()
    with pytest.raises(TypeError, match=r"^begin_state\[0\] must have dtype float32, .*; got float64"):
        cell.unroll(T, X, cell.begin_state(N, "float64"), layout="TNC")


def test_calls():
    cell = lstm()
    with pytest.raises(ValueError, match=r"^inputs must have shape \(N, I\), each at least 1; got \(5, 3, 4\)"):
        cell(X, cell.begin_state(N))
    with pytest.raises(ValueError, match=r"^states\[0\] must have shape \(3, 6\); got \(2, 6\)"):
        cell(X[0], cell.begin_state(2))
    with pytest.raises(NotImplementedError, match=r"^FusedRNNCell runs over whole sequences; call unroll"):
        fused()(X[0], fused().begin_state(N))
    stack = SequentialRNNCell()
    stack.add(BidirectionalCell(LSTMCell(H, "l_"), LSTMCell(H, "r_")))
    with pytest.raises(NotImplementedError, match=r"^BidirectionalCell reads the sequence from both ends; call unroll"):
        stack(X[0], stack.begin_state(N))


@pytest.mark.parametrize("make", [lambda: LSTMCell(H), lambda: FusedRNNCell(H), lambda: FusedRNNCell(H).unfuse()])
def test_before_set_params(make):
    assert make().params == {}
    with pytest.raises(ValueError, match=r"^params of .* are not set; call set_params"):
        make().unroll(T, X, layout="TNC")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lstm_i2h_weight", [[1.0]], TypeError, r"^lstm_i2h_weight must be a NumPy array; got list"),
        ("lstm_i2h_weight", np.zeros(24), ValueError, r"^lstm_i2h_weight must have shape \(units, inputs\)"),
        ("lstm_i2h_weight", np.zeros((24, 0)), ValueError, r"^lstm_i2h_weight must have shape .* got \(24, 0\)"),
        ("lstm_i2h_weight", np.zeros((18, 4)), ValueError, r"^lstm_i2h_weight must have .*24, 4\); got \(18, 4\)"),
        ("lstm_i2h_weight", np.zeros((24, 4), int), TypeError, r"^lstm_i2h_weight must hold floating-point numbers"),
        ("lstm_h2h_weight", np.zeros((6, 24), "f4"), ValueError, r"^lstm_h2h_weight must have shape \(24, 6\)"),
        ("lstm_h2h_bias", np.zeros(24), TypeError, r"^lstm_h2h_bias must have dtype float32, .*; got float64"),
        ("lstm_h2h_bias", None, TypeError, r"^lstm_h2h_bias must be a NumPy array; got NoneType"),
    ],
)
def test_parameters_of_a_cell(name, value, error, message):
    cell = LSTMCell(H)
    params = {**params_of(cell), name: value}
    for method in (cell.set_params, cell.unpack_weights):
        with pytest.raises(error, match=message):
            method(params)
    assert cell.params == {}


def test_parameters_missing():
    cell = LSTMCell(H)
    params = params_of(cell)
    del params["lstm_h2h_bias"]
    with pytest.raises(ValueError, match=r"^params must hold lstm_i2h_weight, .*; missing lstm_h2h_bias$"):
        cell.set_params(params)
    with pytest.raises(ValueError, match=r"^params must hold lstm_parameters; missing lstm_parameters"):
        FusedRNNCell(H).set_params(params)
    with pytest.raises(ValueError, match=r"^params must hold lstm_l0_i2h_i_weight; missing lstm_l0_i2h_i_weight"):
        FusedRNNCell(H).pack_weights(params)


@pytest.mark.parametrize("make", [lambda: LSTMCell(H), lambda: FusedRNNCell(H), lambda: FusedRNNCell(H).unfuse()])
@pytest.mark.parametrize("method", ["set_params", "unpack_weights", "pack_weights"])
def test_params_must_be_a_dict(make, method):
    with pytest.raises(TypeError, match=r"^params must be a dict of named arrays; got NoneType"):
        getattr(make(), method)(None)


def test_gates_of_different_input_sizes():
    cell = LSTMCell(H)
    gates = cell.unpack_weights(params_of(cell))
    gates["lstm_i2h_c_weight"] = np.zeros((H, I + 1), "float32")
    with pytest.raises(ValueError, match=r"^lstm_i2h_c_weight must have shape \(6, 4\); got \(6, 5\)"):
        cell.pack_weights(gates)


def test_layers_of_different_dtypes():
    cell = FusedRNNCell(H, 2)
    unpacked = cell.unpack_weights(params_of(cell))
    mixed = {name: array.astype("f8" if "l1" in name else "f4") for name, array in unpacked.items()}
    with pytest.raises(TypeError, match=r"^lstm_l1_i2h_weight must have dtype float32, .*; got float64"):
        cell.pack_weights(mixed)


def test_flat_vector_of_a_fused_cell():
    cell = FusedRNNCell(H, 2, "gru", bidirectional=True)
    ((name, (size,)),) = cell.param_shapes(I).items()
    smallest = cell.param_shapes(1)[name][0]
    for wrong_size in (size + 1, size - 1, smallest - 3 * H * 2, 1):
        with pytest.raises(
            ValueError, match=rf"^gru_parameters must have {smallest} elements for one .*; got {wrong_size}"
        ):
            cell.set_params({name: np.zeros(wrong_size, "float32")})
    with pytest.raises(ValueError, match=r"^gru_parameters must have shape \(size,\)"):
        cell.set_params({name: np.zeros((1, size), "float32")})
    with pytest.raises(TypeError, match=r"^gru_parameters must have dtype float32 or float64; got float16"):
        cell.set_params({name: np.zeros(size, "float16")})
    with pytest.raises(TypeError, match=r"^gru_parameters must hold floating-point numbers; got dtype int64"):
        cell.set_params({name: np.zeros(size, "int64")})


class TestParametersOfAGroup:
    """All arrays are checked before any cell changes."""

    def group(self, kind):
        cells = LSTMCell(H, "l_"), GRUCell(H, "r_")
        if kind == "both ways":
            return BidirectionalCell(*cells)
        stack = SequentialRNNCell()
        for cell in cells:
            stack.add(cell)
        return stack

    @pytest.mark.parametrize("kind", ["stack", "both ways"])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda name, array: array[:-1] if name == "r_h2h_bias" else array, ValueError,
             r"r_h2h_bias must have shape \(18,\); got \(17,\)"),
            (lambda name, array: array[:, :-1] if name == "r_i2h_weight" else array, ValueError,
             r"r_i2h_weight must have shape \(18, \d\); got \(18, \d\)"),
            (lambda name, array: array.astype("f8") if name.startswith("r_") else array, TypeError,
             "r_i2h_weight must have dtype float32, like the other arrays; got float64"),
        ],
        ids=["shape", "input size", "dtype"],
    )  # fmt: skip
    def test_errors(self, kind, change, error, message):
        group = self.group(kind)
        before = {name: np.zeros(shape, "f4") for name, shape in group.param_shapes(I).items()}
        group.set_params(before)
        wrong = {name: change(name, array + 1) for name, array in before.items()}
        for method in (group.set_params, group.unpack_weights):
            with pytest.raises(error, match=f"^{message}"):
                method(wrong)
        assert all(group.params[name] is array for name, array in before.items())

    @pytest.mark.parametrize("kind", ["stack", "both ways"])
    def test_packed_arrays_that_do_not_fit_each_other(self, kind):
        group = self.group(kind)
        gates = group.unpack_weights({name: np.zeros(shape, "f4") for name, shape in group.param_shapes(I).items()})
        size = gates["r_i2h_r_weight"].shape[1]
        gates |= {f"r_i2h_{gate}_weight": np.zeros((H, size + 1), "f4") for gate in "rzo"}
        with pytest.raises(ValueError, match=rf"^r_i2h_weight must have shape \(18, {size}\); got \(18, {size + 1}\)"):
            group.pack_weights(gates)

    def test_dtype_of_a_fused_cell(self):
        stack = SequentialRNNCell()
        stack.add(LSTMCell(H, "l_"))
        stack.add(FusedRNNCell(H, mode="gru"))
        params = {name: np.zeros(shape, "float16") for name, shape in stack.param_shapes(I).items()}
        with pytest.raises(TypeError, match=r"^gru_parameters must have dtype float32 or float64; got float16"):
            stack.set_params(params)
        assert stack.params == {}
        assert stack.pack_weights(stack.unpack_weights(params)).keys() == params.keys()
