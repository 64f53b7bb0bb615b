"""Tables and options of benchmarks of PyTorch modules."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from bench_rows import SMALL, small_config
from fusedrnn.bench import lines, runner, tables
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED, workload
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import Timing
from fusedrnn.cli.bench import contender_fields, make_config
from fusedrnn.testing.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("known_peak")


def options_config(**options) -> BenchConfig:
    return make_config("tiny", "lstm", "inference", "float32", 1, **contender_fields(**options))


def packed_row(seconds: dict[str, float], phase: str = "inference", case: Case = SMALL) -> Row:
    work = workload(case, "gru", "float32", packed=True)
    timings = {contender: Timing((value,)) for contender, value in seconds.items()}
    valid = tuple(map(int, work.lengths))
    flops, flops_of_unpacked = (each.flops(training=PHASES[phase].training) for each in (work, work.unpacked()))
    return Row(
        case, "gru", phase, "float32", 2, flops,
        peak=200.0, timings=timings, lengths=valid, flops_of={UNPACKED: flops_of_unpacked},
    )  # fmt: skip


def test_options_choose_the_contenders():
    assert options_config().contenders == (NON_FUSED, FUSED)
    assert options_config(torch=True).contenders == (NON_FUSED, FUSED, TORCH, IN_TORCH)
    for options in ({"only_torch": True}, {"only_torch": True, "torch": True}):
        assert options_config(**options).contenders == (TORCH, IN_TORCH)
    for options in ({"packed": True}, {"packed": True, "torch": True}, {"packed": True, "only_torch": True}):
        assert options_config(**options).contenders == (TORCH, IN_TORCH, UNPACKED)


@pytest.mark.parametrize("name", ["torch", "only_torch", "packed"])
def test_options_that_need_torch_are_named_without_it(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        options_config(**{name: True})
    assert str(raised.value) == f"--{name.replace('_', '-')} needs PyTorch: install fusedrnn with its extra 'torch'"


def test_modules_have_their_own_table():
    seconds = {NON_FUSED: 0.4, FUSED: 0.1, TORCH: 0.2, IN_TORCH: 0.125}
    timings = {contender: Timing((value,)) for contender, value in seconds.items()}
    row = Row(CASES["ds2"], "lstm", "inference", "float32", 2, 10**9, 200.0, timings)
    operators, modules = tables.tables([row], tuple(seconds))
    assert operators.title.endswith("bidirection=False") and modules.title.startswith("Modules of PyTorch")
    figures = [next(iter(column.cells)) for column in modules.columns]
    assert figures[1:] == ["100.00", "160.00", "160.00%", "8.0", "4.0%"]
    only = {contender: timings[contender] for contender in (TORCH, IN_TORCH)}
    [alone] = tables.tables([replace(row, timings=only)], (TORCH, IN_TORCH))
    assert [list(column.cells) for column in alone.columns] == [list(column.cells) for column in modules.columns]
    assert lines.summary(row).endswith("fused in torch 160.00; 5.0% of the FMA peak")


def test_short_calls_are_shown_in_microseconds():
    def row(name: str, fused: float, modules: float) -> Row:
        timings = {NON_FUSED: 4e-3, FUSED: fused, TORCH: 2e-3, IN_TORCH: modules}
        return Row(
            CASES[name], "gru", "inference", "float32", 2, 10**6, 200.0,
            {contender: Timing((seconds,)) for contender, seconds in timings.items()},
        )  # fmt: skip

    contenders = (NON_FUSED, FUSED, TORCH, IN_TORCH)
    operators, modules = tables.tables([row("tiny", 25e-6, 40e-6), row("bi2", 1.5e-3, 0.9e-3)], contenders)
    assert operators.columns[-1].header == "FusedRNN\nµs/call"
    assert list(operators.columns[-1].cells) == ["25.00", ""]
    assert modules.columns[-1].header == "fused\nin torch\nµs/call"
    assert list(modules.columns[-1].cells) == ["40.00", "900.00"]
    assert not any("torch.nn\nµs" in column.header for column in modules.columns)
    for table in tables.tables([row("bi2", 1.5e-3, 1e-3)], contenders):
        assert not any("µs" in column.header for column in table.columns)


def test_a_packed_table_shows_the_rate_of_useful_work():
    row = packed_row({TORCH: 0.2, IN_TORCH: 0.1, UNPACKED: 0.1})
    [table] = tables.tables([row, replace(row, timings={}, wrong="no")], (TORCH, IN_TORCH, UNPACKED))
    assert table.title.endswith("lengths in [T/2, T]")
    useful = 100 * sum(row.lengths) / (SMALL.T * SMALL.N)
    assert table.columns[-1].header == "of\nunpacked\nGFLOP/s"
    assert next(iter(table.columns[-1].cells)) == f"{useful:.1f}%"
    assert "packed: samples/sec" in lines.summary(row)
    assert lines.summary(row).endswith(f"{useful:.1f}% of unpacked GFLOP/s")


@pytest.mark.parametrize(
    "contenders", [(NON_FUSED, FUSED, TORCH, IN_TORCH), (TORCH, IN_TORCH), (TORCH, IN_TORCH, UNPACKED)], ids=len
)
def test_a_report_has_every_contender(contenders):
    config, packed = small_config(contenders=contenders), UNPACKED in contenders
    rows = [*runner.run(config), Row(SMALL, "gru", "inference", "float32", 1, 5, wrong="fused: y[0] is 1")]
    again = json.loads(json.dumps(report(config, rows)))
    assert tuple(again["plan"]["contenders"]) == contenders and again["plan"]["packed"] == packed
    good, wrong = again["rows"]
    for table in ("seconds", "samples_per_second", "gflops", "shares_of_peak"):
        assert set(good[table]) == set(contenders) and not wrong[table]
    assert all(good["seconds"][each]["median"] > 0 for each in contenders)
    assert good["fused_in_torch_over"][TORCH] == rows[0].ratio(TORCH, IN_TORCH)
    assert set(good["fused_over"]) == ({NON_FUSED, TORCH} if FUSED in contenders else set())
    assert good["packed_over_unpacked"] == (rows[0].packed_over_unpacked() if packed else None)
    assert good["lengths"] == (list(rows[0].lengths) if packed else None)
    assert wrong["fused_in_torch_over"] == {} and wrong["packed_over_unpacked"] is None
