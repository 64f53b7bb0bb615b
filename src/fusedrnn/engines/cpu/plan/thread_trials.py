"""Trials of one thread: calls are timed, and calls that are faster on one thread run on one.

The cost model assumes that every thread has a processor. If other processes use the processors, a call on several
threads waits for a thread that does not run, and may take several times as long as on one thread. The bits of a result
do not depend on the number of threads, so this number may change with every call.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from fusedrnn import env
from fusedrnn.engines.cpu.tuning import Tuning, current

logger = logging.getLogger(__name__)


class Forecast(NamedTuple):
    """Seconds of a call by the cost model: as planned, on several threads, and on one."""

    several: float
    alone: float


class ThreadChoice:
    """Chooses between several threads and one for calls of similar length.

    Calls use several threads until some take longer than one thread takes: by the forecast, later by the fastest call
    on one thread so far. Then a trial runs some calls on one thread and compares their median with that of the calls
    before it. Once one thread has won, further trials give several threads another chance.

    Calls may come from several Python threads at once. They may overwrite each other's records, which costs only time.

    Attributes:
        sharing: Whether calls use several threads; calls of a trial do the opposite.
    """

    __slots__ = (
        "_best_alone", "_counted_from", "_late", "_next_trial", "_pause", "_recent", "_trial", "_tuning", "sharing",
    )  # fmt: skip

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.sharing = True
        self._tuning = tuning = tuning or current()
        self._late = 0
        self._pause, self._next_trial = tuning.min_trial_pause, 0.0
        # Durations, as multiples of the forecast for one thread.
        self._best_alone = 1.0
        self._recent: deque[float] = deque(maxlen=tuning.recent_calls)
        self._trial: list[float] | None = None
        self._counted_from = 0.0

    def use_several(self, now: float) -> bool:
        """Whether the call that begins now is to use several threads; ``now`` in seconds."""
        if self._trial is None and not self.sharing and now >= self._next_trial:
            self._start_trial(now)
        return self.sharing is (self._trial is None)

    def _start_trial(self, now: float) -> None:
        self._counted_from = now + self._tuning.settling_time
        self._trial = []

    def note(self, several: bool, seconds: float, now: float, forecast: Forecast) -> None:
        """Record a call that has ended: whether on several threads, its duration, its end, and its forecast."""
        duration, trial = seconds / forecast.alone, self._trial
        if several is not self.sharing:
            if trial is not None and now - seconds >= self._counted_from:
                trial.append(duration)
                if _is_decided(trial, self._recent, self._tuning):
                    self._decide(trial, now, forecast)
        elif trial is None:
            self._recent.append(duration)
            if several:
                self._count_late(duration, now)

    def _count_late(self, duration: float, now: float) -> None:
        """Start a trial after several late calls; one that takes n times as long as on one thread counts as n."""
        if duration <= self._best_alone:
            self._late = max(0, self._late - 1)
        elif now >= self._next_trial:
            late_calls = self._tuning.late_calls
            self._late += min(late_calls, int(duration / self._best_alone))
            if self._late >= late_calls and len(self._recent) >= self._tuning.min_recent_calls:
                self._start_trial(now)

    def _decide(self, trial: list[float], now: float, forecast: Forecast) -> None:
        tuning = self._tuning
        alone, several = (trial, [*self._recent]) if self.sharing else ([*self._recent], trial)
        sharing = _median(several) * tuning.min_speedup <= _median(alone)
        stays = sharing is self.sharing
        self._pause = min(2 * self._pause, tuning.max_trial_pause) if stays else tuning.min_trial_pause
        lost = sum(trial) - len(trial) * _median([*self._recent]) if stays else 0.0
        self._next_trial = now + max(self._pause, tuning.trial_interval * lost * forecast.alone)
        if not stays:
            self._recent = deque(trial, maxlen=tuning.recent_calls)
            if env.debug() >= 1:
                threads = "several threads" if sharing else "one thread"
                logger.info(f"calls of about {forecast.alone * 1e6:.0f} us run on {threads} from now on")
        self.sharing, self._best_alone, self._late, self._trial = sharing, min(alone), 0, None


def _is_decided(trial: list[float], recent: Sequence[float], tuning: Tuning) -> bool:
    """Whether a trial is long enough, or its result clear."""
    if len(trial) < tuning.min_trial_calls or not recent:
        return len(trial) >= tuning.trial_calls
    ratio = tuning.clear_ratio
    is_clear = min(trial) > ratio * max(recent) or min(recent) > ratio * max(trial)
    return is_clear or len(trial) >= tuning.trial_calls


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class ThreadChoices:
    """The choices of one spec: one for each kind of call and power of four of its forecast in microseconds."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or current()
        self._choices: dict[tuple[str, int], ThreadChoice] = {}

    def of(self, kind: str, forecast: Forecast | None) -> ThreadChoice | None:
        """The choice for such calls; None if they stay as planned."""
        if forecast is None or forecast.alone > self._tuning.max_trial_call:
            return None
        key = kind, int(math.log(forecast.alone * 1e6, 4))
        choice = self._choices.get(key)
        return choice or self._choices.setdefault(key, ThreadChoice(self._tuning))
