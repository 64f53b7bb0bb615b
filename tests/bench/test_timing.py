"""Calls are timed in turns: warm-up, repeats, budget, and the least number of samples."""

from __future__ import annotations

import pytest

from bench_rows import Clock
from fusedrnn.bench.timing import (
    LATENCY,
    NO_WARM_UP_SECONDS,
    ONE_SAMPLE_SECONDS,
    SAMPLE_SECONDS,
    ContenderFailed,
    Timing,
    alternate,
)


def test_timing_alternates():
    clock = Clock()
    calls = {"A": clock.call("A", 0.5), "B": clock.call("B", 0.25)}
    timings, results = alternate(calls, 6.0, pause=0, clock=clock)
    assert "".join(clock.log).startswith("AB" + "ABAB")
    assert clock.now <= 6.0
    assert timings["A"].median == 0.5 and timings["B"].median == 0.25
    assert len(timings["A"].seconds) == len(timings["B"].seconds) == 7
    assert results == {"A": len(clock.log) - 1, "B": len(clock.log)}


def test_one_sample_of_a_very_long_call_may_suffice():
    clock = Clock()
    seconds = {"A": ONE_SAMPLE_SECONDS, "B": ONE_SAMPLE_SECONDS, "C": 0.5}
    calls = {name: clock.call(name, value) for name, value in seconds.items()}
    timings, _ = alternate(calls, 1.0, single_sample=("A", "C"), pause=0, clock=clock)
    assert clock.log == [*"ABC", *"BCBC"]
    assert timings["A"].median == ONE_SAMPLE_SECONDS
    clock = Clock()
    call = clock.call("A", ONE_SAMPLE_SECONDS)
    alternate({"A": call}, 3 * ONE_SAMPLE_SECONDS, single_sample="A", pause=0, clock=clock)
    assert clock.log == ["A"] * 3


def test_the_first_run_of_a_long_call_is_a_sample():
    clock = Clock()
    calls = {"A": clock.call("A", 10 * NO_WARM_UP_SECONDS), "B": clock.call("B", 2 * NO_WARM_UP_SECONDS)}
    alternate(calls, 1.0, pause=0, clock=clock)
    assert clock.log == ["A", "B", "A", "B"]


def test_a_short_call_is_repeated_within_a_sample():
    clock = Clock()
    timings, _ = alternate({"A": clock.call("A", SAMPLE_SECONDS / 10)}, 0.0, pause=0, clock=clock)
    assert timings["A"].median == pytest.approx(SAMPLE_SECONDS / 10)
    assert len(clock.log) == 2 + 2 * (1 + 10)


def test_a_timing_is_its_median_and_quartiles():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 90.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx(2 / 3)
    assert timing.deviation == pytest.approx(89 / 2 / 3)
    assert Timing((4.0,)).deviation is None


def test_before_turn_runs_before_every_turn():
    clock = Clock()
    calls = {"A": clock.call("A", 1.0), "B": clock.call("B", 1.0)}
    alternate(calls, 0.0, pause=0, before_turn=lambda: clock.log.append("-") or 1.0, clock=clock)
    assert "".join(clock.log) == "-A-B" * 3


def disturbed(rates, budget=6.0):
    """The timing of a call that takes 0.5 seconds where the machine has its best rate, and 5 elsewhere."""
    clock, rates = Clock(), iter(rates)
    state = [1.0]

    def before_turn():
        state[0] = next(rates, 1.0)
        return state[0]

    def call():
        clock.now += 0.5 if state[0] == 1.0 else 5.0

    return alternate({"A": call}, budget, pause=0, before_turn=before_turn, clock=clock)[0]["A"]


def test_samples_of_a_disturbed_machine_do_not_count():
    """Those after a low rate, and those before one: it may have begun meanwhile."""
    timing = disturbed([1.0, 1.0, 0.5, 1.0, 0.5, 1.0])
    assert set(timing.seconds) == {0.5}
    assert len(timing.seconds) < len(disturbed([]).seconds)
    assert disturbed([1.0, 1.0, 0.9, 1.0], budget=3.0).seconds.count(5.0) == 1  # 0.9 is noise


def test_all_samples_count_if_the_machine_is_always_disturbed():
    timing = disturbed([0.5] * 1000)
    assert len(timing.seconds) == 3 and set(timing.seconds) == {5.0}


class Far:
    """A remote call that reports given seconds."""

    def __init__(self, warm: float, *seconds: float) -> None:
        self.warm, self._seconds, self.num_calls = warm, list(seconds), []

    def time(self, calls):
        self.num_calls.append(calls)
        if not self._seconds:
            raise ContenderFailed("gone")
        return [self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]] * calls


def test_a_remote_call_reports_its_own_seconds():
    far = Far(0.5, 0.25)
    timings, results = alternate({"here": lambda: 7, "far": far}, 0.0, pause=0.0)
    assert timings["far"].seconds == (0.25, 0.25) and far.num_calls == [1, 1]
    assert results == {"here": 7, "far": None}


def test_the_warm_run_of_a_long_remote_call_is_a_sample():
    far = Far(ONE_SAMPLE_SECONDS, 1.0)
    timings, _ = alternate({"far": far}, 0.0, single_sample=["far"], pause=0.0)
    assert timings["far"].seconds == (ONE_SAMPLE_SECONDS,) and not far.num_calls


def test_a_failed_call_does_not_end_the_others():
    failures = {}
    calls = {"far": Far(0.5), "here": lambda: 7}
    timings, _ = alternate(calls, 0.0, pause=0.0, failures=failures)
    assert timings.keys() == {"here"} and failures == {"far": "gone"}
    with pytest.raises(ContenderFailed):
        alternate({"far": Far(0.5)}, 0.0, pause=0.0)


def test_short_calls_have_percentiles_and_long_ones_do_not():
    timings, _ = alternate({"short": Far(1e-5, 1e-5), "long": Far(0.5, LATENCY)}, 0.0, pause=0.0)
    assert timings["short"].p50 == timings["short"].p99 == pytest.approx(1e-5)
    assert timings["long"].p50 is None and timings["long"].p99 is None
