"""MXNet's rnn module on NumPy: fused and unfused cells agree, and weights convert between them."""

import doctest

import numpy as np
import pytest
import torch

import fusedrnn.mxnet.rnn
import fusedrnn.mxnet.rnn.unfused
from fusedrnn.engines.reference import forward as reference
from fusedrnn.mxnet.rnn import BidirectionalCell, FusedRNNCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
from fusedrnn.spec import MODES, RNNSpec
from fusedrnn.testing.tolerance import longest_sum, tolerance

T, N, I, H = 5, 3, 4, 6


def random_params(cell, dtype="float32", input_size=I):
    rng = np.random.default_rng(3)
    shapes = cell.param_shapes(input_size)
    return {name: rng.uniform(-0.4, 0.4, shape).astype(dtype) for name, shape in shapes.items()}


def random_x(dtype="float32", steps=T):
    return np.random.default_rng(4).standard_normal((steps, N, I)).astype(dtype)


def random_states(cell, dtype="float32"):
    rng = np.random.default_rng(5)
    return [rng.uniform(-1, 1, state.shape).astype(dtype) for state in cell.begin_state(N)]


def with_params(cell, dtype="float32"):
    cell.set_params(random_params(cell, dtype))
    return cell


def single_cell(mode, prefix):
    return {
        "rnn_relu": lambda: RNNCell(H, "relu", prefix),
        "rnn_tanh": lambda: RNNCell(H, prefix=prefix),
        "lstm": lambda: LSTMCell(H, prefix),
        "gru": lambda: GRUCell(H, prefix),
    }[mode]()


