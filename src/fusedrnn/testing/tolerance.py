"""When two results count as equal: one function of the dtype and of how many products were summed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.spec import RNNSpec

Array = NDArray[Any]

_BLOCK = 1 << 14
"""Elements that are compared at once: they and what is computed of them stay in a second-level cache."""


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
        terms: K, the longest sum behind an element: :func:`longest_sum` for an output.
        scale: Largest magnitude of the data, if above one; errors grow with it.
    """
    unit = 8.0 * (math.sqrt(terms) + 2.0) * float(np.finfo(dtype).eps)
    return unit, unit * max(1.0, scale)


def longest_sum(spec: RNNSpec) -> int:
    """Products and biases in the longest pre-activation of ``spec``."""
    return max(spec.layer_input_size(layer) for layer in range(spec.num_layers)) + spec.state_size + 2


def gradient_tolerance(dtype: DTypeLike, spec: RNNSpec, steps: int, batch: int, scale: float) -> tuple[float, float]:
    """How far a right gradient of ``spec`` may lie from the exact one: (rtol, atol).

    Three sums stand one behind the other in any of them. Forward, the K products of a pre-activation
    (:func:`longest_sum`) put their rounding into the slopes and values that backward uses. Backward, the gradient of
    a state or of an input is a sum over the D·G·H gate gradients. A weight's is a sum over the T·N steps and
    sequences. Roundings being as good as independent, the three errors add up as squares, so that the terms under
    the root are just added; one that an array does not have (T·N in dx) makes it little looser. Errors flow back
    through time as they flow forward: the transposed weights contract as much, slopes are at most one, and the 8 of
    :func:`tolerance` holds for the same reason.

    A gradient may have any size, as the loss may. What backward rounds is proportional to the gradients that it
    handles, so the absolute part is to the scale of the array, without a lower bound of one. A product left out of
    any of the sums is larger by far: the largest element of an array is some 4·√K products, and 1/(4·√K) is more
    than 2·8·√K·epsilon as long as K is below 100 000 in float32. Measured against float64, torch.nn in float32 used a
    fiftieth of this, and a thirteenth at H = 1.

    This holds as long as no pre-activation of a ReLU is so near to zero that its rounding decides on which side it
    lies; :func:`kink_tolerance` is for workloads so large that some are.

    Args:
        dtype: The lowest precision in which either result was computed.
        spec: The network.
        steps: T.
        batch: N.
        scale: Largest magnitude in the exact array; parameters that lie in one vector are compared each on its own
            scale. Of an array of a few elements take the largest of its neighbours too: a sum that happens to
            cancel says nothing about the size of what was summed.
    """
    terms = longest_sum(spec) + spec.num_directions * spec.num_gates * spec.hidden_size + steps * batch
    rtol, _ = tolerance(dtype, terms)
    return rtol, rtol * scale


def kink_tolerance(dtype: DTypeLike, spec: RNNSpec) -> float:
    """How far the gradients of a large network with corners may lie from the exact ones: norm of the error over theirs.

    A ReLU's slope, like that of anything clipped, is 0 or 1, by the side of a corner where its argument lies: for ReLU,
    of zero. Where that is nearer than its rounding error δ, either is right, and the difference in an element's
    gradient is as large as if a product were missing: no bound on single elements can tell the two apart. There are
    few of them, and their part of the whole is bounded.

    With a density of pre-activations of at most one at the corner, a share of 2·δ is in doubt. What counts is the
    typical error, δ = √K·u for K products (u is half of the epsilon below; the few extreme ones do not make a share),
    not the bound on all. Half of the gradients being zero, a wrong one is worth twice its share of the squared norm;
    what it does at earlier steps adds a half to that (weights contract by 1/√3, see :func:`tolerance`), and every layer
    adds its own: 2·δ · 2 · 1.5 · L altogether. That is 0.4 % of the norm in one layer with K = 1600; a step left out of
    300 is 6 %, one of 800 inputs 3.5 %.
    """
    typical = math.sqrt(longest_sum(spec)) * float(np.finfo(dtype).eps) / 2
    return math.sqrt(6.0 * spec.num_layers * typical)


def norm_difference(actual: Array, expected: Array, limit: float) -> str | None:
    """By how much ``actual`` differs from ``expected`` as a whole, if by more than ``limit`` of its norm.

    NaN differs from everything.
    """
    if actual.shape != expected.shape:
        return f" has shape {actual.shape} instead of {expected.shape}"
    size = float(np.linalg.norm(expected.ravel()))
    error = float(np.linalg.norm((actual - expected).ravel()))
    if error <= limit * size:
        return None
    return f" differs by {error:.3g} from what has the norm {size:.3g}"


def _all_agree(actual: Array, expected: Array, rtol: float, atol: float) -> bool:
    """Whether no element differs: block by block, since gradients of a large network do not fit into the caches."""
    one, other = actual.reshape(-1), expected.reshape(-1)
    with np.errstate(invalid="ignore"):
        for begin in range(0, one.size, _BLOCK):
            block = other[begin : begin + _BLOCK]
            if not (np.abs(one[begin : begin + _BLOCK] - block) <= atol + rtol * np.abs(block)).all():
                return False
    return True


def difference(actual: Array, expected: Array, rtol: float, atol: float) -> str | None:
    """Where and by how much ``actual`` is furthest from ``expected``, or None if they agree.

    Equal means ``|actual - expected| <= atol + rtol * |expected|``; NaN equals nothing.
    """
    if actual.shape != expected.shape:
        return f"shape {actual.shape} instead of {expected.shape}"
    if _all_agree(actual, expected, rtol, atol):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(actual - expected)
        # Where all is zero, the bound may be as well.
        excess = np.divide(error, atol + rtol * np.abs(expected), out=np.zeros_like(error), where=error != 0)
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), np.inf, excess))), excess.shape)
    if excess[worst] <= 1.0:
        return None
    index = ", ".join(str(int(i)) for i in worst)
    return f"[{index}] is {actual[worst]:.9g} instead of {expected[worst]:.9g}"
