"""Several calls timed against each other: in one process, in alternation, by medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

Call = Callable[[], Any]
Clock = Callable[[], float]

LONG = 3.0
"""Seconds from which on a call needs no warm-up: what its first run pays extra is lost in the noise."""

WARM = 0.1
"""Seconds from which on the first run, cold as it is, says that a sample needs no repeats."""

SHORT = 5e-3
"""Seconds that one sample lasts at least; shorter calls are repeated within it."""

PAUSE = 0.2
"""Seconds of rest before each turn: OpenBLAS's idle threads keep a processor busy for a tenth of a second."""

NO_PAUSE = 0.0
"""The same where only modules of PyTorch take turns: they share its threads, so that none is in another's way."""

LATENCY = 1e-3
"""Seconds below which a call is one whose latency matters: percentiles over single calls are kept."""

MAX_ROUNDS = 100

FEWEST = 2
"""Samples that every call gets, whatever the budget."""

VERY_LONG = 10.0
"""Seconds from which on one sample may do: so long a call averages over the noise that samples of a shorter one show.

Without this the baseline's calls alone would make the published tables take twice as long.
"""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one figure for each round; of short calls also percentiles over single calls in all rounds."""

    seconds: tuple[float, ...]
    p50: float | None = None
    p99: float | None = None

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def deviation(self) -> float | None:
        """Half the distance between the fastest and the slowest as a share of the median; None if there is only one."""
        if len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low) / self.median


class LostError(RuntimeError):
    """A contender cannot go on. The others can."""


@runtime_checkable
class Elsewhere(Protocol):
    """A call that another process runs and times, so that the way there and back is nobody's time."""

    warm: float
    """Seconds of a call that it has run already."""

    def time(self, calls: int) -> Sequence[float]:
        """Seconds of each of so many calls, one after the other.

        Raises:
            LostError: If it cannot.
        """


@runtime_checkable
class Shortened(Protocol):
    """A short call that stands for a long one."""

    @property
    def call(self) -> Call:
        """The short one."""

    @property
    def runs(self) -> int:
        """How often it runs in a turn."""

    def whole(self, seconds: float) -> float:
        """Seconds of the long one, if the short one takes these."""


Timed = Call | Elsewhere | Shortened


@dataclass
class _Contestant:
    call: Timed
    clock: Clock
    fewest: int
    once: bool
    short: float
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)
    singles: list[Any] = field(default_factory=list)
    result: Any = None

    @property
    def sits_out(self) -> bool:
        """Whether it has its one sample, and takes no part in the rounds that only others need."""
        if isinstance(self.call, Shortened):
            return False
        return self.once and bool(self.seconds) and self.seconds[0] >= VERY_LONG

    @property
    def settled(self) -> bool:
        """Whether its samples are enough, budget left or not."""
        return self.sits_out or len(self.seconds) >= self.fewest

    def run(self, times: int = 1) -> Sequence[float]:
        """Seconds of each call, the last result being let go first, so that its memory serves the next."""
        if isinstance(self.call, Elsewhere):
            return self.call.time(times)
        call = self.call.call if isinstance(self.call, Shortened) else self.call
        stamps = [self.clock()]
        for _ in range(times):
            self.result = None
            self.result = call()
            stamps.append(self.clock())
        return [end - begin for begin, end in pairwise(stamps)]

    def warm_up(self) -> None:
        if isinstance(self.call, Shortened):  # as long as a part is, its first run counts
            return self.turn()
        first = self.call.warm if isinstance(self.call, Elsewhere) else self.run()[0]
        if first >= LONG:
            self.seconds.append(first)
        elif first < WARM:
            self.repeats = max(1, math.ceil(self.short / max(self.run()[0], 1e-9)))

    def turn(self) -> None:
        if isinstance(self.call, Shortened):
            self.seconds += [self.call.whole(seconds) for seconds in self.run(self.call.runs)]
            return
        if self.repeats > 1:
            self.run()
        seconds = self.run(self.repeats)
        self.seconds.append(sum(seconds) / len(seconds))
        if self.seconds[-1] < LATENCY:
            self.singles.append(np.array(seconds))

    def timing(self) -> Timing:
        timing = Timing(tuple(self.seconds))
        if not self.singles or timing.median >= LATENCY:
            return timing
        p50, p99 = np.percentile(np.concatenate(self.singles), (50, 99))
        return Timing(timing.seconds, float(p50), float(p99))


def alternate(
    calls: Mapping[str, Timed],
    budget: float,
    *,
    once: Collection[str] = (),
    fewest: int = FEWEST,
    pause: float = PAUSE,
    short: float = SHORT,
    lost: Callable[[str, LostError], None] | None = None,
    before_turn: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time ``calls`` in turns, A B A B, until another round would pass ``budget`` seconds.

    Each call is warmed up first, except that a call of :data:`LONG` seconds or more, and one that is shortened, counts
    from its first run. Every call gets at least the ``fewest`` samples, whatever the budget, but one of those named in
    ``once`` that takes ten seconds or more is content with its first. A sample lasts ``short`` seconds at least. One
    that raises LostError is left out from then on, if ``lost`` is there to be told. ``before_turn`` is called before
    every turn, after the pause. Returns the timings and what each call last returned, None if that is elsewhere.
    """
    contestants = {name: _Contestant(call, clock, fewest, name in once, short) for name, call in calls.items()}

    def turns(take: Callable[[_Contestant], None], *, few: bool = False) -> None:
        for name, contestant in list(contestants.items()):
            if few and contestant.sits_out:
                continue
            time.sleep(pause)
            before_turn()
            try:
                take(contestant)
            except LostError as error:
                if lost is None:
                    raise
                del contestants[name]
                lost(name, error)

    begin = clock()
    turns(_Contestant.warm_up)
    last_round = 0.0
    for _ in range(MAX_ROUNDS):
        start = clock()
        few = not all(contestant.settled for contestant in contestants.values())
        if not few and start - begin + last_round > budget:
            break
        turns(_Contestant.turn, few=few)
        last_round = clock() - start
    timings = {name: contestant.timing() for name, contestant in contestants.items()}
    return timings, {name: contestant.result for name, contestant in contestants.items()}
