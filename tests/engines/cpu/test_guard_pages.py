"""Guard pages: all that calls are given, outputs, gradients, the engine's own buffers end, or begin, at one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fences
import fusedrnn
import pairwise
from fences import AVAILABLE, fenced, fenced_copy
from fusedrnn import RNNOp
from fusedrnn.runtime import buffers
from fusedrnn.spec import DTYPES, MODES
from pieces import random_resets, random_state_gradients
from problems import Shape, assert_same_bits, make_problem

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs mprotect"),
    pytest.mark.usefixtures("use_all_threads"),
    pytest.mark.pairwise,
]

SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(3, 2, 3, 2, layers=2, bidirectional=True, lengths="edges"),
    Shape(5, 7, 17, 63, lengths="edges"),
    Shape(2, 13, 63, 17, layers=2, bidirectional=True),
    Shape(3, 3, 2, 129, layers=3, lengths="some"),
    Shape(2, 29, 129, 3, bidirectional=True, lengths="edges"),
)


@pytest.fixture(params=["end", "start"])
def side(request):
    return request.param


@pytest.fixture(params=[1, 2], ids="{}threads".format)
def threads(request):
    with fusedrnn.thread_limits(request.param):
        yield request.param


@pytest.fixture
def fenced_buffers(side, monkeypatch):
    """Packed weights, reserves, buffers, final states and new gradients lie beside protected pages, too."""
    plain = np.empty

    def aligned_empty(shape, dtype):
        return fenced(shape, dtype, side)

    def empty(shape, dtype=float, **options):
        return plain(shape, dtype, **options) if np.dtype(dtype).kind != "f" else fenced(shape, dtype, side)

    monkeypatch.setattr(buffers, "aligned_empty", aligned_empty)
    monkeypatch.setattr(np, "empty", empty)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_stays_inside_its_arrays(mode, dtype, shape, side, threads, target, fenced_buffers):
    problem = make_problem(mode, shape, dtype)
    expected = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]
    x, params = fenced_copy(problem.x, side), fenced_copy(problem.params, side)
    states = tuple(fenced_copy(state, side) for state in problem.states)
    lengths = None if problem.lengths is None else fenced_copy(problem.lengths, side)
    out = fenced(expected[0].shape, dtype, side)
    assert_same_bits(RNNOp(problem.spec).forward(x, params, states, lengths=lengths, out=out)[:2], expected)


def train(problem, keep, arrays, out=None, grad_req="write"):
    """Both ways of training on these arrays, in the order of Problem.arrays."""
    x, params, *states = arrays[: -1 - len(problem.dstates)]
    dy, *dstates = arrays[-1 - len(problem.dstates) :]
    op = RNNOp(problem.spec)
    lengths = problem.lengths
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=keep, seed=3)
    return y, final, op.backward(dy, dstates, reserve, grad_req=grad_req, out=out)


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_stays_inside_its_arrays(mode, shape, keep, side, threads, target, fenced_buffers):
    for dtype in pairwise.dtypes(mode):
        problem = make_problem(mode, shape, dtype)
        options = {"dropout": 0.3, "input_dropout": 0.2, "residual": "identity" if shape.layers == 3 else None}
        problem = replace(problem, spec=replace(problem.spec, **options))
        expected = train(problem, keep, problem.arrays)
        arrays = [fenced_copy(array, side) for array in problem.arrays]
        if problem.lengths is not None:
            problem = replace(problem, lengths=fenced_copy(problem.lengths, side))
        dx, dparams, dstates = expected[2]
        grads = [fenced(array.shape, dtype, side) for array in (dx, dparams, *dstates)]
        out = grads[0], grads[1], tuple(grads[2:])
        assert_same_bits(train(problem, keep, arrays, out), expected)
        train(problem, keep, arrays, out, "add")
        assert_same_bits(out, (dx + dx, dparams + dparams, tuple(gradient + gradient for gradient in dstates)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_training_stays_inside_strided_gradients(mode, side, target, bidirectional):
    """Rows of ``dy`` and ``dx`` with other rows between them: only the last one touches the fence."""
    problem = make_problem(mode, Shape(5, 7, 17, 63, bidirectional=bidirectional, lengths="edges"))
    expected = train(problem, "gates", problem.arrays)
    part = slice(1, None, 2) if side == "end" else slice(None, None, 2)
    wide_dy = np.zeros((5, 14, problem.spec.output_size), np.float32)
    wide_dy[:, part] = problem.dy
    wide_dx = fenced((5, 14, 17), np.float32, side)
    arrays = list(problem.arrays)
    arrays[-1 - len(problem.dstates)] = fenced_copy(wide_dy, side)[:, part]
    dx = wide_dx[:, part]
    assert_same_bits(train(problem, "gates", arrays, (dx, None, None)), expected)
    dx[...] = 0
    assert not wide_dx.any()


@pytest.mark.parametrize("mode", MODES)
def test_inference_stays_inside_strided_arrays(mode, side, target):
    """Rows of ``x`` and ``out`` with other rows between them: only the last one touches the fence."""
    problem = make_problem(mode, Shape(5, 7, 17, 63, bidirectional=True, lengths="edges"))
    expected = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)[:2]
    part = slice(1, None, 2) if side == "end" else slice(None, None, 2)
    wide_x, wide_out = np.zeros((5, 14, 17), np.float32), fenced((5, 14, 126), np.float32, side)
    wide_x[:, part] = problem.x
    x, out = fenced_copy(wide_x, side)[:, part], wide_out[:, part]
    result = RNNOp(problem.spec).forward(x, problem.params, problem.states, lengths=problem.lengths, out=out)
    assert_same_bits(result[:2], expected)
    out[...] = 0
    assert not wide_out.any()


@pytest.mark.parametrize(
    ("array", "offset"),
    [
        ("fenced((3,), 'f4', 'end')", 12),
        ("fenced((3,), 'f4', 'start')", -1),
        ("fenced_copy(np.ones(3), 'end')", 0),
        ("fenced_copy(np.ones(3), 'start')", 0),
    ],
    ids=["past the end", "before the start", "read-only", "read-only"],
)
def test_guard_pages_end_the_process(array, offset, request):
    """What the tests above rest on: who writes there ends, having been able to read what is inside."""
    program = (
        "import ctypes, sys, numpy as np\n"
        f"sys.path.insert(0, {str(Path(fences.__file__).parent)!r})\n"
        "from fences import fenced, fenced_copy\n"
        f"array = {array}\n"
        "print(array.sum() >= 0, flush=True)\n"
        f"ctypes.memset(array.ctypes.data + {offset}, 0, 1)\n"
        "print('after')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "True\n"
    assert result.returncode < 0


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_resets_stay_inside_their_arrays(shape, keep, side, threads, fenced_buffers):
    """Marks, the states of resets, every state of every step, and the gradients of these."""
    problem = make_problem("lstm", shape)
    resets, reset_states = random_resets(problem)
    dall = random_state_gradients(problem)
    marks, rows, dother = fenced_copy(resets, side), *(
        tuple(fenced_copy(array, side) for array in arrays) for arrays in (reset_states, dall)
    )
    options = {"lengths": problem.lengths, "training": True, "all_states": True, "reserve": keep}
    results = []
    for given in ((resets, reset_states, dall), (marks, rows, dother)):
        op = RNNOp(problem.spec)
        every, final, reserve = op.forward(
            problem.x, problem.params, problem.states, resets=given[0], reset_states=given[1], **options
        )
        results.append((every, final, op.backward((problem.dy, *given[2]), problem.dstates, reserve)))
    assert_same_bits(results[1], results[0])
    op = RNNOp(problem.spec)
    inferred = [op.forward(problem.x, problem.params, problem.states, resets=marks)[:2] for _ in range(3)]
    assert_same_bits(inferred[2], inferred[0])  # a cached call reads the marks in place
