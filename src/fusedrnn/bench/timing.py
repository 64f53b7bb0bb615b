"""Times several calls, which take turns within one process, to compare them by medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fusedrnn.bench.extrapolate import RUNS, Call, Clock, Extrapolated

NO_WARM_UP_SECONDS = 3.0
"""If the first run of a call takes longer, it counts as a sample, since the noise exceeds the cost of a cold call."""

NO_REPEAT_SECONDS = 0.1
"""If the first run of a call takes longer, the call is not repeated within a sample."""

SAMPLE_SECONDS = 5e-3
"""The shortest duration of a sample. Shorter calls are repeated within it."""

PAUSE = 0.2
"""Seconds of rest before each turn, because idle threads of OpenBLAS spin for a tenth of a second."""

SPIN_PAUSE = 0.02
"""Seconds of rest where all contenders run on OpenMP's threads: these spin for some milliseconds after a turn.

The threads that sample the peak between the turns would compete with them, and leave two of them on one processor.
"""

LONG_SAMPLE_SECONDS = 0.05
"""The duration of a sample that is to be like a training loop, or to have many single calls for percentiles."""

DISTURBED = 0.75
"""Below this share of its best rate, the machine is disturbed: a hypervisor may run two processors on one core.

Samples before or after such a rate do not count, whatever they measured, if enough others remain.
"""

PATIENCE = 3.0
"""As many times the budget may pass until every call has enough samples that are not disturbed."""

LATENCY = 1e-3
"""For calls that take fewer seconds than this, percentiles over single calls are kept."""

MAX_ROUNDS = 100

MIN_SAMPLES = 2
"""The least number of samples of every call, for any budget."""

ONE_SAMPLE_SECONDS = 10.0
"""For a call that takes longer, one sample may be enough, since the call itself averages over the noise.

