"""When two results count as equal: one function of the dtype and of how many products were summed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


def tolerance(dtype: DTypeLike, terms: int, scale: float = 1.0) -> tuple[float, float]:
    """How far a right result in ``dtype`` may lie from the exact one: (rtol, atol).

    A sum of K products is rounded K times, each time by at most half a unit in the last place of a partial sum.
    The roundings are as good as independent, so their sum grows with √K, and stays below λ·√K·u with overwhelming
    probability for λ of a few (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM
    J. Sci. Comput. 41, 2019; u is half of the epsilon below). The order of the sum, which differs between BLAS and
    our kernels, does not enter. A cell's functions add a few units that do not depend on K: the 2 below.

    The number of steps does not enter either. Weights uniform in ±1/√H have a spectral radius of 1/√3 at most in
    expectation, and no cell's functions have a slope above one, so what one step got wrong is worth 0.58 of that a
    step later: over any number of steps the errors add up to 1 / (1 - 0.58) = 2.4 times those of one. With λ = 6.7
    this gives 8·√K·epsilon. Against float64 the float32 reference used up to a third of that on odd sizes (H = 1,
    hardly contracting, is the worst) and a thirtieth of it at K = 1600. One product left out, in the hundredths
    there, is a thousand times more. With weights that do not contract a state is a sum over all its steps: pass
    the number of steps times K.

    Args:
        dtype: The lowest precision in which either result was computed.
        terms: K, the longest sum behind an element: :func:`longest_sum` for an output, T·N for a weight gradient.
        scale: Largest magnitude of the data, if above one; errors grow with it.
    """
    unit = 8.0 * (math.sqrt(terms) + 2.0) * float(np.finfo(dtype).eps)
    return unit, unit * max(1.0, scale)


def longest_sum(spec: RNNSpec) -> int:
    """Products and biases in the longest pre-activation of ``spec``."""
    return max(spec.layer_input_size(layer) for layer in range(spec.num_layers)) + spec.state_size + 2


def difference(actual: Array, expected: Array, rtol: float, atol: float) -> str | None:
    """Where and by how much ``actual`` is furthest from ``expected``, or None if they agree.

    Equal means ``|actual - expected| <= atol + rtol * |expected|``; NaN equals nothing.
    """
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if not actual.size:
        return None
    with np.errstate(invalid="ignore"):
        excess = np.abs(actual - expected) / (atol + rtol * np.abs(expected))
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), np.inf, excess))), excess.shape)
    if excess[worst] <= 1.0:
        return None
    index = ", ".join(str(int(i)) for i in worst)
    return f"[{index}] is {actual[worst]:.9g} instead of {expected[worst]:.9g}"
