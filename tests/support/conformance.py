"""The conformance suite: what every engine, adapter and instruction set must compute. Subclasses say how to run it."""

from dataclasses import replace
from itertools import cycle, product

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pairwise
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import ODD_SIZES
from oracles import (
    absences,
    expected,
    expected_dropout,
    expected_training,
    near_kink,
    reference_results,
    training_problem,
    without,
)
from problems import Shape, assert_close, assert_gradients_close, make_problem

# They have every odd size in every place, every depth in both directions, and lengths and states of every kind. Some of
# their batches and layers are large enough for every way to split work over two and three threads.
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
    Shape(17, 3, 17, 17, layers=3, lengths="edges"),
)
TRAINING_SHAPES = (
    *SHAPES,
    Shape(2, 2, 2, 17, layers=4),
    Shape(3, 17, 17, 3, layers=4, bidirectional=True, lengths="edges"),
)
# For tests with many other parameters: small shapes, but of several layers, in both directions and in one.
REQUEST_SHAPES = (
    Shape(3, 2, 17, 3, layers=2, lengths="edges"),
    Shape(3, 3, 2, 17, layers=2, bidirectional=True, lengths="some"),
)
DROPOUT_SHAPES = (
    Shape(3, 17, 2, 17, layers=2),
    Shape(17, 3, 63, 17, layers=3, bidirectional=True, lengths="edges"),
    Shape(2, 3, 1, 129, layers=4, lengths="some", states=False),
)
KEEPS = ("gates", "states")
REQUESTS = ("write", "add", "null")


@st.composite
def shapes(draw, largest=63, deepest=3):
    """Small problems of any kind."""
    size = st.sampled_from([size for size in ODD_SIZES if size <= largest] + [5, 8, 12, 24])
    lengths = st.sampled_from(["full", "some", "edges", "none"])
    return Shape(
        draw(size), draw(size), draw(size), draw(size), draw(st.integers(1, deepest)), draw(st.booleans()),
        draw(lengths), draw(st.booleans()),
    )  # fmt: skip


# Why these checks are off: the fixtures are the same for all examples, subclasses share the search, and some examples
# are large.
RANDOM_SEARCH = {
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ]
}


class Conformance:
    """Inference against torch.nn and the reference, outputs and final states.

    A subclass gives :meth:`run`, and narrows ``dtypes`` and :meth:`fit` to what its engine has. Its fixtures choose
    targets, threads and whatever else the result must not depend on.
    """

    dtypes = ("float32", "float64")

    @staticmethod
    def fit(shape):
        """A shape that the engine can run: without what the engine lacks."""
        return shape

    def run(self, spec, x, params, states, lengths):
        """Outputs (T, N, D·S) and a tuple of final states, of the spec's dtype."""
        raise NotImplementedError

    def check(self, mode, shape, dtype, oracles):
        """Compare one problem with what the oracles said."""
        problem = make_problem(mode, shape, dtype)
        before = [array.copy() for array in problem.arrays]
        actual = self.run(problem.spec, problem.x, problem.params, problem.states, problem.lengths)
        for oracle in oracles:
            assert_close(actual, oracle, dtype, problem.spec)
        assert not actual[0][problem.padding].any()
        for array, content in zip(problem.arrays, before, strict=True):
            np.testing.assert_array_equal(array, content)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward(self, mode, shape):
        shape = self.fit(shape)
        for dtype in pairwise.dtypes(mode, self.dtypes):
            self.check(mode, shape, dtype, expected(mode, shape))


class AnyShape:
    """The same on random shapes; a class of its own, since a random search need not be repeated in every subclass."""

    check, dtypes, fit = Conformance.check, Conformance.dtypes, staticmethod(Conformance.fit)

    @settings(max_examples=60, **RANDOM_SEARCH)
    @given(shape=shapes(), mode=st.sampled_from(MODES), data=st.data())
    def test_forward_on_any_shape(self, shape, mode, data):
        shape = self.fit(shape)
        problem = make_problem(mode, shape)
        x, params, states = problem.astype(np.float64)
        oracle = reference.forward(problem.spec, x, params, states, problem.lengths)
        self.check(mode, shape, data.draw(st.sampled_from(self.dtypes)), [oracle])


