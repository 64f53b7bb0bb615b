"""What several threads bring: calls are timed, and those that one thread serves faster run on one.

The cost model assumes that threads have processors to run on. Where other processes take these, a call on several
threads waits for the one that does not run: it may take several times as long as on one thread. No bit depends on the
number of threads, so calls may change it at any time.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from fusedrnn import env

logger = logging.getLogger(__name__)

# Calls above this forecast on one thread stay as planned: a trial of them would cost too much.
_LONGEST_CALL = 20e-3
# Calls more late than in time before a trial; one that takes several times as long counts as several.
_LATE = 4
# Calls that a trial is compared with. Calls of a trial; fewer are enough if all are twice as slow as any of the others,
# or as fast.
_RECENT, _CALLS, _FEWEST, _CLEAR = 8, 5, 2, 2.0
# Seconds at the start of a trial that do not count: threads that have no work yet, or none any more, spin or wake up.
_SETTLING = 1e-3
# How many times as fast several threads must be, as in the cost model.
_WORTH = 1.1
# Seconds between two trials; they double while the verdict stays. A trial takes at most 1/50 of the time.
_PAUSE, _LONGEST_PAUSE, _TRIAL_SHARE = 0.1, 2.0, 50


class Forecast(NamedTuple):
    """Seconds of a call by the cost model: as planned, on several threads, and on one."""

    several: float
    alone: float


class ThreadChoice:
    """What calls of about one length have shown.

    Calls run on several threads until some have taken longer than one thread takes: by its forecast, later by the
    fastest call there has been. Then a trial follows: some calls run on one thread, and their median is compared with
    that of the calls before. If one thread has won, calls on several threads are tried after a pause.

    Threads may call at once: what they overwrite of each other costs time, and nothing else.

    Attributes:
        sharing: Whether calls use several threads; those of a trial do not if others do.
    """

    __slots__ = ("_alone", "_late", "_pause", "_recent", "_resume", "_settled", "_trial", "sharing")

    def __init__(self) -> None:
        self.sharing = True
        self._late = 0
        self._pause, self._resume = _PAUSE, 0.0
        # Durations, in units of the forecast for one thread: the least on one thread, the last ones, those of a trial.
        self._alone = 1.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._trial: list[float] | None = None
        self._settled = 0.0

    def use_several(self, now: float) -> bool:
        """Whether a call that begins now is to use several threads; ``now`` in seconds."""
        if self._trial is None and not self.sharing and now >= self._resume:
            self._start(now)
        return self.sharing is (self._trial is None)

    def _start(self, now: float) -> None:
        self._settled = now + _SETTLING
        self._trial = []

    def note(self, several: bool, seconds: float, now: float, forecast: Forecast) -> None:
        """A call has ended: on how many threads, how long it took, when, and its forecast."""
        took, trial = seconds / forecast.alone, self._trial
        if several is not self.sharing:
            if trial is not None and now - seconds >= self._settled:
                trial.append(took)
                if _is_decided(trial, self._recent):
                    self._decide(trial, now, forecast)
        elif trial is None:
            self._recent.append(took)
            if several:
                self._count_late(took, now)

    def _count_late(self, took: float, now: float) -> None:
        if took <= self._alone:
            self._late = max(0, self._late - 1)
        elif now >= self._resume:
            self._late += min(_LATE, int(took / self._alone))
            if self._late >= _LATE:
                self._start(now)

    def _decide(self, trial: list[float], now: float, forecast: Forecast) -> None:
        alone, several = (trial, [*self._recent]) if self.sharing else ([*self._recent], trial)
        sharing = _median(several) * _WORTH <= _median(alone)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if sharing is self.sharing else _PAUSE
        self._resume = now + max(self._pause, _TRIAL_SHARE * sum(trial) * forecast.alone)
        if sharing is not self.sharing:
            self._recent = deque(trial, maxlen=_RECENT)
            if env.debug() >= 1:
                threads = "several threads" if sharing else "one thread"
                logger.info(f"calls of about {forecast.alone * 1e6:.0f} us run on {threads} from now on")
        self.sharing, self._alone, self._late, self._trial = sharing, min(alone), 0, None


def _is_decided(trial: list[float], recent: Sequence[float]) -> bool:
    """Whether a trial has gone on for long enough."""
    if len(trial) < _FEWEST or not recent:
        return len(trial) >= _CALLS
    clear = min(trial) > _CLEAR * max(recent) or min(recent) > _CLEAR * max(trial)
    return clear or len(trial) >= _CALLS


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class ThreadChoices:
    """The choices of one spec: one for each kind of call and power of four of its forecast in microseconds."""

    def __init__(self) -> None:
        self._trends: dict[tuple[str, int], ThreadChoice] = {}

    def of(self, kind: str, forecast: Forecast | None) -> ThreadChoice | None:
        """The thread_choice for calls like this; None if they stay as planned."""
        if forecast is None or forecast.alone > _LONGEST_CALL:
            return None
        return self._trends.setdefault((kind, int(math.log(forecast.alone * 1e6, 4))), ThreadChoice())
