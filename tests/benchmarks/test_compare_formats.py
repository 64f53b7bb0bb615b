"""Comparisons in several formats of operands: each library in the formats that it has, the best of each, the table."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app
from benchmarks.compare.runner import ComparedRow, Comparison, comparison_report, run
from benchmarks.compare.table import formats_table, summary
from benchmarks.peers import process
from benchmarks.peers.environments import ALL_FORMATS, PEERS, format_of, in_formats, peer_of
from fake_workers import SMALL
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_FORMAT
from fusedrnn.bench.formats import format_fields
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.bench.timing import Timing

BF16, INT8 = IN_FORMAT["bfloat16"], IN_FORMAT["int8"]


def compared(*peers: str, phase: str = "inference", formats=ALL_FORMATS) -> tuple[Comparison, ComparedRow]:
    bench = BenchConfig([SMALL], ["rnn_tanh"], [PHASES[phase]], budget=0.0, **format_fields(formats))
    config = Comparison(bench, in_formats(peers, formats))
    (row,) = run(config)
    return config, row


def test_peers_are_named_by_format():
    names = in_formats(("a", "b-c"), ALL_FORMATS)
    assert names == ("a", "b-c", "a bfloat16", "b-c bfloat16", "a int8", "b-c int8")
    assert [(peer_of(name), format_of(name)) for name in names[1::2]] == [
        ("b-c", "float32"), ("b-c", "bfloat16"), ("b-c", "int8"),
    ]  # fmt: skip


def test_every_peer_that_lacks_a_format_says_why():
    assert PEERS["pytorch"].formats == ALL_FORMATS
    assert {name for name, peer in PEERS.items() if "int8" in peer.formats} == {"pytorch", "onnxruntime"}
    assert {name for name, peer in PEERS.items() if "bfloat16" in peer.formats} == {"pytorch", "openvino"}
    assert all(peer.lacking for peer in PEERS.values() if peer.formats != ALL_FORMATS)


def test_each_format_is_timed_where_the_peer_has_it(workers):
    config, row = compared("rounding", "right")
    assert not row.wrong
    assert set(row.timings) == {FUSED, BF16, INT8, "rounding", "rounding bfloat16", "right"}
    assert row.failures == {
        "rounding int8": "has no int8",
        "right bfloat16": "is compared in float32 alone",
        "right int8": "is compared in float32 alone",
    }
    assert row.best_peer_of(BF16) == "rounding bfloat16" and row.best_peer_of(INT8) is None
    assert row.best_peer in ("rounding", "right")
    assert row.over_best_peer(BF16) == row.ratio("rounding bfloat16", BF16)
    [figures] = comparison_report(config, [row])["rows"]
    assert list(figures["over_best_peer"]) == [FUSED, BF16, INT8] and figures["over_best_peer"][INT8] is None
    assert figures["formats"]["rounding bfloat16"] == "bfloat16"


def test_int8_is_left_out_of_training(workers):
    _, row = compared("right", phase="training")
    assert set(row.timings) == {FUSED, BF16} and row.failures[INT8] == "int8 is a format of inference"


def test_results_of_a_format_are_checked_with_its_tolerance(workers):
    """What is right in bfloat16 is wrong in float32."""
    source = process.WORKERS / "with_rounding.py"
    source.write_text(source.read_text().replace('work.compute != "bfloat16"', "False"))
    _, row = compared("rounding", formats=("float32", "bfloat16"))
    assert row.failures["rounding"].startswith("wrong: ") and "rounding bfloat16" in row.timings


def test_table_and_summary():
    seconds = {FUSED: 0.02, "a": 0.04, BF16: 0.01, "a bfloat16": 0.005, "b bfloat16": 0.03, INT8: 0.004}
    formats = {**{IN_FORMAT[name]: name for name in ALL_FORMATS}, "a": "float32"}
    formats |= dict.fromkeys(("a bfloat16", "b bfloat16"), "bfloat16")
    row = ComparedRow(
        SMALL, "lstm", "inference", "float32", 2, 10**9, 100.0, {n: Timing((s,)) for n, s in seconds.items()},
        formats=formats, peaks={"bfloat16": 200.0, "int8": 400.0}, peers=("a", "a bfloat16", "b bfloat16"),
    )  # fmt: skip
    cells = list(zip(*(column.cells for column in formats_table([row]).columns), strict=True))
    assert [line[1:] for line in cells] == [
        (FUSED, "20.0 ms", "50.0", "50.0%", "", ""),
        ("[bold]a[/]", "[bold]40.0 ms[/]", "25.0", "25.0%", "", "2.00"),
        (BF16, "10.0 ms", "100.0", "50.0%", "2.00", ""),
        ("[bold]a bfloat16[/]", "[bold]5.00 ms[/]", "200.0", "100.0%", "", "0.50"),
        ("b bfloat16", "30.0 ms", "33.3", "16.7%", "", "3.00"),
        (INT8, "4.00 ms", "250.0", "62.5%", "5.00", ""),
    ]
    assert summary(row) == (
        "small-test lstm inference: fused 20.0 ms, 2.00 times as fast as a; 50.0% of the FMA peak; "
        "fused bfloat16 10.0 ms, 0.50 times as fast as a bfloat16; 50.0% of the peak of bfloat16; "
        "fused int8 4.00 ms; 62.5% of the peak of int8"
    )


@pytest.mark.parametrize("formats", ["float32,bfloat16", "bfloat16"])
def test_command_line(workers, monkeypatch, tmp_path, formats):
    monkeypatch.setattr("benchmarks.compare.__main__.PEERS", workers)
    monkeypatch.setattr("benchmarks.compare.__main__.measure_bandwidth", lambda threads: {})
    options = "--peers rounding --cases tiny --modes rnn_tanh --phases inference --seconds 0 --threads 1"
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(app, [*options.split(), "--compute", formats, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "Formats of GEMM operands" in result.output and "rounding bfloat16" in result.output
    figures = json.loads(path.read_text())
    assert figures["plan"]["contenders"][-1] == "rounding bfloat16"
    assert figures["rows"][0]["over_best_peer"][BF16] > 0
