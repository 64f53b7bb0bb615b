"""Slow calls measured on the first of their time steps: each step takes the same time, so that a few say it of all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fusedrnn.bench.timing import Call, Clock

SLOW = 3.0
"""Seconds from which on a call is measured on a part of its steps."""

PART = 1.5
"""Seconds that a call of so many steps is to take."""

FEW, SOME, FEWEST = 2, 4, 10
"""Steps of the call that tells what a call takes besides its steps, of the first that tells about what a step takes,
and of a part at least."""

PROBES = 2
"""Calls of each number of steps that tells these times, of which the faster counts."""

_GROWTH = 4
"""How many times as many steps the next of those calls has, until it takes such a part of a part's time."""

RUNS = 2
"""Calls in a turn of a part: it is short beside the whole calls that it takes turns with."""


@dataclass(frozen=True)
class Part:
    """A call of the first ``steps`` of ``total`` time steps, that stands for the call of all.

    Attributes:
        call: What runs so many steps.
        steps: Their number, more than :data:`FEW`.
        total: Steps of the call that it stands for.
        few: Seconds of a call of :data:`FEW` steps, with all that is done once in a call.
    """

    call: Call
    steps: int
    total: int
    few: float
    runs: int = RUNS

    def whole(self, seconds: float) -> float:
        """Seconds of a call of all steps, if the part takes these."""
        return seconds + (self.total - self.steps) * _of_a_step(self.few, seconds, self.steps)


def part_of(call_of: Callable[[int], Call], total: int, clock: Clock = time.perf_counter) -> Part | None:
    """The part to measure of a call of ``total`` steps; None if the whole call is short enough.

    Args:
        call_of: Makes the call of the first so many steps.
        total: All steps.
        clock: Seconds.
    """
    if total <= FEWEST:
        return None
    few, steps = _least(call_of(FEW), clock), SOME
    while True:  # a call of few steps may be slow by noise alone, one of more is less so
        seconds = _least(call_of(steps), clock)
        step = _of_a_step(few, seconds, steps)
        if seconds + (total - steps) * step < SLOW:
            return None
        if seconds >= PART / _GROWTH or _GROWTH * steps >= total:
            break
        steps *= _GROWTH
    steps = max(FEWEST, round(PART / step))
    return None if steps >= total else Part(call_of(steps), steps, total, few)


def _of_a_step(few: float, more: float, steps: int) -> float:
    """Seconds of a step, from those of a call of :data:`FEW` steps and of one of more.

    What is done once in a call is no more than half of the longer one, so that noise cannot make steps look free.
    """
    return max((more - few) / (steps - FEW), more / steps / 2)


def _least(call: Call, clock: Clock) -> float:
    """Seconds of the faster of some runs."""
    seconds = []
    for _ in range(PROBES):
        began = clock()
        call()
        seconds.append(clock() - began)
    return min(seconds)
