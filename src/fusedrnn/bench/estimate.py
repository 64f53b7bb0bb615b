"""How long a benchmark will take: the work of each row at the share of the peak that each contender reaches.

At 180 GFLOP/s, two slow cores, the default sixteen rows come to less than six minutes: the non-fused network is
measured on its first steps where it is slow (see :mod:`fusedrnn.bench.parts`). Where it is to run all of them, one run
of ten seconds or more has to be enough (see ``timing.VERY_LONG``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fusedrnn.bench.checks import checked_steps
from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.parts import FEW, PART, PROBES, RUNS, SLOW, SOME
from fusedrnn.bench.rows import Plan
from fusedrnn.bench.timing import FEWEST, LONG, PAUSE, VERY_LONG
from fusedrnn.testing.cases import Case

_CELLS = "mxnet-cells"

_ENGINES = {"cpu": 0.75, "reference": 0.2}

_SHARES: Mapping[bool, Mapping[str, float]] = {
    False: {NON_FUSED: 0.25, FUSED: 0.8, TORCH: 0.55, IN_TORCH: 0.8, UNPACKED: 0.8, _CELLS: 0.1} | _ENGINES,
    True: {NON_FUSED: 0.2, FUSED: 0.75, TORCH: 0.5, IN_TORCH: 0.75, UNPACKED: 0.75, _CELLS: 0.1} | _ENGINES,
}
"""Of the peak, by whether it is training: as measured for the published sizes. Small cases are bound by the budget."""

_RIVAL = 0.5
"""The same for what runs in other processes, unless it is named above."""

_SECONDS_A_RIVAL = 3.0
"""For a rival to make itself ready for a row: to compile, to unroll, to try what is fastest."""

_CALLS_TO_LOAD = 2
"""That a rival makes of a row before its turns."""

_ONCE = (NON_FUSED, "reference", _CELLS)
"""Those that are so slow that one call may do."""

_KEPT = 0.75
"""Of the steps of a batch that is packed, those that count."""

_SECONDS_A_PARAMETER = 30e-9
"""To draw, copy, convert, pack and compare it."""

_SECONDS_A_ROW = 1.5
"""For text, peaks, pauses."""


def expected_seconds(plan: Plan, peak: float) -> list[float]:
    """Seconds for each row of the plan, on threads that do ``peak`` GFLOP/s of multiply-adds."""
    return [_row_seconds(plan, *row, peak) for row in plan.rows()]


def _row_seconds(plan: Plan, case: Case, mode: str, phase: Phase, peak: float) -> float:
    spec = case.spec(mode, plan.dtype)
    flops = spec.flops(case.T, case.N, training=phase.training)
    shares = _SHARES[phase.training]
    calls = {who: flops / (shares.get(who, _RIVAL) * peak * 1e9) for who in plan.contenders()}
    if plan.packed:
        calls = {who: seconds if who == UNPACKED else _KEPT * seconds for who, seconds in calls.items()}
    part = checked_steps(case.T, flops) / case.T
    # The reference in float64 takes twice the baseline's time in float32.
    checking = part * (2 * flops / (shares[NON_FUSED] * peak * 1e9) + sum(calls.values()))
    preparing = _SECONDS_A_ROW + _SECONDS_A_PARAMETER * spec.layout.size
    here = {*phase.makers, *plan.backends} - {*plan.peers}
    rivals = [seconds for who, seconds in calls.items() if who not in here]
    loading = sum(_SECONDS_A_RIVAL + (1 if seconds >= LONG else _CALLS_TO_LOAD) * seconds for seconds in rivals)
    turns = {who: seconds + PAUSE if rivals else seconds for who, seconds in calls.items()}
    probing = 0.0
    slow = turns.get(NON_FUSED, 0.0)
    shortened = slow > SLOW and not plan.full
    if shortened:
        probing = PROBES * (FEW + SOME) * slow / case.T
        turns[NON_FUSED] = RUNS * PART
    return preparing + checking + loading + probing + _timing_seconds(turns, plan.budget, shortened)


def _timing_seconds(calls: Mapping[str, float], budget: float, shortened: bool) -> float:
    """What :func:`fusedrnn.bench.timing.alternate` will take for turns of these lengths."""
    spent = sum(calls.values())
    samples = {who: int(seconds >= LONG) for who, seconds in calls.items()}
    if shortened:
        samples[NON_FUSED] = RUNS
    needing = {who for who, seconds in calls.items() if not (who in _ONCE and seconds >= VERY_LONG)}
    missing = max((FEWEST - samples[who] for who in needing), default=0)
    spent += missing * sum(calls[who] for who in needing)
    round_ = max(sum(calls.values()), 1e-9)
    return spent + round_ * max(0, math.floor((budget - spent) / round_))
