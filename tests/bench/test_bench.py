"""Benchmarks say what was run, on what, whether it was right; that they are fast enough is nobody's test."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
from fusedrnn.bench.estimate import expected_seconds
from fusedrnn.bench.mxnet_page import NAMES, published_percent
from fusedrnn.bench.parts import FEWEST, PART, SLOW, Part, part_of
from rich.console import Console

import fusedrnn
from fusedrnn.bench import checks, contenders, peaks, plots, runner, tables
from fusedrnn.bench.contenders import FUSED, NON_FUSED, PHASES, TORCH, phase_named
from fusedrnn.bench.data import Batch, Workload, load, parameters, text, text_input, workload
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import Plan, Row
from fusedrnn.bench.timing import LONG, SHORT, VERY_LONG, Timing, alternate
from fusedrnn.engines.reference import forward as reference
from fusedrnn.runtime.peak import PeakSample
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.testing import tolerance as tolerances
from fusedrnn.testing.cases import CASES, ODD_SIZES, Case
from fusedrnn.testing.tolerance import (
    difference,
    gradient_tolerance,
    kink_tolerance,
    longest_sum,
    norm_difference,
    tolerance,
)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

SMALL = Case("small-test", 6, 3, 5, 7, 2, True)


@pytest.fixture
def known_peak(monkeypatch):
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0 * threads)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0 * threads, True))


def measured(case: Case, mode: str, seconds: dict[str, tuple[float, ...]], phase: str = "inference") -> Row:
    flops = case.spec(mode).flops(case.T, case.N, training=PHASES[phase].training)
    timings = {who: Timing(values) for who, values in seconds.items()}
    return Row(case, mode, phase, "float32", 2, flops, peak=200.0, timings=timings)


def small_plan(modes=("lstm",), **options) -> Plan:
    return Plan([SMALL], modes, [PHASES["inference"]], budget=0.0, **options)


# Cases


def test_the_cases_are_the_published_workloads():
    ds2, deep = CASES["ds2"], CASES["ds2-5bi"]
    assert (ds2.T, ds2.N, ds2.I, ds2.H, ds2.layers, ds2.bidirectional) == (300, 20, 800, 800, 1, False)
    assert (deep.T, deep.N, deep.I, deep.H, deep.layers, deep.bidirectional) == (300, 20, 800, 800, 5, True)
    assert all(name == case.name and case.who for name, case in CASES.items())
    assert 1 in ODD_SIZES


def test_a_case_makes_the_spec_of_its_sizes():
    spec = CASES["bi2"].spec("gru", "float64")
    assert (spec.mode, spec.dtype) == ("gru", "float64")
    assert (spec.input_size, spec.hidden_size, spec.num_layers, spec.num_directions) == (256, 256, 2, 2)


# Data


def test_the_input_is_text_one_character_a_step():
    x = text_input(40, 3, 8, "float32")
    assert x.shape == (40, 3, 8) and x.dtype == np.float32
    assert np.array_equal(x, text_input(40, 3, 8, "float32"))
    starts = [n * len(text()) // 3 for n in range(3)]
    letters = [[text()[start + t] for start in starts] for t in range(40)]
    embedded: dict[str, np.ndarray] = {}
    for t, n in np.ndindex(40, 3):
        assert np.array_equal(embedded.setdefault(letters[t][n], x[t, n]), x[t, n])
    assert len({tuple(row) for row in embedded.values()}) == len(embedded) > 10


def test_the_text_is_english():
    words = text().lower().split()
    assert len(words) > 10_000
    assert {"the", "is", "python"} <= set(words)


def test_more_sequences_and_steps_than_text_start_again():
    tail = text_input(2, len(text()), 1, "float64")
    assert np.array_equal(tail[1, -1], tail[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_uniform_and_repeatable(dtype):
    spec = CASES["small"].spec("lstm", dtype)
    params = parameters(spec)
    assert params.shape == (spec.layout.size,) and params.dtype == dtype
    assert np.array_equal(params, parameters(spec))
    bound = 1 / np.sqrt(spec.hidden_size)
    assert 0.99 * bound < params.max() <= bound and -bound <= params.min() < -0.99 * bound


def test_the_users_data_is_read(tmp_path):
    x = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(load(tmp_path / "x.npy"), x)
    case = CASES["tiny"].at(*x.shape)
    assert workload(case, "gru", "float32", x).x.dtype == np.float32
    assert case.spec("gru").input_size == 4


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 4)), "shape (3, 4)"),
        (np.zeros((3, 0, 4)), "shape (3, 0, 4)"),
        (np.zeros((1, 1, 1), complex), "complex128"),
        (np.full((1, 1, 1), np.nan), "NaN"),
        (np.full((1, 1, 1), np.inf), "infinity"),
        (np.array([[["a"]]]), "<U1"),
        (np.array([[[None]]]), "not a whole .npy file"),
    ],
)
def test_other_data_is_refused_by_name(tmp_path, array, said):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError) as raised:
        load(path)
    assert said in str(raised.value) and "(T, N, I)" in str(raised.value) and str(path) in str(raised.value)


def test_a_file_that_is_missing_or_no_array_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "nowhere.npy")
    (tmp_path / "x.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"not a whole \.npy file"):
        load(tmp_path / "x.npy")


# Timing


class Clock:
    """Time that passes only when a call takes some."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def call(self, name: str, seconds: float):
        def run() -> int:
            self.now += seconds
            self.log.append(name)
            return len(self.log)

        return run

    def __call__(self) -> float:
        return self.now


