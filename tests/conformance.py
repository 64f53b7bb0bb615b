"""The conformance suite: what every engine, adapter and instruction set must compute. Subclasses say how to run it."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn import reference
from fusedrnn.bench.cases import ODD_SIZES
from fusedrnn.spec import MODES
from problems import Shape, assert_close, make_problem

# Every odd size in every place, every depth in both directions, lengths and states of every kind; and large enough
# batches and layers among them for every way to split work over two and three threads.
SHAPES = (
    Shape(1, 1, 1, 1, states=False),
    Shape(2, 3, 17, 1, layers=3, bidirectional=True),
    Shape(3, 2, 1, 2, bidirectional=True, lengths="edges"),
    Shape(17, 17, 3, 3, layers=2, lengths="edges"),
    Shape(63, 1, 2, 17, layers=3, states=False),
    Shape(1, 63, 17, 63, bidirectional=True, lengths="edges"),
    Shape(100, 2, 63, 3, layers=2, bidirectional=True, lengths="some", states=False),
    Shape(129, 3, 1, 17, lengths="edges"),
    Shape(2, 100, 100, 2, layers=3, lengths="some"),
    Shape(3, 129, 3, 63, layers=2, bidirectional=True, states=False),
    Shape(17, 63, 2, 17, layers=3, bidirectional=True, lengths="edges"),
    Shape(3, 3, 129, 129, lengths="edges"),
    Shape(17, 2, 63, 100, layers=2),
    Shape(3, 7, 100, 129, layers=3, bidirectional=True, lengths="edges", states=False),
    Shape(17, 17, 2, 3, bidirectional=True, lengths="none"),
    Shape(17, 63, 129, 2),
)


def torch_module(spec, params):
    """The torch.nn module with these parameters, in float64."""
    options = {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional, "dtype": torch.float64}
    if spec.mode.startswith("rnn"):
        module = torch.nn.RNN(spec.input_size, spec.hidden_size, nonlinearity=spec.mode[4:], **options)
    else:
        module = getattr(torch.nn, spec.mode.upper())(spec.input_size, spec.hidden_size, **options)
    named = spec.layout.unpack(params.astype(np.float64), names="torch")
    module.load_state_dict({name: torch.from_numpy(value) for name, value in named.items()})
    return module


def torch_forward(spec, x, params, states, lengths):
    """Outputs and states of torch.nn; it knows no empty sequences, so these are left out and their rows stay zero."""
    rows = np.arange(x.shape[1]) if lengths is None else np.flatnonzero(lengths)
    initial = [np.zeros(shape) for shape in spec.state_shape(x.shape[1])] if states is None else states
    y = np.zeros((*x.shape[:2], spec.output_size))
    final = tuple(state.copy() for state in initial)
    if not rows.size:
        return y, final
    data = torch.from_numpy(x[:, rows])
    if lengths is not None:
        data = pack_padded_sequence(data, torch.from_numpy(lengths[rows]), enforce_sorted=False)
    tensors = tuple(torch.from_numpy(state[:, rows].copy()) for state in initial)
    with torch.no_grad():
        result, after = torch_module(spec, params)(data, tensors[0] if len(tensors) == 1 else tensors)
    if lengths is not None:
        result, _ = pad_packed_sequence(result, total_length=len(x))
    y[:, rows] = result.numpy()
    for state, value in zip(final, after if isinstance(after, tuple) else (after,), strict=True):
        state[:, rows] = value.numpy()
    return y, final


@cache
def expected(mode, shape):
    """What torch.nn and the reference say, in float64; once for all formats, targets and numbers of threads."""
    problem = make_problem(mode, shape)
    x, params, states = problem.astype(np.float64)
    return (
        torch_forward(problem.spec, x, params, states, problem.lengths),
        reference.forward(problem.spec, x, params, states, problem.lengths),
    )


@st.composite
def shapes(draw):
    """Small problems of any kind."""
    size = st.sampled_from([size for size in ODD_SIZES if size < 64] + [5, 8, 12, 24])
    lengths = st.sampled_from(["full", "some", "edges", "none"])
    return Shape(
        draw(size), draw(size), draw(size), draw(size), draw(st.integers(1, 3)), draw(st.booleans()), draw(lengths),
        draw(st.booleans()),
    )  # fmt: skip


class Conformance:
    """Inference against torch.nn and the reference, outputs and final states.

    A subclass gives :meth:`run`, and narrows ``dtypes`` to what its engine has. Its fixtures choose targets, threads
    and whatever else the result must not depend on.
    """

    dtypes = ("float32", "float64")

    def run(self, spec, x, params, states, lengths):
        """Outputs (T, N, D·S) and a tuple of final states, of the spec's dtype."""
        raise NotImplementedError

    def check(self, mode, shape, dtype, oracles):
        """Compare one problem with what the oracles said."""
        problem = make_problem(mode, shape, dtype)
        before = [array.copy() for array in (problem.x, problem.params, *(problem.states or ()))]
        actual = self.run(problem.spec, problem.x, problem.params, problem.states, problem.lengths)
        for oracle in oracles:
            assert_close(actual, oracle, dtype, problem.spec)
        if problem.lengths is not None:
            padding = np.arange(shape.T)[:, None] >= problem.lengths
            assert not actual[0][padding].any()
        for array, content in zip((problem.x, problem.params, *(problem.states or ())), before, strict=True):
            np.testing.assert_array_equal(array, content)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward(self, mode, shape):
        for dtype in self.dtypes:
            self.check(mode, shape, dtype, expected(mode, shape))


class AnyShape:
    """The same on shapes that no one chose; a class of its own, since a random search need not be repeated often."""

    check, dtypes = Conformance.check, Conformance.dtypes

    # The fixtures hold for all examples; subclasses share the search; some examples are large.
    @settings(
        max_examples=60,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ],
    )
    @given(shape=shapes(), mode=st.sampled_from(MODES), data=st.data())
    def test_forward_on_any_shape(self, shape, mode, data):
        problem = make_problem(mode, shape)
        x, params, states = problem.astype(np.float64)
        oracle = reference.forward(problem.spec, x, params, states, problem.lengths)
        self.check(mode, shape, data.draw(st.sampled_from(self.dtypes)), [oracle])
