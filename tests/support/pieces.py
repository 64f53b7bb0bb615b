"""Separate calls on the pieces of sequences with resets: a call with resets must equal them to the last bit."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class ResetResults:
    """The results of a call with resets, in training with gradients; those of parameters equal within rounding."""

    outputs: tuple  # y, then every other state of every step
    final: tuple
    dx: np.ndarray | None = None
    dparams: np.ndarray | None = None
    dstates: tuple | None = None
    dreset: tuple | None = None


def random_resets(problem, seed=0, rate=0.4):
    """Marks (T, N), some of them in the padding, and states after resets."""
    rng = np.random.default_rng(seed)
    T, N = problem.x.shape[:2]
    resets = rng.random((T, N)) < rate
    resets[0, : N // 2] = True
    shapes = problem.spec.state_shape(N)
    # Positive: a state of the sLSTM is a divisor.
    return resets, tuple(rng.uniform(0.5, 1, shape).astype(problem.spec.dtype) for shape in shapes)


def random_state_gradients(problem, seed=0):
    """Gradients of every state of every step that the output does not show."""
    rng = np.random.default_rng(seed)
    spec = problem.spec
    shapes = [(*problem.x.shape[:2], size) for size in spec.other_state_features]
    return tuple(rng.standard_normal(shape).astype(spec.dtype) for shape in shapes)


def in_pieces(op, problem, resets, reset_states=None, dall=None, **options):
    """One call for each piece of each sequence; with ``training`` their gradients joined."""
    spec, (T, N) = problem.spec, problem.x.shape[:2]
    D, dtype = spec.num_directions, spec.dtype
    zeros = tuple(np.zeros(shape, dtype) for shape in spec.state_shape(N))
    initial, replaced = problem.states or zeros, reset_states or zeros
    sizes = [spec.output_size, *spec.other_state_features]
    outputs = tuple(np.zeros((T, N, size), dtype) for size in sizes)
    final = tuple(state.copy() for state in initial)
    trains = options.get("training", False)
    dx, dparams, dstates, dreset = np.zeros_like(problem.x), 0, None, tuple(state.copy() for state in zeros)
    if trains:
        dstates = tuple(state.copy() for state in problem.dstates)
    reverses = np.array([spec.reverses(index % D) for index in range(len(zeros[0]))])
    for n in range(N):
        length = T if problem.lengths is None else int(problem.lengths[n])
        starts = [t for t in range(length) if resets[t, n] or t == 0]
        pieces = list(pairwise([*starts, length]))
        results = {}
        for number, (begin, end) in enumerate(pieces):
            # A direction starts from the initial states where the sequence begins in its order.
            is_first = np.where(reverses, number == len(pieces) - 1, number == 0 and not resets[0, n])
            is_last = np.where(reverses, number == 0, number == len(pieces) - 1)
            own = (slice(None), slice(n, n + 1))
            states = tuple(
                np.where(is_first[:, None, None], a[own], b[own]) for a, b in zip(initial, replaced, strict=True)
            )
            part = slice(begin, end), slice(n, n + 1)
            every, after, reserve = op.forward(problem.x[part], problem.params, states, all_states=True, **options)
            for array, values in zip(outputs, every, strict=True):
                array[part] = values
            for array, values in zip(final, after, strict=True):
                array[is_last, n] = values[is_last, 0]
            if trains:
                ends = tuple(np.where(is_last[:, None, None], grad[own], 0) for grad in problem.dstates)
                others = [grad[part] for grad in dall] if dall else [None] * (len(spec.state_names) - 1)
                dx[part], dp, db = op.backward((problem.dy[part], *others), ends, reserve)
                dparams = dparams + dp.astype(np.float64)
                results[number] = is_first, db
        if results:
            _join(results, reverses, n, dstates, dreset)
    return ResetResults(outputs, final, dx, dparams, dstates, dreset)


def _join(results, reverses, n, dstates, dreset):
    """Give the gradients of the pieces' initial states to dstates and dreset, in the order of backward."""
    for array in dstates:
        array[:, n] = 0
    for number in sorted(results, reverse=True):
        is_first, gradients = results[number]
        _add(is_first, ~reverses, gradients, n, dstates, dreset)
    for number in sorted(results):
        is_first, gradients = results[number]
        _add(is_first, reverses, gradients, n, dstates, dreset)


def _add(is_first, directions, gradients, n, dstates, dreset):
    for index in np.flatnonzero(directions):
        for initial, replaced, gradient in zip(dstates, dreset, gradients, strict=True):
            if is_first[index]:
                initial[index, n] = gradient[index, 0]
            else:
                replaced[index, n] += gradient[index, 0]
