"""When two results count as equal: tolerances from the dtype and the number of summed products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.spec import RNNSpec

Array = NDArray[Any]

_BLOCK = 1 << 14
"""Number of elements that are compared at once, so that temporaries stay in a second-level cache."""


def tolerance(dtype: DTypeLike, terms: int, scale: float = 1.0) -> tuple[float, float]:
    """Largest distance of a correct result in ``dtype`` from the exact one, as (rtol, atol).

    A sum of K products is rounded K times, each time by at most half a unit in the last place of a partial sum. The
    rounding errors are practically independent, so their sum grows with √K, and is below λ·√K·u with overwhelming
    probability for a λ of a few (Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM
    J. Sci. Comput. 41, 2019; u is half of the epsilon below). The order of summation, in which BLAS and our kernels
    differ, does not matter. The functions of a cell add a few units that do not depend on K: the 2 below.

    The number of steps does not matter either. Weights uniform in ±1/√H have an expected spectral radius of at most
    1/√3, and no function of a cell has a slope above one. An error of one step therefore counts 0.58 of its size one
    step later, and over any number of steps the errors add up to at most 1 / (1 - 0.58) = 2.4 times the error of one
    step. With λ = 6.7 this gives 8·√K·epsilon. The float32 reference, measured against float64, used up to a third of
    this on odd sizes (H = 1, which hardly contracts, is the worst) and a thirtieth at K = 1600. A missing product is a
    thousand times larger. If the weights do not contract, a state is a sum over all its steps: pass the number of
    steps times K.

    Args:
        dtype: The lower precision of the two results.
        terms: K, the length of the longest sum in an element: :func:`longest_sum` for an output.
        scale: Largest magnitude of the data if it is above one; errors grow with it.
    """
    unit = 8.0 * (math.sqrt(terms) + 2.0) * float(np.finfo(dtype).eps)
    return unit, unit * max(1.0, scale)


def longest_sum(spec: RNNSpec) -> int:
    """Number of products and biases in the longest pre-activation of ``spec``."""
    return max(spec.layer_input_size(layer) for layer in range(spec.num_layers)) + spec.state_size + 2


def gradient_tolerance(dtype: DTypeLike, spec: RNNSpec, steps: int, batch: int, scale: float) -> tuple[float, float]:
    """Largest distance of a correct gradient of ``spec`` from the exact one, as (rtol, atol).

    A gradient depends on three sums in sequence. Forward, the K products of a pre-activation (:func:`longest_sum`)
    round the slopes and values that backward uses. Backward, the gradient of a state or an input is a sum over the
    D·G·H gradients of the gates. The gradient of a weight is a sum over T·N steps and sequences. The rounding errors
    are practically independent, so the squares of the three errors add up, and the lengths of the sums are added under
    the root. A sum that an array does not have, such as T·N in dx, loosens its bound only a little. Errors flow back
    through time as they flow forward: the transposed weights contract equally and slopes are at most one, so the
    factor 8 of :func:`tolerance` holds here too.

    A gradient may have any magnitude, as the loss may. Rounding errors of backward are proportional to the gradients,
    so the absolute part is relative to the scale of the array, without a lower bound of one. A product missing from
    any of the sums is far larger: the largest element of an array is about 4·√K products, and 1/(4·√K) is above
    2·8·√K·epsilon while K is below 100 000 in float32. Measured against float64, torch.nn in float32 used a fiftieth
    of this bound, and a thirteenth at H = 1.

    The bound holds if no pre-activation of a ReLU is so close to zero that rounding decides its sign.
    :func:`kink_tolerance` is for workloads that are so large that some are.

    Args:
        dtype: The lower precision of the two results.
        spec: The network.
        steps: T.
        batch: N.
        scale: Largest magnitude in the exact array. Parameters that share one vector are compared separately, each
            with its own scale. For an array of a few elements take the largest of its neighbours too: a sum that
            happens to cancel does not show the magnitude of its terms.
    """
    terms = longest_sum(spec) + spec.num_directions * spec.num_gates * spec.hidden_size + steps * batch
    rtol, _ = tolerance(dtype, terms)
    return rtol, rtol * scale


def kink_tolerance(dtype: DTypeLike, spec: RNNSpec) -> float:
    """Largest distance of the gradients of a large network with kinks from the exact ones, relative to their norm.

    The slope of a ReLU, as of any clipped function, is 0 or 1 depending on the side of a kink: for ReLU, of zero. If an
    argument is closer to the kink than its rounding error δ, both slopes are correct, and a single element of the
    gradient can differ as much as if a product were missing. So no bound on single elements works. Such arguments are
    few, however, and their share of the norm is bounded.

    If the density of pre-activations at the kink is at most one, a share of 2·δ of them is ambiguous. The typical
    error counts here, δ = √K·u for K products (u is half of the epsilon below), not the bound on all errors, which few
    elements reach. Half of the gradients are zero, so a wrong one counts twice its share of the squared norm. Its
    effect on earlier steps adds a half to that (weights contract by 1/√3, see :func:`tolerance`), and every layer adds
    its own: 2·δ · 2 · 1.5 · L in total. That is 0.4 % of the norm for one layer with K = 1600. A missing step of 300 is
    6 %, and a missing input of 800 is 3.5 %.
    """
    typical = math.sqrt(longest_sum(spec)) * float(np.finfo(dtype).eps) / 2
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
    """Whether no element differs, block by block: the gradients of a large network do not fit into the caches."""
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    with np.errstate(invalid="ignore"):
        for start in range(0, actual.size, _BLOCK):
            block = expected[start : start + _BLOCK]
            if not (np.abs(actual[start : start + _BLOCK] - block) <= atol + rtol * np.abs(block)).all():
                return False
    return True


def difference(actual: Array, expected: Array, rtol: float, atol: float) -> str | None:
    """Describe the element that exceeds its tolerance most, or None if none does.

    The condition is ``|actual - expected| <= atol + rtol * |expected|``, which no NaN meets.
    """
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if _all_agree(actual, expected, rtol, atol):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(actual - expected)
        # The bound of an element may be zero: then only an exact element is equal.
        excess = np.divide(error, atol + rtol * np.abs(expected), out=np.zeros_like(error), where=error != 0)
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), np.inf, excess))), excess.shape)
    if excess[worst] <= 1.0:
        return None
    index = ", ".join(str(int(i)) for i in worst)
    return f"[{index}] is {actual[worst]:.9g} instead of {expected[worst]:.9g}"