def test_timing_alternates():
    clock = Clock()
    calls = {"A": clock.call("A", 0.5), "B": clock.call("B", 0.25)}
    timings, results = alternate(calls, 6.0, pause=0, clock=clock)
    assert "".join(clock.log).startswith("AB" + "ABAB")
    assert clock.now <= 6.0
    assert timings["A"].median == 0.5 and timings["B"].median == 0.25
    assert len(timings["A"].seconds) == len(timings["B"].seconds) == 7
    assert results == {"A": len(clock.log) - 1, "B": len(clock.log)}


def test_a_very_long_call_may_do_with_one_sample():
    clock = Clock()
    calls = {"A": clock.call("A", VERY_LONG), "B": clock.call("B", VERY_LONG), "C": clock.call("C", 0.5)}
    timings, _ = alternate(calls, 1.0, once=("A", "C"), pause=0, clock=clock)
    assert clock.log == [*"ABC", *"BCBC"]
    assert timings["A"].median == VERY_LONG
    clock = Clock()
    alternate({"A": clock.call("A", VERY_LONG)}, 3 * VERY_LONG, once="A", pause=0, clock=clock)
    assert clock.log == ["A"] * 3


def test_a_long_call_counts_from_its_first_run():
    clock = Clock()
    alternate({"A": clock.call("A", 10 * LONG), "B": clock.call("B", 2 * LONG)}, 1.0, pause=0, clock=clock)
    assert clock.log == ["A", "B", "A", "B"]


def test_a_short_call_is_repeated_within_a_sample():
    clock = Clock()
    timings, _ = alternate({"A": clock.call("A", SHORT / 10)}, 0.0, pause=0, clock=clock)
    assert timings["A"].median == pytest.approx(SHORT / 10)
    assert len(clock.log) == 2 + 2 * (1 + 10)


def test_a_timing_is_its_median_and_quartiles():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 90.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx(2 / 3)
    assert timing.deviation == pytest.approx(89 / 2 / 3)
    assert Timing((4.0,)).deviation is None


def test_something_is_done_before_every_turn():
    clock = Clock()
    calls = {"A": clock.call("A", 1.0), "B": clock.call("B", 1.0)}
    alternate(calls, 0.0, pause=0, before_turn=lambda: clock.log.append("-"), clock=clock)
    assert "".join(clock.log) == "-A-B" * 3


# Parts of the steps


def steps_of(clock: Clock, step: float, once: float = 0.0):
    """Calls of any number of steps that take the same, and some seconds besides."""
    return lambda steps: clock.call(str(steps), once + step * steps)


