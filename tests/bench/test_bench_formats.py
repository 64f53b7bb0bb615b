"""The operator in several formats of GEMM operands: its rows, checks, shares of each format's peak, table and file."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench_rows import SMALL, small_config
from fusedrnn.bench import contenders, lines, peaks, runner, tables
from fusedrnn.bench.contenders import FUSED, PHASES
from fusedrnn.bench.data import IN_FORMAT
from fusedrnn.bench.formats import format_fields
from fusedrnn.bench.report import row_report
from fusedrnn.bench.rows import Row
from fusedrnn.bench.timing import Timing
from fusedrnn.cli import bench
from fusedrnn.cli.app import app
from fusedrnn.runtime.peak import PeakSample

ALL = ("float32", "bfloat16", "int8")
BF16, INT8 = IN_FORMAT["bfloat16"], IN_FORMAT["int8"]
OTHERS = {"bfloat16": 200.0, "int8": 400.0}
RATES = {"float32": 100.0, **OTHERS, "int8_weights": 100.0}


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    """Each format has an instruction, and a peak, of its own."""
    monkeypatch.setattr(peaks, "instruction_of", lambda number_format, target: number_format)
    monkeypatch.setattr(peaks, "measure_peak", lambda number_format, threads: RATES[number_format])
    monkeypatch.setattr(peaks, "sample_peak", lambda number_format, threads: PeakSample(RATES[number_format], True))
    monkeypatch.setattr(bench, "measure_bandwidth", lambda threads: {})


def rows(modes=("lstm",), phase="inference", formats=ALL) -> list[Row]:
    return list(runner.run(small_config(modes, phase, **format_fields(formats))))


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_relu", "rnn_tanh"])
@pytest.mark.parametrize("phase", ["inference", "training"])
def test_every_format_is_right_and_timed(mode, phase):
    [row] = rows((mode,), phase)
    assert row.wrong is None, row.wrong
    trained = {FUSED, BF16}
    assert set(row.timings) == (trained if phase == "training" else trained | {INT8})
    assert row.failures == ({INT8: "int8 is a format of inference"} if phase == "training" else {})
    assert row.peak == 100.0 and row.peaks == OTHERS


def test_weights_in_int8():
    [row] = rows(formats=("float32", "int8_weights"))
    assert row.wrong is None and set(row.timings) == {FUSED, IN_FORMAT["int8_weights"]}


def row_of(seconds: dict[str, float], **fields) -> Row:
    flops = 10**9
    timings = {name: Timing((value,)) for name, value in seconds.items()}
    formats = {IN_FORMAT[name]: name for name in ALL}
    return Row(SMALL, "lstm", "inference", "float32", 2, flops, 100.0, timings, formats=formats, peaks=OTHERS, **fields)


def test_shares_are_of_the_formats_own_peak():
    row = row_of({FUSED: 0.02, BF16: 0.01, INT8: 0.004})
    assert [row.share(name) for name in row.timings] == pytest.approx([50 / 100, 100 / 200, 250 / 400])
    assert [row.over_float32(name) for name in row.timings] == pytest.approx([1.0, 2.0, 5.0])
    figures = row_report(row)
    assert figures["shares_of_peak"] == pytest.approx({FUSED: 0.5, BF16: 0.5, INT8: 0.625})
    assert figures["over_float32"] == pytest.approx({FUSED: 1.0, BF16: 2.0, INT8: 5.0})
    assert figures["peaks"] == {"float32": 100.0, **OTHERS}
    assert figures["formats"] == {IN_FORMAT[name]: name for name in ALL}


def test_a_share_above_the_formats_peak_is_refused():
    row = row_of({FUSED: 0.02, INT8: 0.002})
    assert row.share(INT8) is None and row.share(FUSED) == pytest.approx(0.5)
    [line] = lines.rejected_share_lines([row])
    assert "fused int8: no share of the peak of int8: 500.0 GFLOP/s are above the 400.0 GFLOP/s" in line
    assert "fused int8 above the peak of int8 as measured" in lines.summary(row)


def test_table_has_the_ratio_to_float32():
    table = tables.formats_table(
        [row_of({FUSED: 0.02, BF16: 0.01, INT8: 0.004}, flops_of=dict.fromkeys((FUSED, BF16, INT8), 10**9))]
    )
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [line[1:] for line in cells] == [
        (FUSED, "20.0 ms", "50.0", "50.0%", ""),
        (BF16, "10.0 ms", "100.0", "50.0%", "2.000"),
        (INT8, "4.00 ms", "250.0", "62.5%", "5.000"),
    ]
    console = Console(width=120)
    with console.capture() as printed:
        console.print(table)
    assert "format's" in printed.get()


def test_rows_share_the_best_peak_of_each_format():
    slow = {name: rate / 2 for name, rate in OTHERS.items()}
    first, second = row_of({FUSED: 0.02}), row_of({FUSED: 0.02})
    object.__setattr__(first, "peaks", slow)
    assert [row.peaks for row in peaks.at_best_peak([first, second])] == [OTHERS, OTHERS]


def test_formats_with_one_instruction_have_one_peak(monkeypatch):
    taken = []
    monkeypatch.setattr(peaks, "instruction_of", lambda number_format, target: number_format == "int8")
    monkeypatch.setattr(peaks, "measure_peak", lambda number_format, threads: taken.append(number_format) or 90.0)
    peak = peaks.RunPeak("float32", 2, ALL)
    peak.sample()
    assert taken == ["float32", "int8"]
    assert peak.gflops == 100.0 and peak.by_format == {"bfloat16": 100.0, "int8": 400.0}


@pytest.mark.parametrize("formats", [ALL, ("bfloat16", "int8"), ("int8",)])
@pytest.mark.parametrize("spoiled", ["first", "timed"])
def test_a_wrong_format_is_found(monkeypatch, formats, spoiled):
    """By the float64 reference on the first steps, and by float32 as timed."""
    make, calls = contenders.fused, iter(range(10**6))

    def maker(work):
        run = make(work)

        def wrong(batch):
            results = {name: array.copy() for name, array in run(batch)().items()}
            if work.spec.compute == "int8" and (spoiled == "first" or next(calls) > 0):
                results["y"][-1, -1, -1] += 1.0
            return lambda: results

        return wrong

    monkeypatch.setitem(PHASES["inference"].makers, FUSED, maker)
    [row] = rows(formats=formats)
    assert row.wrong and row.wrong.startswith("fused int8: y differs by a norm of ") and not row.timings
    assert ("float64 reference" in row.wrong) == (spoiled == "first")


def invoke(*arguments: object):
    tiny = ("bench", "--cases", "tiny", "--modes", "gru", "--seconds", "0", "--threads", "1")
    return CliRunner().invoke(app, [*tiny, *map(str, arguments)])


def test_command_line(tmp_path):
    result = invoke("--compute", "float32,bfloat16,int8", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    assert "Formats of GEMM operands" in result.output
    assert "peaks: float32 100.0 GFLOP/s, bfloat16 200.0 GFLOP/s, int8 400.0 Gop/s" in result.output
    assert result.output.count("int8 is a format of inference") == 1
    figures = json.loads((tmp_path / "rows.json").read_text())
    assert figures["plan"]["compute"] == list(ALL)
    assert [sorted(row["over_float32"]) for row in figures["rows"]] == [[FUSED, BF16, INT8], [FUSED, BF16]]


def test_int8_alone_has_no_training():
    result = invoke("--compute", "int8", "--phases", "training")
    assert result.exit_code == 2, result.output
    expected = "error: there is nothing to time: fused int8: int8 is a format of inference (tiny gru training)"
    assert expected in result.output


def test_float32_alone_is_the_usual_benchmark(tmp_path):
    result = invoke("--compute", "float32", "--phases", "inference", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert sorted(row["seconds"]) == ["fused", "non-fused"] and not row["over_float32"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compute", "float16"), "unknown format 'float16'; valid: float32, bfloat16, int8"),
        (("--compute", "int8", "--dtype", "float64"), "--compute int8 needs --dtype float32"),
        (("--compute", "int8", "--backends", "cpu"), "--compute cannot be used with"),
        (("--compute", "bfloat16", "--variants"), "--compute cannot be used with"),
    ],
)
def test_options_that_exclude_one_another(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.output.startswith("error: ") and words in result.output
