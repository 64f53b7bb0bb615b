"""The gate in front of every figure: what a contender computed against the reference, all outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fusedrnn.bench.computed import NON_FUSED, TORCH, Array, Computed, Contender, Results
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Workload
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.tolerance import (
    difference,
    gradient_tolerance,
    kink_tolerance,
    longest_sum,
    norm_difference,
    tolerance,
)

CHECKED_FLOPS = 2e10
"""Work up to which the check by the float64 reference covers every step: about a second of it."""

_FEWEST_STEPS = 2
"""A single step has no recurrence."""


def checked_steps(steps: int, flops: float) -> int:
    """How many of ``steps`` steps, ``flops`` altogether, are checked in float64."""
    return min(steps, max(_FEWEST_STEPS, round(steps * CHECKED_FLOPS / flops)))


def check(work: Workload, phase: Phase, contenders: Mapping[str, Contender], flops: int) -> str | None:
    """What is wrong with any contender against the reference in float64, or None.

    As many steps are run as the reference can do in about a second; the contenders are warm then.
    """
    steps = checked_steps(work.case.T, flops)
    batch, exact = work.batch(steps), work.exact()
    expected = phase.makers[NON_FUSED](exact)(exact.batch(steps))()
    for who, call in contenders.items():
        if wrong := _compare(work, steps, call(batch)(), expected, sides=1):
            return f"{who}: {wrong} ({steps} of {work.case.T} steps, float64 reference)"
    return None


def check_timed(
    work: Workload, phase: Phase, computed: Mapping[str, Computed], base: str | None = None, steps: int | None = None
) -> str | None:
    """What is wrong with the results that were timed, of all steps or of the first ``steps``, or None.

    They are compared with those of ``base``; by default with the non-fused ones if those were timed, else with
    torch.nn's.
    """
    base, steps = base or (NON_FUSED if NON_FUSED in computed else TORCH), steps or work.case.T
    expected = (computed[base] if base in computed else phase.makers[base](work)(work.batch(steps)))()
    for who, results in computed.items():
        if who != base and (wrong := _compare(work, steps, results(), expected, sides=2)):
            place = "as timed" if steps == work.case.T else f"{steps} of {work.case.T} steps"
            return f"{who}: {wrong} ({place}, {base} reference)"
    return None


def check_part(
    work: Workload, phase: Phase, contenders: Mapping[str, Contender], computed: Mapping[str, Computed], steps: int
) -> str | None:
    """The same where the non-fused network was timed on its first ``steps`` steps, the others on all.

    Their results of all steps are compared with torch.nn's if that was timed, else they must be finite; then they run
    so many steps as well, and these are compared with the non-fused results.
    """
    others = {who: results for who, results in computed.items() if who != NON_FUSED}
    if TORCH in others and (wrong := check_timed(work, phase, others)):
        return wrong
    for who, results in others.items():
        if endless := [name for name, array in results().items() if not np.isfinite(array).all()]:
            return f"{who}: {', '.join(endless)} not finite (as timed)"
    batch = work.batch(steps)
    for who in others:
        pair = {NON_FUSED: computed[NON_FUSED], who: contenders[who](batch)}
        if wrong := check_timed(work, phase, pair, steps=steps):
            return wrong
    return None


def compare(work: Workload, actual: Results, expected: Results) -> str | None:
    """How results of all steps differ that were both computed in the workload's dtype, or None."""
    if missing := expected.keys() - actual.keys():
        return f"{', '.join(sorted(missing))} missing"
    return _compare(work, work.case.T, actual, expected, sides=2)


def _compare(work: Workload, steps: int, actual: Results, expected: Results, sides: int) -> str | None:
    """``sides`` is how many of the two were rounded to the workload's dtype."""
    spec = work.spec
    for (name, one), (_, other) in zip(_parts(spec, actual, expected), _parts(spec, expected, expected), strict=True):
        if name.startswith("d"):
            wrong = _gradient_difference(work, steps, one, other, sides)
        else:
            rtol, atol = tolerance(spec.dtype, longest_sum(spec), float(np.max(np.abs(work.x))))
            wrong = difference(one, other, sides * rtol, sides * atol)
        if wrong:
            return f"{name}{wrong}"
    return None


def _gradient_difference(work: Workload, steps: int, one: Array, other: Array, sides: int) -> str | None:
    spec = work.spec
    if spec.variant.has_kinks:
        return norm_difference(one, other, sides * kink_tolerance(spec.dtype, spec))
    largest = float(np.maximum(np.max(other), -np.min(other)))
    rtol, atol = gradient_tolerance(spec.dtype, spec, steps, work.case.N, largest)
    return difference(one, other, sides * rtol, sides * atol)


def _parts(spec: RNNSpec, results: Results, order: Results) -> Iterator[tuple[str, Array]]:
    """The arrays in the order of another's, each parameter's gradient for itself: a layer has its own scale."""
    for name in order:
        if name == "dparams":
            yield from ((f"dparams {part}", array) for part, array in spec.layout.unpack(results[name]).items())
        else:
            yield name, results[name]