def test_a_call_that_is_not_slow_is_measured_whole():
    clock = Clock()
    assert part_of(steps_of(clock, 0.9 * SLOW / 300), 300, clock) is None
    assert clock.now < SLOW / 10
    assert part_of(steps_of(clock, SLOW), FEWEST, clock) is None


@pytest.mark.parametrize("once", [0.0, 0.2])
def test_a_slow_call_is_measured_on_its_first_steps(once):
    clock = Clock()
    part = part_of(steps_of(clock, 0.1, once), 300, clock)
    assert part is not None and part.steps == round(PART / 0.1) and part.total == 300
    assert part.whole(once + 0.1 * part.steps) == pytest.approx(once + 30.0)


def test_a_part_has_its_fewest_steps_and_is_less_than_the_whole():
    clock = Clock()
    part = part_of(steps_of(clock, 10.0), 300, clock)
    assert part is not None and part.steps == FEWEST
    assert part_of(steps_of(clock, 0.2), FEWEST + 1, clock) is None or SLOW < 0.2 * (FEWEST + 1)


def test_noise_does_not_make_a_slow_call_look_short():
    """Few steps that were disturbed took longer than more of them."""
    clock = Clock()
    seconds = {2: 9.0, 4: 1.0}
    part = part_of(lambda steps: clock.call(str(steps), seconds.get(steps, 0.25 * steps)), 300, clock)
    assert part is not None and FEWEST <= part.steps < 300
    assert part.whole(2.0) > 2.0 * 300 / part.steps / 2


def test_a_short_disturbance_does_not_make_a_call_slow():
    clock = Clock()
    disturbed = {4: 0.3}
    part = part_of(lambda steps: clock.call(str(steps), 0.001 * steps + disturbed.get(steps, 0.0)), 300, clock)
    assert part is None
    assert clock.log == ["2", "2", "4", "4", "16", "16"]


def test_a_part_takes_turns_with_whole_calls_and_is_told_as_a_whole():
    clock = Clock()
    part = part_of(steps_of(clock, 0.1), 300, clock)
    clock.log.clear()
    timings, results = alternate({"A": part, "B": clock.call("B", 20.0)}, 1.0, once=["A"], pause=0, clock=clock)
    name = str(part.steps)
    assert clock.log == [name, name, "B", name, name, "B"]
    assert timings["A"].seconds == pytest.approx((30.0,) * 4) and timings["B"].seconds == pytest.approx((20.0, 20.0))
    assert results["A"] == 5


@pytest.fixture
def slow_baseline(monkeypatch):
    """Has the non-fused network of SMALL measured on three of its six steps."""

    def part(call_of, total):
        return Part(call_of(3), 3, total, 0.0)

    monkeypatch.setattr(runner, "part_of", part)
    monkeypatch.setattr(runner, "PAUSE", 0.0)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=needs_torch)])
def test_a_row_says_on_how_many_steps_its_baseline_was_measured(known_peak, slow_baseline, phase, torch):
    plan = Plan([SMALL], ["gru"], [PHASES[phase]], budget=0.0, torch=torch)
    [row] = runner.run(plan)
    assert row.wrong is None and row.parts == {NON_FUSED: 3}
    assert set(row.timings) == set(plan.contenders()) and len(row.timings[NON_FUSED].seconds) >= 4
    assert "(measured on 3 of 6 steps)" in tables.summary(row)
    table = tables.tables([row], plan.contenders())[0]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["steps\nrun"] == ["3"] and "±" in cells["Non-\nFusedRNN\nsamples/sec"][0]
    [line] = tables.parts_said([row])
    assert line.startswith("non-fused measured on 3 of 6 steps in 1 of 1 rows") and "--full" in line
    figures = report(plan, [row])
    assert figures["rows"][0]["seconds"][NON_FUSED]["steps"] == 3
    assert figures["rows"][0]["seconds"][FUSED]["steps"] == 6 and figures["plan"]["full"] is False


