"""GEMM operands in bfloat16 and int8: what the reference computes on operands rounded in the same way."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.engines.cpu.plan.weight_format import ANY_ROWS
from fusedrnn.engines.cpu.tuning import tuned
from fusedrnn.spec import MODES
from fusedrnn.testing.tolerance import longest_sum, tolerance
from gemms import each_target
from problems import Shape, make_problem
from variants import VARIANTS, possible, varied

SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(7, 3, 5, 17, layers=2, bidirectional=True, lengths="edges"),
    Shape(5, 17, 33, 40, layers=3, lengths="some"),
    Shape(4, 6, 70, 100),
)
COMPUTE = ("bfloat16", "int8", "int8_weights")
# The relative step of a rounded operand: where a value lies between two neighbours, two ways of computing it in float32
# may round it to different ones.
STEP = {"bfloat16": 2.0**-8, "int8": 1 / 127, "int8_weights": 2.0**-20}
# The cells and what changes their GEMMs: projection, stages, biases, vectors that are no operands.
CELLS = (*MODES, "projection", "lstm-all", "coupled-peepholes", "reset-before", "gru-no-bias")
KINKS = ("lstm-all", "rnn_relu")  # a rounding may decide on which side of a kink a value lies
pytestmark = pytest.mark.pairwise


def assert_rounded_close(actual, expected, spec):
    """Nearly all elements agree as float32 does; those that a different rounding reaches differ by a few steps."""
    expected = expected.astype(np.float64)
    error = np.abs(actual - expected)
    rtol, atol = tolerance("float32", longest_sum(spec))
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    assert (error <= atol * scale + rtol * np.abs(expected)).mean() >= 0.9
    assert error.max(initial=0.0) <= 4 * STEP[spec.compute] * scale


def cell_spec(cell, shape, compute):
    """The spec of a mode or a variant."""
    if cell in VARIANTS and not possible(cell, shape.H):
        pytest.skip("there is no such projection")
    mode = cell if cell in MODES else VARIANTS[cell][0]
    spec = replace(shape.spec(mode), compute=compute)
    return spec if cell in MODES else varied(spec, cell)


def arguments(spec, shape):
    problem = make_problem("rnn_tanh", shape)
    rng = np.random.default_rng(5)
    params = rng.uniform(-1, 1, spec.layout.size).astype(np.float32) / np.sqrt(np.float32(spec.hidden_size))
    states = tuple(rng.uniform(-1, 1, size).astype(np.float32) for size in spec.state_shape(shape.N))
    return problem.x, params, states, problem.lengths


@pytest.fixture(autouse=True)
def narrow_weights():
    """Small weights are packed in the format of operands, too, for any number of rows."""
    with tuned(wide_weight_bytes=0, narrow_int8_rows=((inf, ANY_ROWS),)):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", CELLS)
@pytest.mark.usefixtures("poisoned")
@each_target(*COMPUTE)
def test_inference(variant, shape, compute, target):
    spec = cell_spec(variant, shape, compute)
    x, params, states, lengths = arguments(spec, shape)
    y, final, _ = RNNOp(spec).forward(x, params, states, lengths=lengths)
    expected, expected_final, _ = RNNOp(spec, backend="reference").forward(x, params, states, lengths=lengths)
    for array, expected_array in zip((y, *final), (expected, *expected_final), strict=True):
        assert_rounded_close(array, expected_array, spec)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("variant", [cell for cell in CELLS if cell not in KINKS])
@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.usefixtures("poisoned")
@each_target("bfloat16")
def test_training(variant, shape, keep, compute, target):
    """Gradients of bfloat16: most agree as in float32, and where a rounding differs, it shows in few."""
    spec = cell_spec(variant, shape, compute)
    x, params, states, lengths = arguments(spec, shape)
    results = []
    for backend in ("cpu", "reference"):
        op = RNNOp(spec, backend)
        y, final, reserve = op.forward(x, params, states, lengths=lengths, training=True, reserve=keep)
        rng = np.random.default_rng(3)
        dy = rng.standard_normal(y.shape).astype(np.float32)
        dstates = tuple(rng.standard_normal(state.shape).astype(np.float32) for state in final)
        dx, dparams, dinitial = op.backward(dy, dstates, reserve)
        results.append((y, *final, dx, dparams, *dinitial))
    for array, expected in zip(*results, strict=True):
        norm = np.linalg.norm(expected.astype(np.float64))
        assert np.linalg.norm(array.astype(np.float64) - expected) <= 2.0**-8 * norm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.usefixtures("use_all_threads")
@each_target(*COMPUTE)
def test_bits(mode, shape, compute, target):
    """The same bits for any number of threads, alone and in a batch, in whole sequences and in chunks."""
    spec = replace(shape.spec(mode), compute=compute)
    x, params, states, lengths = arguments(spec, shape)
    op = RNNOp(spec)
    with fusedrnn.thread_limits(1):
        expected, final, _ = op.forward(x, params, states, lengths=lengths)
    for threads in (2, 3, 4):
        with fusedrnn.thread_limits(threads):
            y, states_after, _ = op.forward(x, params, states, lengths=lengths)
        for array, expected_array in zip((y, *states_after), (expected, *final), strict=True):
            np.testing.assert_array_equal(array, expected_array)
    for sequence in range(shape.N):
        steps = shape.T if lengths is None else int(lengths[sequence])
        if steps:
            own = tuple(state[:, sequence : sequence + 1] for state in states)
            alone, _, _ = op.forward(x[:steps, sequence : sequence + 1], params, own)
            np.testing.assert_array_equal(alone[:, 0], expected[:steps, sequence])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.usefixtures("use_all_threads")
@each_target("bfloat16")
def test_gradient_bits(mode, shape, compute, target):
    """The same gradients for any threads and blocks, and whether forward saves gates or backward computes them."""
    spec = replace(shape.spec(mode), compute=compute)
    x, params, states, lengths = arguments(spec, shape)
    results = []
    small_blocks = {"min_dx_chunk_rows": 1, "max_chunk_rows": 1, "block_rows": 1, "gemm_rows": 3}
    for threads, keep, rows in (
        (1, "gates", {}),
        (1, "states", small_blocks),
        (2, "gates", small_blocks),
        (3, "states", {}),
    ):
        with fusedrnn.thread_limits(threads), tuned(**rows):
            op = RNNOp(spec)
            y, _, reserve = op.forward(x, params, states, lengths=lengths, training=True, reserve=keep)
            dx, dparams, dinitial = op.backward(np.cos(y), None, reserve)
        results.append((y, dx, dparams, *dinitial))
    for others in results[1:]:
        for array, expected in zip(others, results[0], strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("compute", ["bfloat16", "int8_weights"])
def test_bits_of_wide_weights(mode, shape, compute, target):
    """Weights that are packed as float32 give the bits of narrow ones."""
    spec = replace(shape.spec(mode), compute=compute)
    x, params, states, lengths = arguments(spec, shape)
    results = []
    for wide_weight_bytes in (0, 1 << 30):
        with tuned(wide_weight_bytes=wide_weight_bytes):
            op = RNNOp(spec)
        target = op.by_address().target
        assert target.narrow_weights == (wide_weight_bytes == 0 and target.fma)
        y, final, reserve = op.forward(x, params, states, lengths=lengths, training=spec.is_trainable)
        results.append([y, *final])
        if reserve:
            dx, dparams, dinitial = op.backward(np.cos(y), None, reserve)
            results[-1] += dx, dparams, *dinitial
    for narrow, wide in zip(*results, strict=True):
        np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(mode, compute, value):
    """NaN or infinity in one sequence reaches its later steps in the first layer's sums, and no other sequence."""
    spec = RNNSpec(mode, 8, 16, compute=compute)
    op, rng = RNNOp(spec), np.random.default_rng(0)
    x, params = rng.standard_normal((6, 3, 8)).astype(np.float32), rng.uniform(-1, 1, spec.layout.size)
    params = params.astype(np.float32)
    expected, _, _ = op.forward(x, params)
    x[2, 1, 3] = value
    y, _, _ = op.forward(x, params)
    np.testing.assert_array_equal(y[:, [0, 2]], expected[:, [0, 2]])
    np.testing.assert_array_equal(y[:2, 1], expected[:2, 1])
    if compute == "int8" or np.isnan(value):
        assert np.isnan(y[2:, 1]).all()


@pytest.mark.parametrize("compute", ["int8", "int8_weights"])
def test_int8_declines_training(compute):
    op = RNNOp(RNNSpec("lstm", 3, 4, compute=compute))
    x, params = np.ones((2, 1, 3), np.float32), np.ones(op.spec.layout.size, np.float32)
    with pytest.raises(NotImplementedError, match=f"training with compute='{compute}' is not supported"):
        op.forward(x, params, training=True)
    with pytest.raises(NotImplementedError, match=f"training with compute='{compute}' is not supported"):
        op.compile(training=True)
