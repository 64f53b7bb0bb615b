"""What several threads bring: calls are timed, and those that one thread serves faster run on one.

The cost model assumes that threads have processors to run on. Where other processes take these, a call on several
threads waits for the one that does not run: it may take several times as long as on one thread. No bit depends on the
number of threads, so calls may change it at any time.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from fusedrnn import config

# Calls above this forecast on one thread stay as planned: a trial of them would cost too much.
_LONGEST_CALL = 20e-3
# Calls more late than in time before a trial; one that takes several times its forecast counts as several.
_LATE = 4
# Calls of each kind in a trial: at least, if all of one kind are twice as fast as those of the other, and at most.
_FEWEST, _MOST, _CLEAR = 2, 5, 2.0
# How many times as fast several threads must be, as in the cost model.
_WORTH = 1.1
# Seconds between two trials; they double while the verdict stays. A trial takes at most 1/50 of the time.
_PAUSE, _LONGEST_PAUSE, _TRIAL_SHARE = 0.1, 2.0, 50


class Forecast(NamedTuple):
    """Seconds of a call by the cost model: as planned, on several threads, and on one."""

    several: float
    alone: float


class Trend:
    """What calls of about one length have shown.

    Calls run on several threads until some have taken longer than one thread is forecast to take. Then a trial follows:
    calls run on one thread and on several in turn, and the medians decide. After a pause there is another trial if one
    thread has won, or when calls are late again.

    Threads may call at once: what they overwrite of each other costs time, and nothing else.

    Attributes:
        sharing: Whether calls use several threads, but for trials.
    """

    __slots__ = ("_late", "_pause", "_resume", "_samples", "sharing")

    def __init__(self) -> None:
        self.sharing = True
        self._late = 0
        self._pause, self._resume = _PAUSE, 0.0
        # Durations in a trial, in units of the forecast: on one thread, on several.
        self._samples: tuple[list[float], list[float]] | None = None

    def several(self, now: float) -> bool:
        """Whether a call that begins now is to use several threads; ``now`` in seconds."""
        if self._samples is None and not self.sharing and now >= self._resume:
            self._samples = [], []
        samples = self._samples
        return self.sharing if samples is None else len(samples[1]) < len(samples[0])

    def note(self, several: bool, seconds: float, now: float, forecast: Forecast) -> None:
        """A call has ended: on how many threads, how long it took, when, and its forecast."""
        samples = self._samples
        if samples is not None:
            samples[several].append(seconds / forecast.alone)
            if _is_decided(*samples):
                self._decide(*samples, now, forecast)
        elif several and seconds <= forecast.alone:
            self._late = max(0, self._late - 1)
        elif several and now >= self._resume:
            self._late += min(_LATE, int(seconds / forecast.alone))
            if self._late >= _LATE:
                self._samples = [], []

    def _decide(self, alone: list[float], several: list[float], now: float, forecast: Forecast) -> None:
        sharing = statistics.median(several) * _WORTH <= statistics.median(alone)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if sharing is self.sharing else _PAUSE
        if sharing is not self.sharing and config.debug() >= 1:
            threads = "several threads" if sharing else "one thread"
            config.report(f"calls of about {forecast.alone * 1e6:.0f} us run on {threads} from now on")
        took = (sum(alone) + sum(several)) * forecast.alone
        self._resume = now + max(self._pause, _TRIAL_SHARE * took)
        self.sharing, self._late, self._samples = sharing, 0, None


def _is_decided(alone: list[float], several: list[float]) -> bool:
    """Whether a trial has gone on for long enough."""
    calls = min(len(alone), len(several))
    if calls < _FEWEST:
        return False
    clear = min(several) > _CLEAR * max(alone) or min(alone) > _CLEAR * max(several)
    return clear or calls >= _MOST


class Trends:
    """The trends of one spec's calls: of each kind of call, by the power of four of its forecast in microseconds."""

    def __init__(self) -> None:
        self._trends: dict[tuple[str, int], Trend] = {}

    def of(self, kind: str, forecast: Forecast | None) -> Trend | None:
        """The trend for calls like this; None if they stay as planned."""
        if forecast is None or forecast.alone > _LONGEST_CALL:
            return None
        return self._trends.setdefault((kind, int(math.log(forecast.alone * 1e6, 4))), Trend())
