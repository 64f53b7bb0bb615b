"""The FMA peak: threads that run at once, the best of a run, and no share of it above 100 %."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench_rows import SMALL, small_config
from fusedrnn.bench import lines, peaks, runner, tables, variants
from fusedrnn.bench.contenders import FUSED, NON_FUSED, PHASES
from fusedrnn.bench.peaks import RunPeak, at_best_peak
from fusedrnn.bench.report import row_report
from fusedrnn.bench.rows import MEASUREMENTS, Row
from fusedrnn.bench.timing import Timing
from fusedrnn.runtime.peak import PeakSample

CONFIG = small_config(threads=2)


@pytest.fixture
def sampled(monkeypatch):
    """Has the peak measured as 100 GFLOP/s, and sampled as told."""

    def sample_as(*rates: float, measured: tuple[float, ...] = (100.0,)) -> list[str]:
        log: list[str] = []
        samples, thorough = iter(rates), iter(measured)
        last = [0.0, 0.0]

        def sample(dtype: str, threads: int) -> PeakSample:
            log.append("sample")
            last[0] = next(samples, last[0])
            return PeakSample(last[0], True)

        def measure(dtype: str, threads: int) -> float:
            log.append("measure")
            last[1] = next(thorough, last[1])
            return last[1]

        monkeypatch.setattr(peaks, "sample_peak", sample)
        monkeypatch.setattr(peaks, "measure_peak", measure)
        return log

    return sample_as


def test_the_peak_of_a_run_only_rises(sampled):
    sampled(90.0, 120.0, 110.0, measured=(100.0, 80.0))
    run = RunPeak("float32", 2)
    rates = []
    for _ in range(3):
        run.sample()
        rates.append(run.gflops)
    run.measure()
    assert rates == [100.0, 120.0, 120.0] and run.gflops == 120.0


def test_the_peak_is_sampled_before_every_turn(sampled, monkeypatch):
    log = sampled(100.0)
    maker = PHASES["inference"].makers[FUSED]

    def logged(work):
        run = maker(work)
        return lambda batch: log.append("fused") or run(batch)

    monkeypatch.setitem(PHASES["inference"].makers, FUSED, logged)
    [row] = runner.run(CONFIG)
    assert row.wrong is None and row.peak == 100.0
    turns = "".join("s" if word == "sample" else "f" if word == "fused" else "m" for word in log)
    assert turns.startswith("mf")  # the run's first measurement, the check
    # Warm-up and two rounds, of two contenders each: fused takes the second of each pair.
    groups = [group for group in turns[2:].split("ss") if group]
    assert len(groups) == 3 and all(set(group) == {"f"} for group in groups)


def measured(gflops: dict[str, float], peak: float | None, **fields) -> Row:
    flops = SMALL.spec("lstm").flops(SMALL.T, SMALL.N)
    timings = {who: Timing((flops / rate / 1e9,)) for who, rate in gflops.items()}
    return Row(SMALL, "lstm", "inference", "float32", 2, flops, peak=peak, timings=timings, **fields)


def test_rows_share_the_best_peak_of_their_run():
    rows = [measured({FUSED: 80.0}, 100.0), measured({FUSED: 80.0}, 160.0), measured({}, None)]
    best = at_best_peak(rows)
    assert [row.peak for row in best] == [160.0, 160.0, None]
    assert best[0].share() == pytest.approx(0.5)
    assert at_best_peak([]) == []


# Shares above 100 %


def test_a_share_above_one_is_rejected_with_a_reason():
    row = measured({NON_FUSED: 30.0, FUSED: 120.0}, 100.0)
    assert row.share() is None and row.share(NON_FUSED) == pytest.approx(0.3)
    assert list(row.rejected_shares) == [FUSED]
    [line] = lines.rejected_share_lines([row])
    assert line.startswith("small-test lstm inference, fused: no share") and "120.0" in line and "100.0" in line
    figures = row_report(row)
    assert figures["share_of_peak"] is None and figures["shares_refused"] == row.rejected_shares
    [table] = tables.tables([row], (NON_FUSED, FUSED))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["of\nFMA\npeak"] == [""] and cells["GFLOP/s"] == ["120.0"]
    assert "above the FMA peak as measured" in lines.summary(row)
    assert not replace(row, peak=130.0).rejected_shares and not replace(row, peak=None).rejected_shares
    assert measured({FUSED: 100.0}, 100.0).share() == pytest.approx(1.0)


def rates_in_turn(monkeypatch, *rates: float) -> list[float]:
    """Have the fused contender of a row time at these rates, one for each time that the row is measured."""
    flops, taken = SMALL.spec("lstm").flops(SMALL.T, SMALL.N), []
    true = runner.alternate

    def alternate(calls, *arguments, **options):
        timings, results = true(calls, *arguments, **options)
        taken.append(rates[min(len(taken), len(rates) - 1)])
        return timings | {FUSED: Timing((flops / taken[-1] / 1e9,))}, results

    monkeypatch.setattr(runner, "alternate", alternate)
    return taken


def test_a_peak_below_a_rate_is_measured_again(sampled, monkeypatch):
    sampled(50.0, measured=(100.0, 150.0))
    taken = rates_in_turn(monkeypatch, 120.0)
    [row] = runner.run(CONFIG)
    assert len(taken) == 1
    assert row.peak == 150.0 and row.share() == pytest.approx(0.8) and not row.rejected_shares


def test_contenders_above_the_peak_are_timed_again(sampled, monkeypatch):
    log = sampled(50.0)
    taken = rates_in_turn(monkeypatch, 120.0, 80.0)
    [row] = runner.run(CONFIG)
    assert taken == [120.0, 80.0] and log.count("measure") == 2
    assert row.share() == pytest.approx(0.8) and not row.rejected_shares


def test_the_number_of_measurements_is_limited(sampled, monkeypatch):
    log = sampled(50.0)
    taken = rates_in_turn(monkeypatch, 120.0)
    [row] = runner.run(CONFIG)
    assert len(taken) == MEASUREMENTS and log.count("measure") == 1 + MEASUREMENTS
    assert row.wrong is None and row.share() is None and list(row.rejected_shares) == [FUSED]


def test_a_variant_has_no_share_above_one(sampled):
    sampled(1e-9, measured=(1e-9,))
    [row] = runner.run(small_config(("rnn_relu",), variants=True))
    assert list(row.timings) == list(row.rejected_shares) == [variants.PLAIN, *variants.VARIANTS["rnn_relu"]]
    assert all(row.share(name) is None and row.gflops(name) > 0 for name in row.timings)
    assert all(replace(row, peak=1e6).share(name) for name in row.timings)
