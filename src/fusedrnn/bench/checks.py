"""Compares the results of contenders with a reference. A contender with a wrong result gets no figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import NON_FUSED, TORCH, Contender, GetResults, Results, Workload
from fusedrnn.cell.cells import Cell
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.format_tolerance import format_gradient_tolerance, format_tolerance, pre_activation_error
from fusedrnn.testing.tolerance import (
    difference,
    gradient_tolerance,
    kink_tolerance,
    longest_sum,
    norm_difference,
    tolerance,
)

CHECKED_FLOPS = 2e10
"""The operations that the check in float64 covers, which take the reference about a second."""

_MIN_STEPS = 2
"""The least number of steps to check: a single step has no recurrence."""


def checked_steps(steps: int, flops: float) -> int:
    """How many of ``steps`` steps to check in float64; ``flops`` is the number of operations of all."""
    return min(steps, max(_MIN_STEPS, round(steps * CHECKED_FLOPS / flops)))


def check(work: Workload, phase: Phase, contenders: Mapping[str, Contender]) -> str | None:
    """Compare each contender on the first steps with the reference in float64. Returns a text on the first difference.

    This also warms up the contenders.
    """
    steps = checked_steps(work.case.T, work.flops(training=phase.training))
    batch, exact = work.batch(steps), work.exact()
    expected = phase.makers[NON_FUSED](exact)(exact.batch(steps))()
    for name, contender in contenders.items():
        if error := compare(work, steps, contender(batch)(), expected, num_rounded=1):
            return f"{name}: {error} ({steps} of {work.case.T} steps, float64 reference)"
    return None


def check_timed(
    work: Workload, phase: Phase, results: Mapping[str, GetResults], base: str | None = None, steps: int | None = None
) -> str | None:
    """Compare timed results, of all steps or of the first ``steps``. Returns a text on the first difference.

    They are compared with the results of ``base``: by default the non-fused network if it was timed, else torch.nn.
    """
    base, steps = base or (NON_FUSED if NON_FUSED in results else TORCH), steps or work.case.T
    if base in results:
        expected = results[base]()
    else:
        in_dtype = work.in_format(work.spec.dtype)
        expected = phase.makers[base](in_dtype)(in_dtype.batch(steps))()
    for name, get_results in results.items():
        if name != base and (error := compare(work, steps, get_results(), expected, num_rounded=2)):
            what = "as timed" if steps == work.case.T else f"{steps} of {work.case.T} steps"
            return f"{name}: {error} ({what}, {base} reference)"
    return None


def check_first_steps(
    work: Workload, phase: Phase, contenders: Mapping[str, Contender], results: Mapping[str, GetResults], steps: int
) -> str | None:
    """Like :func:`check_timed`, for a row whose non-fused network was timed only on its first ``steps`` steps.

    Results of all steps are compared with torch.nn's if torch.nn was timed; else they must be finite. Then each
    contender runs ``steps`` steps, and the results are compared with those of the non-fused network.
    """
    others = {name: get_results for name, get_results in results.items() if name != NON_FUSED}
    if TORCH in others and (error := check_timed(work, phase, others)):
        return error
    for name, get_results in others.items():
        if bad := [array_name for array_name, array in get_results().items() if not np.isfinite(array).all()]:
            return f"{name}: {', '.join(bad)} not finite (as timed)"
    batch = work.batch(steps)
    for name in others:
        pair = {NON_FUSED: results[NON_FUSED], name: contenders[name](batch)}
        if error := check_timed(work, phase, pair, steps=steps):
            return error
    return None


def compare(work: Workload, steps: int, actual: Results, expected: Results, num_rounded: int) -> str | None:
    """A text on the first difference between results of the first ``steps`` steps, or None.

    ``num_rounded`` says how many of the two were computed in the workload's dtype; each of these adds a tolerance. Only
    ``actual`` may be computed from operands in another format, which adds a further tolerance.
    """
    if missing := expected.keys() - actual.keys():
        return f"{', '.join(sorted(missing))} missing"
    spec = work.spec
    error_of_format = pre_activation_error(spec, work.params)
    largest_gradient = _largest(expected["dparams"]) if "dparams" in expected else 0.0
    pairs = zip(_by_parameter(spec, actual, expected), _by_parameter(spec, expected, expected), strict=True)
    for (name, array), (_, reference) in pairs:
        if not np.isfinite(reference).all():
            return f"{name} of the reference is not finite: the network is unstable on this input"
        if name.startswith("d"):
            error = _gradient_difference(work, steps, array, reference, num_rounded, error_of_format, largest_gradient)
        else:
            error = _output_difference(work, array, reference, num_rounded, error_of_format)
        if error:
            return f"{name}{error}"
    return None


def _output_difference(
    work: Workload, array: Array, reference: Array, num_rounded: int, error_of_format: float
) -> str | None:
    spec, scale = work.spec, float(np.max(np.abs(work.x)))
    rtol, atol = (num_rounded * limit for limit in tolerance(spec.dtype, longest_sum(spec), scale))
    if error_of_format:
        norm, largest = format_tolerance(error_of_format, max(scale, float(np.max(np.abs(reference)))))
        if error := norm_difference(array, reference, norm):
            return error
        atol += largest
    return difference(array, reference, rtol, atol)


def _largest(array: Array) -> float:
    """The largest magnitude."""
    return float(np.maximum(np.max(array), -np.min(array)))


def _gradient_difference(
    work: Workload, steps: int, array: Array, reference: Array, num_rounded: int, error_of_format: float,
    largest_of_all: float,
) -> str | None:  # fmt: skip
    spec = work.spec
    if error_of_format:
        return norm_difference(array, reference, format_gradient_tolerance(spec, error_of_format))
    if spec.variant.has_kinks:
        return norm_difference(array, reference, num_rounded * kink_tolerance(spec.dtype, spec))
    largest = _largest(reference)
    if reference.size == 1:  # a sum over all units, whose terms may cancel
        largest = max(largest, largest_of_all)
    rtol, atol = gradient_tolerance(spec.dtype, spec, steps, work.case.N, largest)
    return difference(array, reference, num_rounded * rtol, num_rounded * atol)


def _by_parameter(spec: RNNSpec, results: Results, order: Results) -> Iterator[tuple[str, Array]]:
    """The arrays in the order of ``order``. ``dparams`` is split, since each parameter has its own scale.

    The gradients of the states of a user cell form one array, since there may be a state on which nothing depends.
    """
    states = [f"d{state}0" for state in spec.state_names if f"d{state}0" in order and isinstance(spec.mode, Cell)]
    if states:
        yield ", ".join(states), np.stack([results[name] for name in states])
    for name in order:
        if name in states:
            continue
        if name == "dparams":
            for entry, array in spec.layout.unpack(results[name]).items():
                yield f"dparams {entry}", array
        else:
            yield name, results[name]
