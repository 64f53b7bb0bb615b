"""Several calls timed against each other: in one process, in alternation, by medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Call = Callable[[], Any]
Clock = Callable[[], float]

LONG = 5.0
"""Seconds from which on a call needs no warm-up: what its first run pays extra is lost in the noise."""

WARM = 0.1
"""Seconds from which on the first run, cold as it is, says that a sample needs no repeats."""

SHORT = 5e-3
"""Seconds that one sample lasts at least; shorter calls are repeated within it."""

PAUSE = 0.2
"""Seconds of rest before each turn: OpenBLAS's idle threads keep a processor busy for a tenth of a second."""

NO_PAUSE = 0.0
"""The same where only modules of PyTorch take turns: they share its threads, so that none is in another's way."""

MAX_ROUNDS = 100

FEWEST = 2
"""Samples that every call gets, whatever the budget."""

VERY_LONG = 10.0
"""Seconds from which on one sample may do: so long a call averages over the noise that samples of a shorter one show.

Without this the baseline's calls alone would make the published tables take twice as long.
"""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one figure for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low) / self.median


@dataclass
class _Contestant:
    call: Call
    clock: Clock
    fewest: int
    once: bool
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def sits_out(self) -> bool:
        """Whether it has its one sample, and takes no part in the rounds that only others need."""
        return self.once and bool(self.seconds) and self.seconds[0] >= VERY_LONG

    @property
    def settled(self) -> bool:
        """Whether its samples are enough, budget left or not."""
        return self.sits_out or len(self.seconds) >= self.fewest

    def run(self, times: int = 1) -> float:
        """Seconds a call takes, the last result being let go first, so that its memory serves the next."""
        begin = self.clock()
        for _ in range(times):
            self.result = None
            self.result = self.call()
        return (self.clock() - begin) / times

    def warm_up(self) -> None:
        first = self.run()
        if first >= LONG:
            self.seconds.append(first)
        elif first < WARM:
            self.repeats = max(1, math.ceil(SHORT / max(self.run(), 1e-9)))

    def turn(self) -> None:
        if self.repeats > 1:
            self.run()
        self.seconds.append(self.run(self.repeats))


def alternate(
    calls: Mapping[str, Call],
    budget: float,
    *,
    once: Collection[str] = (),
    fewest: int = FEWEST,
    pause: float = PAUSE,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time ``calls`` in turns, A B A B, until another round would pass ``budget`` seconds.

    Each call is warmed up first, except that a call of a second or more counts from its first run. Every call gets
    at least the ``fewest`` samples, whatever the budget, but one of those named in ``once`` that takes ten seconds
    or more is content with its first. Returns the timings and what each call last returned.
    """
    contestants = {name: _Contestant(call, clock, fewest, name in once) for name, call in calls.items()}
    begin = clock()
    for contestant in contestants.values():
        time.sleep(pause)
        contestant.warm_up()
    last_round = 0.0
    for _ in range(MAX_ROUNDS):
        start = clock()
        few = not all(contestant.settled for contestant in contestants.values())
        if not few and start - begin + last_round > budget:
            break
        for contestant in contestants.values():
            if not (few and contestant.sits_out):
                time.sleep(pause)
                contestant.turn()
        last_round = clock() - start
    timings = {name: Timing(tuple(contestant.seconds)) for name, contestant in contestants.items()}
    return timings, {name: contestant.result for name, contestant in contestants.items()}
