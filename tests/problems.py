"""Random problems for the tests, and how results are compared."""

from dataclasses import dataclass

import numpy as np

from fusedrnn import RNNSpec
from fusedrnn.bench.tolerance import difference, longest_sum, tolerance


@dataclass(frozen=True)
class Shape:
    """A problem without its cell and number format; ``lengths`` names a kind of :func:`make_lengths`."""

    T: int
    N: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: str = "full"
    states: bool = True

    def __str__(self):
        way = "bi" if self.bidirectional else "uni"
        states = "states" if self.states else "zeros"
        return f"T{self.T}-N{self.N}-I{self.I}-H{self.H}-{self.layers}{way}-{self.lengths}-{states}"

    def spec(self, mode, dtype="float32"):
        return RNNSpec(mode, self.I, self.H, self.layers, self.bidirectional, dtype=dtype)


@dataclass(frozen=True)
class Problem:
    """A spec and the arguments of its forward call."""

    spec: RNNSpec
    x: np.ndarray  # (T, N, I)
    params: np.ndarray
    states: tuple | None
    lengths: np.ndarray | None

    def astype(self, dtype):
        """The same numbers in another format."""
        states = None if self.states is None else tuple(state.astype(dtype) for state in self.states)
        return self.x.astype(dtype), self.params.astype(dtype), states


def make_lengths(kind, T, N, rng):
    """Lengths (N,) of a kind: none at all, any but 0, any with 0 and T among them, or 0 everywhere."""
    if kind == "full":
        return None
    if kind == "none":
        return np.zeros(N, np.int64)
    lengths = rng.integers(1, T + 1, N)
    if kind == "edges":
        # One of each that padding can go wrong at, in no order.
        for place, length in zip(rng.permutation(N), (0, T, 1), strict=False):
            lengths[place] = length
    return lengths


def make_problem(mode, shape, dtype="float32", seed=0):
    """Numbers that float32 holds exactly, in ``dtype``: one problem serves both formats and their oracle."""
    spec = shape.spec(mode, dtype)
    rng = np.random.default_rng([seed, *mode.encode(), shape.T, shape.N, shape.I, shape.H])
    bound = spec.hidden_size**-0.5

    def exact(values):
        return values.astype(np.float32).astype(dtype)

    x = exact(rng.standard_normal((shape.T, shape.N, shape.I)))
    params = exact(rng.uniform(-bound, bound, spec.layout.size))
    states = tuple(exact(rng.uniform(-1, 1, state)) for state in spec.state_shape(shape.N))
    lengths = make_lengths(shape.lengths, shape.T, shape.N, rng)
    return Problem(spec, x, params, states if shape.states else None, lengths)


def assert_close(actual, expected, dtype, spec):
    """Outputs and final states within the one tolerance there is."""
    rtol, atol = tolerance(dtype, longest_sum(spec))
    names = ("y", *(f"{name}_n" for name in spec.state_names))
    for name, one, other in zip(names, (actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert one.dtype == np.dtype(dtype)
        found = difference(one, other, rtol, atol)
        assert found is None, f"{name}{found}"


def bits(array):
    """The array's bits as integers: NaN equals itself, and 0 differs from -0."""
    return np.ascontiguousarray(array).view(f"i{array.itemsize}")


def assert_same_bits(one, other):
    """Outputs and final states alike to the last bit."""
    for left, right in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        np.testing.assert_array_equal(bits(left), bits(right))