class TrainingConformance:
    """Training against torch.nn and the reference: outputs, final states, the gradients of everything.

    A subclass gives :meth:`train`, and narrows ``dtypes``, ``keeps`` and ``fit`` to what its engine has. An adapter
    without requests leaves out ``test_requests``, an engine without dropout ``test_dropout``.
    """

    dtypes = ("float32", "float64")
    keeps = KEEPS
    fit = staticmethod(Conformance.fit)

    def train(self, spec, x, params, states, lengths, keep, seed):
        """Outputs, a tuple of final states, and backward: a function of (dy, dstates, **grad_req and out)."""
        raise NotImplementedError

    def forward(self, problem, keep, oracle, seed=0):
        """Train on a problem, compare what comes out, return backward."""
        spec = problem.spec
        y, final, backward = self.train(spec, problem.x, problem.params, problem.states, problem.lengths, keep, seed)
        assert_close((y, final), oracle.forward, spec.dtype, spec)
        assert not y[problem.padding].any()
        return backward

    def check(self, problem, keep, oracles, seed=0):
        """Compare one problem with the results of oracles; the name of each, up to a space, says what was absent."""
        spec, (steps, batch) = problem.spec, problem.x.shape[:2]
        before = [array.copy() for array in problem.arrays]
        backward = self.forward(problem, keep, next(iter(oracles.values())), seed)
        for name, oracle in oracles.items():
            given = without(spec, problem.dy, problem.dstates, name.split()[0])
            actual = backward(*given)
            assert_gradients_close(actual, oracle.gradients, spec.dtype, spec, steps, batch)
            assert not actual[0][problem.padding].any()
        for array, content in zip(problem.arrays, before, strict=True):
            np.testing.assert_array_equal(array, content)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", TRAINING_SHAPES, ids=str)
    def test_gradients(self, mode, shape):
        shape = self.fit(shape)
        by_torch, by_reference = expected_training(mode, shape)
        dtypes = pairwise.dtypes(mode, self.dtypes)
        for dtype, keep in product(dtypes, self.keeps):
            problem = training_problem(mode, shape, dtype)
            # What may be absent depends neither on what was kept nor on the format: one combination tests it.
            known = by_torch if (dtype, keep) == (dtypes[0], self.keeps[-1]) else {"nothing": by_torch["nothing"]}
            self.check(problem, keep, known | {"nothing (reference)": by_reference})

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", DROPOUT_SHAPES, ids=str)
    def test_dropout(self, mode, shape):
        shape = self.fit(shape)
        problem, seed, oracle = expected_dropout(mode, shape)
        for dtype, keep in product(pairwise.dtypes(mode, self.dtypes), self.keeps):
            self.check(problem.typed(dtype), keep, {"nothing": oracle}, seed)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", REQUEST_SHAPES, ids=str)
    def test_requests(self, mode, shape):
        """Every combination: written gradients are right, added ones are added to what was there, null does nothing."""
        shape = self.fit(shape)
        oracle = expected_training(mode, shape)[1]
        # Requests do not depend on what was kept.
        for dtype, keep in zip(pairwise.dtypes(mode, self.dtypes), cycle(self.keeps), strict=False):
            problem = training_problem(mode, shape, dtype)
            backward = self.forward(problem, keep, oracle)
            for requests in product(REQUESTS, repeat=3):
                buffers, wanted = zip(*map(self._buffer, requests, oracle.gradients, [dtype] * 3), strict=True)
                given = tuple(None if one == "null" else buffer for one, buffer in zip(requests, buffers, strict=True))
                grad_req = dict(zip(("x", "params", "states"), requests, strict=True))
                found = backward(problem.dy, problem.dstates, grad_req=grad_req, out=given)
                for one, buffer in zip(found, given, strict=True):
                    assert one is buffer or all(a is b for a, b in zip(one, buffer, strict=True))
                assert_gradients_close(buffers, wanted, dtype, problem.spec, shape.T, shape.N)

    @staticmethod
    def _buffer(request, gradient, dtype):
        """What the caller's buffer of a gradient holds before the call, and what it must hold after it."""
        if isinstance(gradient, tuple):
            return tuple(zip(*(TrainingConformance._buffer(request, one, dtype) for one in gradient), strict=True))
        held = np.random.default_rng(0).standard_normal(gradient.shape)
        wanted = {"write": gradient, "add": held + gradient, "null": held}[request]
        buffer = held.astype(dtype)
        if request == "write":
            buffer.fill(np.nan)
        return buffer, wanted


class AnyTrainingShape:
    """Gradients on random shapes."""

    forward, check = TrainingConformance.forward, TrainingConformance.check
    dtypes, keeps, fit = TrainingConformance.dtypes, TrainingConformance.keeps, staticmethod(TrainingConformance.fit)
    drops = True

    @settings(max_examples=30, **RANDOM_SEARCH)
    @given(
        shape=shapes(largest=17, deepest=4), mode=st.sampled_from(MODES), p=st.sampled_from([0.0, 0.0, 0.5]),
        data=st.data(),
    )  # fmt: skip
    def test_gradients_on_any_shape(self, shape, mode, p, data):
        dtype, keep = data.draw(st.sampled_from(self.dtypes)), data.draw(st.sampled_from(self.keeps))
        shape = self.fit(shape)
        problem = make_problem(mode, shape)
        problem = replace(problem, spec=replace(problem.spec, dropout=p if self.drops else 0.0))
        assume(not near_kink(problem))
        absent = data.draw(st.sampled_from(absences(problem.spec)))
        self.check(problem.typed(dtype), keep, {absent: reference_results(problem, absent=absent)})