def test_a_full_plan_measures_all_steps(known_peak, slow_baseline):
    [row] = runner.run(small_plan(full=True))
    assert row.wrong is None and not row.parts and "steps" not in tables.summary(row)
    assert tables.parts_said([row]) == []


def test_the_steps_of_several_rows_are_said_in_a_line():
    row = measured(CASES["ds2"], "gru", {NON_FUSED: (2.0,), FUSED: (1.0,)})
    rows = [row, *(replace(row, parts={NON_FUSED: steps}) for steps in (15, 80, 10))]
    [line] = tables.parts_said(rows)
    assert line.startswith("non-fused measured on 10 to 80 of 300 steps in 3 of 4 rows")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("name", "value", "said"), [("y", 0.9, "3 of 6 steps"), ("y", np.nan, "not finite")])
def test_what_goes_wrong_while_a_part_is_timed_is_wrong(
    monkeypatch, known_peak, slow_baseline, phase, name, value, said
):
    plan = Plan([SMALL], ["lstm"], [PHASES[phase]], budget=0.0)
    make = contenders.train_non_fused if PHASES[phase].training else contenders.non_fused
    spoiled(monkeypatch, set_element(name, value), calls_before=3, phase=phase, make=make)
    [row] = runner.run(plan)
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}") and said in row.wrong
    assert not row.timings and row.peak is None


# Tolerance


def test_tolerance_grows_with_the_sum_and_the_type():
    assert tolerance("float32", 1600)[0] > tolerance("float32", 100)[0] > tolerance("float64", 1600)[0]
    assert tolerance("float32", 100, scale=50.0)[1] == pytest.approx(50 * tolerance("float32", 100)[1])
    assert tolerance("float32", 100, scale=0.1) == tolerance("float32", 100)
    assert tolerance("float32", 1602)[1] < 1e-4


def test_the_longest_sum_is_over_layers():
    assert longest_sum(CASES["ds2"].spec("lstm")) == 1602
    assert longest_sum(CASES["ds2-5bi"].spec("lstm")) == 2402


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("H", [1, 17, 100])
def test_rounding_stays_within_tolerance_and_a_lost_product_does_not(mode, H):
    work = workload(Case("t", 63, 3, 129, H, 2, True), mode, "float32")
    exact = work.exact()
    expected, _ = reference.forward(exact.spec, exact.x, exact.params)
    rtol, atol = tolerance("float32", longest_sum(work.spec))
    assert difference(reference.forward(work.spec, work.x, work.params)[0], expected, rtol, atol) is None
    lossy = work.params.copy()
    work.spec.layout.view(lossy, 0, 0, "i2h_weight")[:, 5] = 0
    assert difference(reference.forward(work.spec, work.x, lossy)[0], expected, rtol, atol)


def test_a_difference_is_located():
    expected = np.zeros((2, 3))
    actual = expected.copy()
    actual[1, 2] = 1.0
    assert difference(actual, expected, 0.1, 0.1) == "[1, 2] is 1 instead of 0"
    actual[0, 1] = np.nan
    assert difference(actual, expected, 0.1, 0.1) == "[0, 1] is nan instead of 0"
    assert difference(expected, expected, 0.1, 0.1) is None
    assert difference(expected[:1], expected, 0.1, 0.1) == "shape (1, 3) instead of (2, 3)"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_difference_is_found_in_every_block(place):
    size = 2 * tolerances._BLOCK + 5
    index = (0, tolerances._BLOCK, size - 1)[place]
    expected = np.ones((1, size))
    actual = expected.astype(np.float32)
    assert difference(actual, expected, 0.0, 0.1) is None
    for value in (1.2, np.nan, np.inf):
        actual[0, index] = value
        assert (difference(actual, expected, 0.0, 0.1) or "").startswith(f"[0, {index}] is ")
    assert difference(np.empty((0, 3)), np.empty((0, 3)), 0.0, 0.0) is None


# Rows


