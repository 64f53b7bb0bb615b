"""Slow calls are extrapolated from their first steps, and the row says so."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from bench_rows import Clock, measured, set_element, small_config, spoiled
from fusedrnn.bench import contenders, lines, runner, tables
from fusedrnn.bench.contenders import FUSED, IN_TORCH, NON_FUSED, PHASES, TORCH
from fusedrnn.bench.extrapolate import MIN_STEPS, SLOW, TARGET_SECONDS, Extrapolated, extrapolate
from fusedrnn.bench.report import report
from fusedrnn.bench.timing import alternate
from fusedrnn.testing.cases import CASES

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


def steps_of(clock: Clock, step: float, per_call: float = 0.0):
    """Returns calls of any number of steps: ``step`` seconds per step and ``per_call`` seconds per call."""
    return lambda steps: clock.call(str(steps), per_call + step * steps)


def test_a_fast_call_is_not_extrapolated():
    clock = Clock()
    assert extrapolate(steps_of(clock, 0.9 * SLOW / 300), 300, clock) is None
    assert clock.now < SLOW / 10
    assert extrapolate(steps_of(clock, SLOW), MIN_STEPS, clock) is None


@pytest.mark.parametrize("per_call", [0.0, 0.2])
def test_a_slow_call_is_extrapolated_from_its_first_steps(per_call):
    clock = Clock()
    short = extrapolate(steps_of(clock, 0.1, per_call), 300, clock)
    assert short is not None and short.steps == round(TARGET_SECONDS / 0.1) and short.total == 300
    assert short.whole(per_call + 0.1 * short.steps) == pytest.approx(per_call + 30.0)


def test_the_shorter_call_has_a_least_number_of_steps():
    clock = Clock()
    short = extrapolate(steps_of(clock, 10.0), 300, clock)
    assert short is not None and short.steps == MIN_STEPS
    assert extrapolate(steps_of(clock, 0.2), MIN_STEPS + 1, clock) is None or SLOW < 0.2 * (MIN_STEPS + 1)


def test_noise_does_not_make_a_slow_call_look_short():
    """Two disturbed steps take longer than four undisturbed ones."""
    clock = Clock()
    seconds = {2: 9.0, 4: 1.0}
    short = extrapolate(lambda steps: clock.call(str(steps), seconds.get(steps, 0.25 * steps)), 300, clock)
    assert short is not None and MIN_STEPS <= short.steps < 300
    assert short.whole(2.0) > 2.0 * 300 / short.steps / 2


def test_a_short_disturbance_does_not_make_a_call_slow():
    clock = Clock()
    disturbed = {4: 0.3}
    short = extrapolate(lambda steps: clock.call(str(steps), 0.001 * steps + disturbed.get(steps, 0.0)), 300, clock)
    assert short is None
    assert clock.log == ["2", "2", "4", "4", "16", "16"]


def test_an_extrapolated_call_takes_turns_with_whole_calls():
    clock = Clock()
    short = extrapolate(steps_of(clock, 0.1), 300, clock)
    clock.log.clear()
    calls = {"A": short, "B": clock.call("B", 20.0)}
    timings, results = alternate(calls, 1.0, single_sample=["A"], pause=0, clock=clock)
    name = str(short.steps)
    assert clock.log == [name, name, "B", name, name, "B"]
    assert timings["A"].seconds == pytest.approx((30.0,) * 4) and timings["B"].seconds == pytest.approx((20.0, 20.0))
    assert results["A"] == 5


@pytest.fixture
def slow_baseline(monkeypatch):
    """Extrapolates the non-fused network of SMALL from three of its six steps."""

    def short(call_of, total):
        return Extrapolated(call_of(3), 3, total, 0.0)

    monkeypatch.setattr(runner, "extrapolate", short)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=needs_torch)])
def test_an_extrapolated_row_says_how_many_steps_ran(known_peak, slow_baseline, phase, torch):
    config = small_config(("gru",), phase, contenders=(NON_FUSED, FUSED, *((TORCH, IN_TORCH) if torch else ())))
    [row] = runner.run(config)
    assert row.wrong is None and row.steps_run == {NON_FUSED: 3}
    assert set(row.timings) == set(config.contenders) and len(row.timings[NON_FUSED].seconds) >= 4
    assert "(measured on 3 of 6 steps)" in lines.summary(row)
    table = tables.tables([row], config.contenders)[0]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["steps\nrun"] == ["3"] and "±" in cells["Non-\nFusedRNN\nsamples/sec"][0]
    [line] = lines.extrapolated_lines([row])
    assert line.startswith("non-fused measured on 3 of 6 steps in 1 of 1 rows") and "--full" in line
    figures = report(config, [row])
    assert figures["rows"][0]["seconds"][NON_FUSED]["steps"] == 3
    assert figures["rows"][0]["seconds"][FUSED]["steps"] == 6 and figures["plan"]["full"] is False


def test_full_runs_all_steps(known_peak, slow_baseline):
    [row] = runner.run(small_config(full=True))
    assert row.wrong is None and not row.steps_run and "steps" not in lines.summary(row)
    assert lines.extrapolated_lines([row]) == []


def test_one_line_summarizes_the_steps_of_several_rows():
    row = measured(CASES["ds2"], "gru", {NON_FUSED: (2.0,), FUSED: (1.0,)})
    rows = [row, *(replace(row, steps_run={NON_FUSED: steps}) for steps in (15, 80, 10))]
    [line] = lines.extrapolated_lines(rows)
    assert line.startswith("non-fused measured on 10 to 80 of 300 steps in 3 of 4 rows")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("name", "value", "message"), [("y", 0.9, "3 of 6 steps"), ("y", np.nan, "not finite")])
def test_timed_results_of_an_extrapolated_row_are_checked(
    monkeypatch, known_peak, slow_baseline, phase, name, value, message
):
    config = small_config(phase=phase)
    make = contenders.train_non_fused if PHASES[phase].training else contenders.non_fused
    spoiled(monkeypatch, set_element(name, value), calls_before=3, phase=phase, make=make)
    [row] = runner.run(config)
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}") and message in row.wrong
    assert not row.timings and row.peak is None