def assert_all_close(actual, expected, rtol, atol):
    assert len(actual) == len(expected)
    for array, expected_array in zip(actual, expected, strict=True):
        assert array.dtype == expected_array.dtype
        np.testing.assert_allclose(array, expected_array, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("given_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_fused_and_unfused_agree(mode, layers, bidirectional, given_states, dtype):
    fused = with_params(FusedRNNCell(H, layers, mode, bidirectional, get_next_state=True), dtype)
    x = random_x(dtype)
    states = random_states(fused, dtype) if given_states else None
    outputs, after = fused.unroll(T, x, states, layout="TNC")

    stack = fused.unfuse()
    stack.set_params(stack.pack_weights(fused.unpack_weights(fused.params)))
    rows = None if states is None else [state[row] for row in range(len(states[0])) for state in states]
    unfused, after_rows = stack.unroll(T, x, rows, layout="TNC")

    count = len(after)
    stacked = [np.stack(after_rows[index::count]) for index in range(count)]
    spec = RNNSpec(mode, I, H, layers, bidirectional, dtype=dtype)
    rtol, atol = tolerance(dtype, longest_sum(spec))
    assert outputs.shape == (T, N, spec.output_size)
    assert_all_close([outputs, *after], [unfused, *stacked], rtol, atol)


@pytest.mark.parametrize("mode", MODES)
def test_single_cell_against_torch(mode):
    cell = with_params(single_cell(mode, "cell_"), "float64")
    torch_cell = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}.get(mode, torch.nn.RNNCell)
    options = {"nonlinearity": mode[4:]} if mode.startswith("rnn") else {}
    module = torch_cell(I, H, dtype=torch.float64, **options)
    names = {"weight_ih": "i2h_weight", "weight_hh": "h2h_weight", "bias_ih": "i2h_bias", "bias_hh": "h2h_bias"}
    module.load_state_dict({name: torch.from_numpy(cell.params[f"cell_{kind}"]) for name, kind in names.items()})
    x, states = random_x("float64")[0], random_states(cell, "float64")
    tensors = tuple(map(torch.from_numpy, states))
    with torch.no_grad():
        expected = module(torch.from_numpy(x), tensors if mode == "lstm" else tensors[0])
    expected = [state.numpy() for state in (expected if mode == "lstm" else (expected,))]
    output, after = cell(x, states)
    np.testing.assert_array_equal(output, after[0])
    assert_all_close(after, expected, *tolerance("float64", I + H + 2))


@pytest.mark.parametrize("mode", MODES)
def test_unroll_equals_a_loop_of_calls(mode):
    stack = SequentialRNNCell()
    stack.add(single_cell(mode, "bottom_"))
    stack.add(LSTMCell(2, "top_"))
    with_params(stack)
    x, states = random_x(), stack.begin_state(N)
    expected, after = stack.unroll(T, x, layout="TNC")
    for t in range(T):
        output, states = stack(x[t], states)
        np.testing.assert_array_equal(output, expected[t])
    assert_all_close(states, after, 0, 0)


def test_bidirectional_reads_both_ways():
    cell = with_params(BidirectionalCell(GRUCell(H, "l_"), LSTMCell(2, "r_")))
    x = random_x()
    outputs, after = cell.unroll(T, x, layout="TNC")
    forward, reverse = GRUCell(H, "l_", cell.params), LSTMCell(2, "r_", cell.params)
    left, left_after = forward.unroll(T, x, layout="TNC")
    right, right_after = reverse.unroll(T, x[::-1], layout="TNC")
    np.testing.assert_array_equal(outputs, np.concatenate([left, right[::-1]], axis=2))
    assert_all_close(after, left_after + right_after, 0, 0)


def test_arguments_have_mxnets_order():
    params = random_params(LSTMCell(H, "one_"))
    assert LSTMCell(H, "one_", params, 0.0).params.keys() == params.keys()
    params = random_params(FusedRNNCell(H, 2, "lstm", True, prefix="net_"))
    fused = FusedRNNCell(H, 2, "lstm", True, 0.5, True, 0.0, "net_", params)
    assert fused.prefixes == ("net_",)
    assert list(fused.params) == ["net_parameters"]
    params = random_params(BidirectionalCell(GRUCell(H, "l_"), GRUCell(H, "r_")))
    assert BidirectionalCell(GRUCell(H, "l_"), GRUCell(H, "r_"), params).params.keys() == params.keys()


@pytest.mark.parametrize("make", [lambda: LSTMCell(H), lambda: FusedRNNCell(H, mode="gru")])
def test_layouts_and_lists(make):
    cell = with_params(make())
    x = random_x()
    tnc, _ = cell.unroll(T, x, layout="TNC")
    ntc, _ = cell.unroll(T, np.ascontiguousarray(x.swapaxes(0, 1)))
    np.testing.assert_array_equal(ntc, tnc.swapaxes(0, 1))
    for inputs in (list(x), tuple(x)):
        steps, _ = cell.unroll(T, inputs)
        assert isinstance(steps, list)
        assert_all_close(steps, list(tnc), 0, 0)
    steps, _ = cell.unroll(T, x, layout="TNC", merge_outputs=False)
    assert_all_close(steps, list(tnc), 0, 0)
    merged, _ = cell.unroll(T, list(x), merge_outputs=True)
    np.testing.assert_array_equal(merged, ntc)


def test_get_next_state():
    fused = FusedRNNCell(H, 2, "lstm", bidirectional=True)
    params = random_params(fused)
    fused.set_params(params)
    assert fused.unroll(T, random_x(), layout="TNC")[1] == []
    stateful = FusedRNNCell(H, 2, "lstm", bidirectional=True, get_next_state=True, params=params)
    after = stateful.unroll(T, random_x(), layout="TNC")[1]
    assert [state.shape for state in after] == [(4, N, H), (4, N, H)]


def test_fused_inside_a_stack():
    stack = SequentialRNNCell()
    stack.add(FusedRNNCell(H, mode="gru", prefix="bottom_"))
    stack.add(LSTMCell(2, "top_"))
    with_params(stack)
    outputs, after = stack.unroll(T, random_x(), layout="TNC")
    between, _ = FusedRNNCell(H, mode="gru", prefix="bottom_", params=stack.params).unroll(T, random_x(), layout="TNC")
    expected, _ = LSTMCell(2, "top_", stack.params).unroll(T, between, layout="TNC")
    np.testing.assert_array_equal(outputs, expected)
    assert [state.shape for state in after] == [(1, N, H), (N, 2), (N, 2)]
    with pytest.raises(NotImplementedError, match="FusedRNNCell runs over whole sequences"):
        stack(random_x()[0], stack.begin_state(N))


def test_inference_ignores_dropout():
    params = random_params(FusedRNNCell(H, 2))
    outputs = [FusedRNNCell(H, 2, dropout=p, params=params).unroll(T, random_x(), layout="TNC")[0] for p in (0.0, 0.5)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("mode", "gates"), [("rnn_relu", [""]), ("lstm", ["_i", "_f", "_c", "_o"]), ("gru", ["_r", "_z", "_o"])]
)
def test_names_of_unpacked_weights(mode, gates):
    fused = FusedRNNCell(H, 2, mode, bidirectional=True, prefix="net_")
    params = random_params(fused) | {"embedding": np.zeros(2)}
    unpacked = fused.unpack_weights(params)
    cells = ["net_l0", "net_r0", "net_l1", "net_r1"]
    kinds = [(source, what) for source in ("i2h", "h2h") for what in ("weight", "bias")]
    expected = {f"{cell}_{source}{gate}_{what}" for cell in cells for source, what in kinds for gate in gates}
    assert unpacked.keys() == expected | {"embedding"}
    spec = RNNSpec(mode, I, H, 2, bidirectional=True)
    for cell in ("l0", "r1"):
        packed = spec.layout.unpack(params["net_parameters"])[f"{cell}_i2h_weight"]
        parts = [unpacked[f"net_{cell}_i2h{gate}_weight"] for gate in gates]
        np.testing.assert_array_equal(np.concatenate(parts), packed)
        assert not np.shares_memory(parts[0], packed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pack_undoes_unpack(mode, dtype):
    fused = FusedRNNCell(H, 3, mode, bidirectional=True)
    for cell in (fused, fused.unfuse(), single_cell(mode, "one_")):
        params = random_params(cell, dtype) | {"other": np.arange(3)}
        unpacked = cell.unpack_weights(params)
        packed = cell.pack_weights(unpacked)
        assert packed.keys() == params.keys()
        assert_all_close([packed[name] for name in params], list(params.values()), 0, 0)
        assert "other" in unpacked


def test_unfuse_keeps_the_parameters():
    fused = FusedRNNCell(H, 2, bidirectional=True, prefix="net_")
    assert fused.unfuse().params == {}
    flat = with_params(fused).params["net_parameters"]
    stack = fused.unfuse()
    assert stack.prefixes == ("net_l0_", "net_r0_", "net_l1_", "net_r1_")
    assert stack.params.keys() == stack.param_shapes(I).keys()
    assert all(np.shares_memory(array, flat) for array in stack.params.values())


def test_parameters_are_not_copied():
    for cell in (LSTMCell(H), FusedRNNCell(H, 2)):
        with_params(cell)
        before, _ = cell.unroll(T, random_x(), layout="TNC")
        before = before.copy()
        for array in cell.params.values():
            array *= 0.5
        after, _ = cell.unroll(T, random_x(), layout="TNC")
        assert np.all(before != after)


@pytest.mark.parametrize("dtype", ["float16", "longdouble"])
def test_unfused_cells_accept_any_floating_dtype(dtype):
    outputs, after = with_params(GRUCell(H), dtype).unroll(T, random_x(dtype), layout="TNC")
    assert outputs.dtype == after[0].dtype == np.dtype(dtype)


def test_shapes_and_states():
    fused = FusedRNNCell(H, 2, "gru", bidirectional=True)
    assert fused.param_shapes(I) == {"gru_parameters": (RNNSpec("gru", I, H, 2, True).layout.size,)}
    assert fused.state_info == [{"shape": (4, 0, H), "__layout__": "LNC"}]
    assert fused.output_size == 2 * H
    stack = fused.unfuse()
    assert stack.param_shapes(I)["gru_r1_i2h_weight"] == (3 * H, 2 * H)
    assert stack.output_size == 2 * H
    lstm = LSTMCell(H)
    assert lstm.state_info == [{"shape": (0, H), "__layout__": "NC"}] * 2
    assert [(state.shape, state.dtype) for state in lstm.begin_state(N, "float64")] == [((N, H), np.float64)] * 2


@pytest.mark.parametrize("module", [fusedrnn.mxnet.rnn, fusedrnn.mxnet.rnn.unfused])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_unfused_cells_equal_the_reference():
    fused = with_params(FusedRNNCell(H, 2, "lstm", bidirectional=True))
    spec = RNNSpec("lstm", I, H, 2, bidirectional=True)
    expected, _ = reference.forward(spec, random_x(), fused.params["lstm_parameters"])
    actual, _ = fused.unfuse().unroll(T, random_x(), layout="TNC")
    np.testing.assert_array_equal(actual, expected)
