"""When two results count as equal: tolerances from the dtype and the number of summed products.

docs/internals/tools.md derives them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array
from fusedrnn.spec import RNNSpec

_BLOCK = 1 << 14
"""The number of elements to compare at once, so that temporaries stay in a second-level cache."""


def tolerance(dtype: DTypeLike, terms: int, scale: float = 1.0) -> tuple[float, float]:
    """The largest distance of a correct result in ``dtype`` from the exact result, as (rtol, atol).

    It is 8·(√K + 2)·epsilon for sums of K products, in any order of summation and for any number of steps. If the
    weights do not contract, a state is a sum over all its steps; then pass the number of steps times K.

    Args:
        dtype: The lower precision of the two results.
        terms: K, the length of the longest sum in an element; for an output, :func:`longest_sum`.
        scale: The largest magnitude of the data if it is above one; errors grow with it.
    """
    unit = 8.0 * (math.sqrt(terms) + 2.0) * float(np.finfo(dtype).eps)
    return unit, unit * max(1.0, scale)


def longest_sum(spec: RNNSpec) -> int:
    """The number of products and biases in the longest pre-activation of ``spec``."""
    return max(spec.layer_input_size(layer) for layer in range(spec.num_layers)) + spec.state_size + 2


def gradient_tolerance(dtype: DTypeLike, spec: RNNSpec, steps: int, batch: int, scale: float) -> tuple[float, float]:
    """The largest distance of a correct gradient of ``spec`` from the exact gradient, as (rtol, atol).

    The absolute part is relative to the scale of the array, since rounding errors of backward are proportional to the
    gradients. If pre-activations may be so close to a kink that rounding determines the side, as in large networks with
    ReLU, use :func:`kink_tolerance`.

    Args:
        dtype: The lower precision of the two results.
        spec: The network.
        steps: T.
        batch: N.
        scale: The largest magnitude in the exact array. Compare parameters that share one vector separately, each with
            its own scale. For an array of a few elements, also consider the largest magnitude in related arrays: a sum
            whose terms happen to cancel does not have their magnitude.
    """
    terms = longest_sum(spec) + spec.num_directions * spec.num_gates * spec.hidden_size + steps * batch
    rtol, _ = tolerance(dtype, terms)
    return rtol, rtol * scale


def kink_tolerance(dtype: DTypeLike, spec: RNNSpec) -> float:
    """The largest distance of the gradients of a large network with kinks from the exact ones, relative to their norm.

    If rounding determines the side of a kink, a single element can differ by a whole product, but few elements do.
    """
    return kink_error(spec, math.sqrt(longest_sum(spec)) * float(np.finfo(dtype).eps) / 2)


def kink_error(spec: RNNSpec, typical: float) -> float:
    """:func:`kink_tolerance` for a typical error of a pre-activation."""
    return math.sqrt(6.0 * spec.num_layers * typical)


def norm_difference(actual: Array, expected: Array, limit: float) -> str | None:
    """Describe the difference if its norm is above ``limit`` times the norm of ``expected``; else None.

    NaN differs from everything.
    """
    if actual.shape != expected.shape:
        return f" has shape {actual.shape} instead of {expected.shape}"
    size = float(np.linalg.norm(expected.ravel()))
    error = float(np.linalg.norm((actual - expected).ravel()))
    if error <= limit * size:
        return None
    return f" differs by a norm of {error:.3g} from an array of norm {size:.3g}"


def _all_agree(actual: Array, expected: Array, rtol: float, atol: float) -> bool:
    """Whether no element differs, tested by blocks, since gradients of large networks do not fit into the caches."""
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    with np.errstate(invalid="ignore"):
        for start in range(0, actual.size, _BLOCK):
            block = expected[start : start + _BLOCK]
            if not (np.abs(actual[start : start + _BLOCK] - block) <= atol + rtol * np.abs(block)).all():
                return False
    return True


def difference(actual: Array, expected: Array, rtol: float, atol: float) -> str | None:
    """Describe the element that exceeds its tolerance most, or None if none does.

    The condition is ``|actual - expected| <= atol + rtol * |expected|``, which NaN never meets.
    """
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if _all_agree(actual, expected, rtol, atol):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(actual - expected)
        # The bound of an element may be zero; then only an exact element is equal.
        excess = np.divide(error, atol + rtol * np.abs(expected), out=np.zeros_like(error), where=error != 0)
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), np.inf, excess))), excess.shape)
    if excess[worst] <= 1.0:
        return None
    index = ", ".join(str(int(i)) for i in worst)
    return f"[{index}] is {actual[worst]:.9g} instead of {expected[worst]:.9g}"
