"""Extrapolates the time of a slow call from a call of its first time steps, since every step takes equally long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[], float]

SLOW = 3.0
"""The time of a call that takes more seconds than this is extrapolated."""

TARGET_SECONDS = 1.5
"""Duration of the shorter call that is timed instead."""

BASE_STEPS, FIRST_STEPS, MIN_STEPS = 2, 4, 10
"""Numbers of steps: of the call that measures the cost per call, of the first call that measures the cost per step, and
the least number of the call that is timed."""

PROBES = 2
"""How often each of the measuring calls runs; the fastest run counts."""

_GROWTH = 4
"""Each call that measures the cost per step has this many times the steps of the previous one, until it is long enough
compared with :data:`TARGET_SECONDS`."""

RUNS = 2
"""How often the shorter call runs in a turn; the other contenders run one whole call."""


@dataclass(frozen=True)
class Extrapolated:
    """A call of the first ``steps`` of ``total`` time steps, which stands for the whole call.

    Attributes:
        call: The call that runs the first ``steps`` steps.
        steps: The number of these steps, more than :data:`BASE_STEPS`.
        total: The number of steps of the whole call.
        base_seconds: Seconds of a call of :data:`BASE_STEPS` steps, which includes the cost per call.
    """

    call: Call
    steps: int
    total: int
    base_seconds: float

    def whole(self, seconds: float) -> float:
        """Seconds of the whole call if ``call`` takes ``seconds``."""
        return seconds + (self.total - self.steps) * _step_seconds(self.base_seconds, seconds, self.steps)


def extrapolate(call_of: Callable[[int], Call], total: int, clock: Clock = time.perf_counter) -> Extrapolated | None:
    """The shorter call to time instead of a call of ``total`` steps; None if the whole call is fast enough.

    Args:
        call_of: A function of a number of steps; it returns the call of so many first steps.
        total: The number of steps of the whole call.
        clock: A function that returns seconds.
    """
    if total <= MIN_STEPS:
        return None
    base, steps = _fastest(call_of(BASE_STEPS), clock), FIRST_STEPS
    while True:  # noise can make a call of few steps look slow, so longer calls decide
        seconds = _fastest(call_of(steps), clock)
        step = _step_seconds(base, seconds, steps)
        if seconds + (total - steps) * step < SLOW:
            return None
        if seconds >= TARGET_SECONDS / _GROWTH or _GROWTH * steps >= total:
            break
        steps *= _GROWTH
    steps = max(MIN_STEPS, round(TARGET_SECONDS / step))
    return None if steps >= total else Extrapolated(call_of(steps), steps, total, base)


def _step_seconds(base: float, seconds: float, steps: int) -> float:
    """Seconds per step, from a call of :data:`BASE_STEPS` steps and a call of ``steps`` steps.

    The cost per call counts as at most half of the longer call, so that noise cannot make steps look free.
    """
    return max((seconds - base) / (steps - BASE_STEPS), seconds / steps / 2)


def _fastest(call: Call, clock: Clock) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(PROBES):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)
