"""Random problems for the tests, and how results are compared."""

from dataclasses import dataclass, replace

import numpy as np

from fusedrnn import RNNSpec
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance


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
    """A spec and the arguments of its forward call; for training also the gradients of the call's results."""

    spec: RNNSpec
    x: np.ndarray  # (T, N, I)
    params: np.ndarray
    states: tuple | None
    lengths: np.ndarray | None
    dy: np.ndarray | None = None  # (T, N, D·H)
    dstates: tuple | None = None

    def astype(self, dtype):
        """The same numbers in another format."""
        states = None if self.states is None else tuple(state.astype(dtype) for state in self.states)
        return self.x.astype(dtype), self.params.astype(dtype), states

    def gradients_as(self, dtype):
        """The gradients of the results in another format."""
        return self.dy.astype(dtype), tuple(one.astype(dtype) for one in self.dstates)

    def typed(self, dtype):
        """The same problem in another format."""
        x, params, states = self.astype(dtype)
        dy, dstates = self.gradients_as(dtype)
        return Problem(replace(self.spec, dtype=dtype), x, params, states, self.lengths, dy, dstates)

    @property
    def arrays(self):
        """All arrays of floating-point numbers that calls get."""
        return (self.x, self.params, *(self.states or ()), self.dy, *self.dstates)

    @property
    def padding(self):
        """Where a sequence has ended, (T, N)."""
        ends = len(self.x) if self.lengths is None else self.lengths
        return np.broadcast_to(np.arange(len(self.x))[:, None] >= ends, self.x.shape[:2])


def make_lengths(kind, T, N, rng):
    """Lengths (N,) of a kind: ``full`` is None, ``some`` any but 0, ``edges`` any with 0 and T, ``none`` all 0."""
    if kind == "full":
        return None
    if kind == "none":
        return np.zeros(N, np.int64)
    lengths = rng.integers(1, T + 1, N)
    if kind == "edges":
        # One of each length at which padding can go wrong, in random places.
        for place, length in zip(rng.permutation(N), (0, T, 1), strict=False):
            lengths[place] = length
    return lengths


def make_problem(mode, shape, dtype="float32", seed=0):
    """Numbers that float32 holds exactly, in ``dtype``: one problem serves both formats and their oracle."""
    return problem_of(shape.spec(mode, dtype), shape, seed)


def problem_of(spec, shape, seed=0):
    """The same for a spec of that shape."""
    mode, dtype = spec.mode_name, spec.dtype
    rng = np.random.default_rng([seed, *mode.encode(), shape.T, shape.N, shape.I, shape.H])
    bound = spec.hidden_size**-0.5

    def exact(values):
        return values.astype(np.float32).astype(dtype)

    # If there are many features, they are small: units that saturate hide errors, and their gradients are mere errors.
    x = exact(rng.standard_normal((shape.T, shape.N, shape.I)) * min(1.0, (shape.H / shape.I) ** 0.5))
    params = exact(rng.uniform(-bound, bound, spec.layout.size))
    states = tuple(exact(rng.uniform(-1, 1, state)) for state in spec.state_shape(shape.N))
    lengths = make_lengths(shape.lengths, shape.T, shape.N, rng)
    dy = exact(rng.standard_normal((shape.T, shape.N, spec.output_size)))
    dstates = tuple(exact(rng.standard_normal(state)) for state in spec.state_shape(shape.N))
    return Problem(spec, x, params, states if shape.states else None, lengths, dy, dstates)


def assert_close(actual, expected, dtype, spec):
    """Check that outputs and final states are within the tolerance."""
    rtol, atol = tolerance(dtype, longest_sum(spec))
    names = ("y", *(f"{name}_n" for name in spec.state_names))
    for name, one, other in zip(names, (actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert one.dtype == np.dtype(dtype)
        found = difference(one, other, rtol, atol)
        assert found is None, f"{name}{found}"


def gradient_parts(spec, gradients):
    """The arrays of (dx, dparams, dstates) by name, parameters one by one, in groups of neighbours."""
    dx, dparams, dstates = gradients
    states = {f"d{name}0": one for name, one in zip(spec.state_names, dstates, strict=True)}
    groups = [{"dx": dx, **states}]
    kinds = spec.layout.kinds
    for layer in range(spec.num_layers):
        for direction in range(spec.num_directions):
            groups.append(
                {f"d{kind} {layer}.{direction}": spec.layout.view(dparams, layer, direction, kind) for kind in kinds}
            )
    return groups


# The elements of an array with fewer of them than this may be small by chance: its neighbours say how large sums are.
FEW = 16


def assert_gradients_close(actual, expected, dtype, spec, steps, batch):
    """Check gradients with their tolerance: each array on its own scale, on its neighbours' if it has few elements."""
    for one, other in zip(gradient_parts(spec, actual), gradient_parts(spec, expected), strict=True):
        largest = max(float(np.abs(array).max(initial=0)) for array in other.values())
        for name, exact in other.items():
            assert one[name].dtype == np.dtype(dtype)
            scale = float(np.abs(exact).max()) if exact.size >= FEW else largest
            found = difference(one[name], exact, *gradient_tolerance(dtype, spec, steps, batch, scale))
            assert found is None, f"{name}{found}"


def bits(array):
    """The array's bits as integers: NaN equals itself, and 0 differs from -0."""
    return np.ascontiguousarray(array).view(f"i{array.itemsize}")


def assert_same_bits(one, other):
    """Check that arrays, or nested tuples of arrays and None, are equal to the last bit."""
    if isinstance(one, (tuple, list)):
        for left, right in zip(one, other, strict=True):
            assert_same_bits(left, right)
    elif one is None:
        assert other is None
    else:
        np.testing.assert_array_equal(bits(one), bits(other))
