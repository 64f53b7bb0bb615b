"""Tables in the form that MXNet published, and the report as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from bench_rows import SMALL, measured, small_config
from fusedrnn.bench import runner, tables
from fusedrnn.bench.contenders import FUSED, NON_FUSED, PHASES, TORCH
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import Row
from fusedrnn.bench.tables import MODE_NAMES, percent, published_percent
from fusedrnn.testing.cases import CASES


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
        replace(measured(CASES[name], mode, seconds, phase), steps_run={NON_FUSED: 150})
        for name in ("ds2", "ds2-5bi")
        for mode in MODE_NAMES
        for phase in PHASES
    ]
    for table in tables.tables(rows, (NON_FUSED, FUSED)):
        assert Console(width=200).measure(table).maximum <= 80


def test_training_is_below_inference():
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


def test_other_sizes_have_no_published_ratio():
    row = measured(CASES["ds2"], "lstm", {})
    assert published_percent(row) == 210.98
    assert published_percent(replace(row, case=CASES["ds2"].at(3, 4, 5))) is None
    assert published_percent(replace(row, case=CASES["tiny"])) is None
    assert published_percent(replace(row, dtype="float64")) is None


def test_a_report_can_be_read_back_from_json(known_peak, monkeypatch):
    config = small_config(("lstm", "gru"))
    rows = [*runner.run(config), Row(SMALL, "gru", "inference", "float32", 1, 5, wrong="fused: y[0] is 1")]
    figures = report(config, rows)
    again = json.loads(json.dumps(figures))
    assert again == figures
    assert [row["mode"] for row in again["rows"]] == ["lstm", "gru", "gru"]
    first, wrong = again["rows"][0], again["rows"][2]
    assert first["case"]["H"] == SMALL.H and first["seconds"][FUSED]["median"] > 0
    assert wrong["wrong"] and not wrong["seconds"] and wrong["share_of_peak"] is None
    assert {"processor", "target", "vector_bits", "threads", "versions"} <= set(again["machine"])


def test_large_percentages_have_no_decimals():
    assert [percent(ratio) for ratio in (2.8767, 99.99, 805.9487, None)] == ["287.67%", "9999.00%", "80,595%", ""]