def spoiled(monkeypatch, spoil, calls_before: int = 0, phase="inference", make=contenders.non_fused) -> None:
    """Have the fused contender of a phase go wrong from some call on."""
    makers = PHASES[phase].makers

    def wrong_maker(work):
        run, calls = make(work), iter(range(10**9))

        def wrong(batch):
            results = {name: array.copy() for name, array in run(batch)().items()}
            if next(calls) >= calls_before:
                spoil(results)
            return lambda: results

        return wrong

    monkeypatch.setitem(makers, FUSED, wrong_maker)


def set_element(name: str, value: float):
    def spoil(results) -> None:
        results[name].flat[-1] = value

    return spoil


@pytest.mark.parametrize("mode", ["lstm", "rnn_relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_row_has_every_figure(known_peak, mode, dtype):
    [row] = runner.run(small_plan((mode,), dtype=dtype, threads=2))
    assert row.wrong is None
    assert row.peak == 200.0
    assert set(row.timings) == {NON_FUSED, FUSED}
    assert row.rate(FUSED) == pytest.approx(SMALL.N / row.timings[FUSED].median)
    assert row.share() == pytest.approx(row.gflops() / 200.0)
    assert row.ratio(NON_FUSED) == pytest.approx(row.rate(FUSED) / row.rate(NON_FUSED))


@pytest.mark.parametrize(("name", "value"), [("y", 0.9), ("y", np.nan), ("h_n", 0.9), ("c_n", 5.0)])
def test_a_wrong_result_is_not_timed(monkeypatch, name, value):
    spoiled(monkeypatch, set_element(name, value))
    monkeypatch.setattr(runner, "alternate", lambda *_, **__: pytest.fail("a wrong result was timed"))
    [row] = runner.run(small_plan())
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}[")
    assert not row.timings and row.share() is None


def test_a_result_that_goes_wrong_while_it_is_timed_is_wrong(monkeypatch, known_peak):
    spoiled(monkeypatch, set_element("y", 0.9), calls_before=3)
    [row] = runner.run(small_plan())
    assert row.wrong is not None and "as timed" in row.wrong
    assert not row.timings


def test_an_expensive_case_is_checked_on_its_first_steps(monkeypatch, known_peak):
    flops = SMALL.spec("lstm").flops(SMALL.T, SMALL.N)
    monkeypatch.setattr(checks, "CHECKED_FLOPS", flops / 3)
    spoiled(monkeypatch, set_element("y", 0.9))
    [row] = runner.run(small_plan())
    assert row.wrong is not None and "2 of 6 steps" in row.wrong


def test_a_single_step_is_never_all_that_is_checked():
    assert checks.checked_steps(300, 1e15) == 2
    assert checks.checked_steps(300, 2 * checks.CHECKED_FLOPS) == 150
    assert checks.checked_steps(300, 1.0) == 300
    assert checks.checked_steps(1, 1e15) == 1


def test_an_unknown_phase_is_refused():
    assert phase_named("training").training and not phase_named("inference").training
    with pytest.raises(ValueError, match="inference, training"):
        phase_named("dreaming")


@needs_torch
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", MODES)
def test_torch_computes_the_same(mode, phase):
    work = workload(SMALL, mode, "float64")
    assert checks.check(work, PHASES[phase], {TORCH: PHASES[phase].makers[TORCH](work)}, flops=1) is None


# Training


class TorchOp:
    """An operator whose backward is torch's: what the fused contender asks of one, and a record of it."""

    made: ClassVar[list[TorchOp]] = []

    def __init__(self, spec, backend) -> None:
        assert backend is None
        self.spec, self.params, self.out = spec, [], []
        TorchOp.made.append(self)

    def compile(self, training):
        return self

    def forward(self, x, params, states, *, training):
        assert training
        self.params.append(params.copy())
        case = replace(SMALL, T=len(x))
        work = Workload(case, self.spec, x, params)
        y, *final = reference.forward(self.spec, x, params, states)
        return y, final[0], (work, states)

    def backward(self, dy, dstates, reserve, *, out):
        work, states = reserve
        results = contenders.train_torch_nn(work)(Batch(work.x, states, dy, dstates))()
        dx, dparams, dinitial = out
        for into, name in [(dx, "dx"), (dparams, "dparams"), *zip(dinitial, ("dh0", "dc0"), strict=False)]:
            into[...] = results[name]
        self.out.append(out)
        return out


@pytest.fixture
def training_by_torch(monkeypatch, known_peak):
    """Every contender's gradients come from torch: what is tested here is the benchmark, not the operator."""
    TorchOp.made.clear()
    monkeypatch.setattr(fusedrnn, "RNNOp", TorchOp)
    monkeypatch.setitem(PHASES["training"].makers, NON_FUSED, contenders.train_torch_nn)


def training_plan(mode: str, dtype: str = "float32") -> Plan:
    return Plan([SMALL], [mode], [PHASES["training"]], dtype, budget=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_are_the_same_numbers_for_all(dtype):
    work = workload(SMALL, "lstm", dtype)
    batch, exact = work.batch(4), work.exact().batch(4)
    assert batch.x.shape == (4, 3, 5) and batch.dy.shape == (4, 3, 14)
    assert [state.shape for state in (*batch.states, *batch.dstates)] == [(4, 3, 7)] * 4
    assert not any(state.any() for state in batch.states)
    for one, other in zip((batch.dy, *batch.dstates), (exact.dy, *exact.dstates), strict=True):
        assert one.dtype == dtype and other.dtype == np.float64
        assert np.array_equal(one, other)
        assert 0.8 < np.abs(one).max() * np.sqrt(12) <= 1.0


@pytest.mark.parametrize("mode", MODES)
def test_a_right_training_row_has_every_figure(known_peak, mode):
    [row] = runner.run(training_plan(mode))
    assert row.wrong is None and set(row.timings) == {NON_FUSED, FUSED}
    assert row.flops == 3 * SMALL.spec(mode).flops(SMALL.T, SMALL.N)


@needs_torch
def test_parameters_change_at_every_call_and_gradients_reuse_their_arrays(training_by_torch):
    list(runner.run(training_plan("lstm")))
    [op] = TorchOp.made
    assert len(op.params) >= 3
    for before, after in pairwise(op.params):
        changed = np.flatnonzero(before != after)
        assert {entry.offset for entry in op.spec.layout} == set(changed)
        np.testing.assert_array_max_ulp(before, after, maxulp=1)
    assert np.array_equal(op.params[0], op.params[2])
    assert len({id(out[1]) for out in op.out}) == 1
    assert len({id(out[0]) for out in op.out if len(out[0]) == SMALL.T}) == 1


@needs_torch
@pytest.mark.parametrize("name", ["y", "h_n", "c_n", "dx", "dparams", "dh0", "dc0"])
@pytest.mark.parametrize("calls_before", [0, 3])
def test_every_output_and_gradient_is_checked(monkeypatch, training_by_torch, name, calls_before):
    spoiled(monkeypatch, set_element(name, 0.9), calls_before, "training", contenders.train_torch_nn)
    [row] = runner.run(training_plan("lstm"))
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}")
    assert ("as timed" in row.wrong) == (calls_before > 0)
    assert not row.timings


@needs_torch
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", ["product", "step", "bias"])
def test_gradients_that_lack_something_are_wrong(training_by_torch, mode, lost):
    case = Case("t", 63, 3, 129, 100, 2, True)
    work = workload(case, mode, "float32")
    batch = work.batch(case.T)
    run = contenders.train_torch_nn(work)
    params = work.params.copy()
    if lost == "product":
        work.spec.layout.view(params, 1, 1, "h2h_weight")[:, 5] = 0
    elif lost == "bias":
        work.spec.layout.view(params, 0, 0, "h2h_bias")[:] = 0
    dy = batch.dy.copy()
    if lost == "step":
        dy[30] = 0
    faulty = contenders.train_torch_nn(replace(work, params=params))

    def call(given):
        results = run(given)()
        wrong = faulty(replace(given, dy=dy))()
        return lambda: results | {"dparams": wrong["dparams"]}

    phase = PHASES["training"]
    assert checks.check(work, phase, {FUSED: run}, flops=1) is None
    assert "dparams" in (checks.check(work, phase, {FUSED: call}, flops=1) or "")


@needs_torch
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("H", [1, 17, 100])
def test_gradients_in_single_precision_stay_within_tolerance(mode, H):
    work = workload(Case("t", 63, 3, 129, H, 2, True), mode, "float32")
    expected = contenders.train_torch_nn(work.exact())(work.exact().batch(63))()
    actual = contenders.train_torch_nn(work)(work.batch(63))()
    for name in expected:
        if name.startswith("d"):
            tight = gradient_tolerance("float32", work.spec, 63, 3, float(np.abs(expected[name]).max()))
            assert difference(actual[name], expected[name], *tight) is None


def test_the_gradient_tolerance_is_relative_to_the_gradients():
    spec = CASES["ds2"].spec("lstm")
    rtol, atol = gradient_tolerance("float32", spec, 300, 20, 1e-3)
    assert atol == pytest.approx(1e-3 * rtol) and rtol == tolerance("float32", 1602 + 3200 + 6000)[0] < 1.1e-4
    assert difference(np.zeros(3), np.zeros(3), rtol, 0.0) is None
    assert difference(np.array([0.0, 1e-30]), np.zeros(2), rtol, 0.0) == "[1] is 1e-30 instead of 0"


def test_a_few_slopes_of_a_large_relu_network_may_differ():
    spec = CASES["ds2"].spec("rnn_relu")
    limit = kink_tolerance("float32", spec)
    expected = np.random.default_rng(1).standard_normal((300, 20 * 800))
    actual = expected.copy()
    actual.flat[::1_000_000] = 0  # four of them
    assert limit < 0.005 and norm_difference(actual, expected, limit) is None
    actual[7] = 0
    assert "differs by" in (norm_difference(actual, expected, limit) or "")
    actual[7] = np.nan
    assert "differs by nan" in (norm_difference(actual, expected, limit) or "")
    assert "shape (2, 3)" in (norm_difference(np.zeros((2, 3)), np.zeros(2), limit) or "")
    assert norm_difference(np.zeros(2), np.zeros(2), limit) is None


def test_the_published_tables_take_less_than_six_minutes():
    plan = Plan([CASES["ds2"], CASES["ds2-5bi"]], tuple(NAMES), list(PHASES.values()))
    seconds = expected_seconds(plan, peak=165.0)
    assert len(seconds) == len(plan.rows()) == 16
    assert sum(seconds) < 6 * 60
    assert seconds[0] < 30.0
    assert sum(expected_seconds(plan, peak=16.5)) > 3 * sum(seconds)
    assert max(seconds) == seconds[9]  # training five layers of LSTM
    full = expected_seconds(replace(plan, full=True), peak=165.0)
    assert all(whole >= part for whole, part in zip(full, seconds, strict=True)) and sum(full) > 1.5 * sum(seconds)


def test_a_short_row_is_expected_to_take_its_budget():
    plan = small_plan()
    [quick], [long] = (expected_seconds(replace(plan, budget=budget), 100.0) for budget in (0.0, 30.0))
    assert quick < 2.0 and long == pytest.approx(quick + 30.0, abs=0.1)


# What is shown


def test_tables_have_the_published_form():
    rows = [
        measured(CASES[name], mode, {NON_FUSED: (0.4,), FUSED: (0.1,)})
        for name in ("ds2", "ds2-5bi")
        for mode in ("lstm", "gru", "rnn_relu", "rnn_tanh")
    ]
    single, deep = tables.tables(rows, (NON_FUSED, FUSED))
    assert single.title == "T, N, I, H = 300, 20, 800, 800 layer=1 bidirection=False"
    assert deep.title == "T, N, I, H = 300, 20, 800, 800 layer=5 bidirection=True"
    columns = [list(column.cells) for column in single.columns]
    assert columns[0] == ["LSTM-Inference", "GRU-Inference", "vRNN(Relu)-Inference", "vRNN(Tanh)-Inference"]
    assert columns[1] == ["50.00"] * 4 and columns[2] == ["200.00"] * 4 and columns[3] == ["400.00%"] * 4
    assert columns[4] == ["210.98%", "305.87%", "296.92%", "193.33%"]
    assert list(deep.columns[4].cells) == ["287.67%", "333.33%", "329.53%", "267.71%"]


def test_tables_fit_a_terminal_of_80_columns():
    seconds = {NON_FUSED: (0.1, 0.08), FUSED: (0.025, 0.026)}
    rows = [
        replace(measured(CASES[name], mode, seconds, phase), parts={NON_FUSED: 150})
        for name in ("ds2", "ds2-5bi")
        for mode in NAMES
        for phase in PHASES
    ]
    for table in tables.tables(rows, (NON_FUSED, FUSED)):
        assert Console(width=200).measure(table).maximum <= 80


def test_training_stands_below_inference():
    rows = [
        measured(CASES["ds2"], mode, {NON_FUSED: (0.4,), FUSED: (0.2,)}, phase)
        for mode in ("lstm", "gru")
        for phase in PHASES
    ]
    [table] = tables.tables(rows, (NON_FUSED, FUSED))
    labels = ["LSTM-Inference", "LSTM-Training", "GRU-Inference", "GRU-Training"]
    assert list(table.columns[0].cells) == labels
    assert list(table.columns[4].cells) == ["210.98%", "209.65%", "305.87%", "214.03%"]


def test_other_rows_share_a_general_table():
    rows = [measured(CASES[name], "gru", {NON_FUSED: (0.4,), FUSED: (0.1,), TORCH: (0.2,)}) for name in ("tiny", "bi2")]
    rows.append(replace(rows[0], case=CASES["ds2"], dtype="float64"))
    [table] = tables.tables(rows, (NON_FUSED, FUSED, TORCH))
    assert table.row_count == 3
    assert list(table.columns[-1].cells) == ["200.00%"] * 3


def test_nothing_was_published_for_other_sizes():
    assert published_percent(CASES["ds2"], "lstm", "inference", "float32") == 210.98
    assert published_percent(CASES["ds2"].at(3, 4, 5), "lstm", "inference", "float32") is None
    assert published_percent(CASES["tiny"], "lstm", "inference", "float32") is None


def test_a_report_survives_json(known_peak, monkeypatch):
    plan = small_plan(("lstm", "gru"))
    rows = [*runner.run(plan), Row(SMALL, "gru", "inference", "float32", 1, 5, wrong="fused: y[0] is 1")]
    figures = report(plan, rows)
    again = json.loads(json.dumps(figures))
    assert again == figures
    assert [row["mode"] for row in again["rows"]] == ["lstm", "gru", "gru"]
    first, wrong = again["rows"][0], again["rows"][2]
    assert first["case"]["H"] == SMALL.H and first["seconds"][FUSED]["median"] > 0
    assert wrong["wrong"] and not wrong["seconds"] and wrong["share_of_peak"] is None
    assert {"processor", "target", "vector_bits", "threads", "versions"} <= set(again["machine"])


def test_a_plot_is_a_picture(tmp_path):
    rows = [
        Row(SMALL, "gru", "inference", "float32", 1, 5, wrong="fused: y[0] is 1"),
        measured(SMALL, "lstm", {NON_FUSED: (0.4,), FUSED: (0.1,)}),
        measured(SMALL, "lstm", {NON_FUSED: (0.4,), FUSED: (0.1,)}, "training"),
    ]
    plots.plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    plots.plot(rows, tmp_path / "rows.svg")
    drawn = (tmp_path / "rows.svg").read_text()
    assert "<!-- wrong" in drawn
    assert drawn.count("<!-- inference -->") == 2 and drawn.count("<!-- training -->") == 1
    plots.plot(rows[:1], tmp_path / "wrong.svg")
    assert "<!-- training -->" not in (tmp_path / "wrong.svg").read_text()