Otherwise the baseline alone would double the time of the published tables.
"""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value for each round; for short calls also percentiles over the single calls."""

    seconds: tuple[float, ...]
    p50: float | None = None
    p99: float | None = None

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def deviation(self) -> float | None:
        """Half the distance between the fastest and the slowest, relative to the median; None for a single sample."""
        if len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    @property
    def spread(self) -> float:
        """Distance between the quartiles, relative to the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low) / self.median


class ContenderFailed(RuntimeError):
    """A contender cannot continue, but the others can."""


@runtime_checkable
class RemoteCall(Protocol):
    """A call that another process runs and times, so that the communication is not timed."""

    warm: float
    """The seconds of a call that has already run."""

    def time(self, calls: int) -> Sequence[float]:
        """Seconds of each of ``calls`` consecutive calls.

        Raises:
            ContenderFailed: If the contender cannot run them.
        """


Timed = Call | RemoteCall | Extrapolated


@dataclass
class _Sample:
    """Seconds per call, the single calls if they are short, and the share of its best rate that the machine had."""

    seconds: float
    single_calls: Any = None
    rate: float = 1.0


@dataclass
class _Entry:
    """One call with its samples."""

    call: Timed
    clock: Clock
    single_sample: bool
    sample_seconds: float
    repeats: int = 1
    samples: list[_Sample] = field(default_factory=list)
    result: Any = None

    @property
    def undisturbed(self) -> list[_Sample]:
        """The samples beside which the machine was as fast as it can be."""
        return [sample for sample in self.samples if sample.rate >= DISTURBED]

    @property
    def sits_out(self) -> bool:
        """Whether its one sample is enough, so that it skips rounds that run only for other calls."""
        single_sample = self.single_sample and not isinstance(self.call, Extrapolated)
        return single_sample and bool(self.samples) and self.samples[0].seconds >= ONE_SAMPLE_SECONDS

    @property
    def has_enough(self) -> bool:
        """Whether it has enough samples even if the budget is spent."""
        return self.sits_out or len(self.samples) >= MIN_SAMPLES

    @property
    def has_enough_undisturbed(self) -> bool:
        """Whether that is so without those that are disturbed."""
        return self.sits_out or len(self.undisturbed) >= MIN_SAMPLES

    def run(self, times: int = 1) -> Sequence[float]:
        """The seconds of each call. The last result is released first, so that the next call reuses its memory."""
        if isinstance(self.call, RemoteCall):
            return self.call.time(times)
        call = self.call.call if isinstance(self.call, Extrapolated) else self.call
        stamps = [self.clock()]
        for _ in range(times):
            self.result = None
            self.result = call()
            stamps.append(self.clock())
        return [end - start for start, end in pairwise(stamps)]

    def warm_up(self) -> None:
        if isinstance(self.call, Extrapolated):  # so long that its first run counts
            return self.take_turn()
        first = self.call.warm if isinstance(self.call, RemoteCall) else self.run()[0]
        if first >= NO_WARM_UP_SECONDS:
            self.samples.append(_Sample(first))
        elif first < NO_REPEAT_SECONDS:
            self.repeats = max(1, math.ceil(self.sample_seconds / max(self.run()[0], 1e-9)))

    def take_turn(self) -> None:
        if isinstance(self.call, Extrapolated):
            self.samples += [_Sample(self.call.whole(seconds)) for seconds in self.run(RUNS)]
            return
        if self.repeats > 1:
            self.run()
        seconds = self.run(self.repeats)
        mean = sum(seconds) / len(seconds)
        self.samples.append(_Sample(mean, np.array(seconds) if mean < LATENCY else None))

    def timing(self) -> Timing:
        samples = (self.has_enough_undisturbed and self.undisturbed) or self.samples
        timing = Timing(tuple([sample.seconds for sample in samples]))
        single_calls = [sample.single_calls for sample in samples if sample.single_calls is not None]
        if not single_calls or timing.median >= LATENCY:
            return timing
        p50, p99 = np.percentile(np.concatenate(single_calls), (50, 99))
        return Timing(timing.seconds, float(p50), float(p99))


def alternate(
    calls: Mapping[str, Timed],
    budget: float,
    *,
    single_sample: Collection[str] = (),
    pause: float = PAUSE,
    sample_seconds: float = SAMPLE_SECONDS,
    failures: dict[str, str] | None = None,
    before_turn: Callable[[], float] = lambda: 1.0,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time ``calls`` in turns, A B A B, until another round would exceed ``budget`` seconds.

    Each call is warmed up first. But the first run counts as a sample if the call is extrapolated, or takes
    :data:`NO_WARM_UP_SECONDS` or more. Every call gets at least :data:`MIN_SAMPLES` samples, for any budget. But a call
    that is named in ``single_sample`` needs only one sample if that takes :data:`ONE_SAMPLE_SECONDS` or more. A sample
    takes at least ``sample_seconds``. If a call raises ContenderFailed, it is left out, and the error is added to
    ``failures``; without ``failures`` the error propagates.

    ``before_turn`` runs before every turn, after the pause. It returns the rate of the machine as a share of its best
    rate. Samples before or after a low rate do not count if enough others remain; see :data:`DISTURBED`.

    Returns:
        The timings, and the last result of each call, None for a remote call.
    """
    entries = {name: _Entry(call, clock, name in single_sample, sample_seconds) for name, call in calls.items()}
    last: list[_Sample] = []

    def run_round(turn: Callable[[_Entry], None], *, for_min_samples: bool = False) -> None:
        for name, entry in list(entries.items()):
            if for_min_samples and entry.sits_out:
                continue
            time.sleep(pause)
            rate = before_turn()
            for sample in last:
                sample.rate = min(sample.rate, rate)
            num_before = len(entry.samples)
            try:
                turn(entry)
                last[:] = entry.samples[num_before:]
                for sample in last:
                    sample.rate = rate
            except ContenderFailed as error:
                if failures is None:
                    raise
                del entries[name]
                failures[name] = str(error)

    start = clock()
    run_round(_Entry.warm_up)
    round_seconds = 0.0
    for _ in range(MAX_ROUNDS):
        round_start = clock()
        for_min_samples = not all(entry.has_enough for entry in entries.values())
        is_disturbed = not all(entry.has_enough_undisturbed for entry in entries.values())
        limit = budget * PATIENCE if is_disturbed else budget
        if not for_min_samples and round_start - start + round_seconds > limit:
            break
        run_round(_Entry.take_turn, for_min_samples=for_min_samples)
        round_seconds = clock() - round_start
    timings = {name: entry.timing() for name, entry in entries.items()}
    return timings, {name: entry.result for name, entry in entries.items()}
