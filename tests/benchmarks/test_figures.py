"""Figures: what is written on them, that no label covers another, that dark pages can be read too."""

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typer.testing import CliRunner

from benchmarks.figures import bars
from benchmarks.figures.__main__ import app
from benchmarks.figures.roofline import roofline_figure
from benchmarks.figures.speedup import speedup_figure
from benchmarks.figures.style import DARK_INK, INK, colours, drawing_order, save
from drawn_rows import BANDWIDTH, benchmark_of, many_rows, measured
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, OURS, TORCH, UNPACKED
from fusedrnn.bench.rows import Row
from fusedrnn.testing.cases import CASES

ROOT = Path(__file__).resolve().parents[2]
PEERS = (NON_FUSED, TORCH, "pytorch", "onnxruntime", "openvino", "jax", "keras", "mxnet-fused", "mxnet-cells")


def texts_of(figure):
    return [text.get_text().strip() for axes in figure.axes for text in axes.texts]


# Colours


def test_every_contender_has_a_colour_and_ours_are_last():
    unknown = [f"revision{index}" for index in range(9)]
    everyone = [FUSED, *unknown, *PEERS, *OURS[1:]]
    order = drawing_order(everyone)
    assert sorted(order) == sorted(everyone) and tuple(order[-len(OURS) :]) == OURS
    palette = colours(everyone)
    assert list(palette) == order and all(matplotlib.colors.is_color_like(colour) for colour in palette.values())
    assert colours([FUSED, "jax"])["jax"] == palette["jax"]
    assert not {palette[name] for name in order if name not in OURS} & {palette[name] for name in OURS}


def test_an_svg_has_colours_for_dark_pages(tmp_path):
    figure = roofline_figure(benchmark_of(many_rows(["tiny"])).records, BANDWIDTH)
    save(figure, tmp_path / "roofline.svg")
    text = (tmp_path / "roofline.svg").read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text and DARK_INK in text and f"fill: {INK}" in text
    assert "<text" in text, "text stays text"
    assert "fill: #ffffff" not in text, "the background of the axes is replaced too"
    save(figure, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


# Bars


@pytest.mark.parametrize("peak", [None, 200.0, 5000.0])
def test_bars_are_useful_work_and_the_peak_is_visible(peak):
    row = measured(CASES["tiny"], "lstm", {"jax": 50.0, FUSED: 100.0}, peak=peak)
    axes = Figure().add_subplot()
    bars.draw(axes, benchmark_of([row]).records, 6.0)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50.0, 100.0])
    assert len(axes.lines) == (peak == 200.0)
    assert any("above the axes" in text.get_text() for text in axes.texts) == (peak == 5000.0)
    assert axes.get_ylim()[1] < (300 if peak == 200.0 else 130)


def test_a_contender_may_be_missing_from_a_row():
    rows = [
        measured(CASES["tiny"], "lstm", {"openvino": 20.0, "v1": 10.0, FUSED: 30.0}),
        measured(CASES["tiny"], "lstm", {"v1": 10.0, FUSED: 30.0}, "training"),
        measured(CASES["tiny"], "gru", {FUSED: 30.0}),
        Row(CASES["tiny"], "gru", "training", "float32", 2, 5, wrong="fused: y[0] is 1"),
    ]
    axes = Figure().add_subplot()
    bars.draw(axes, benchmark_of(rows).records, 8.0)
    assert len(axes.patches) == 6
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts.count("wrong") == 1 and texts.count("3.00\u00d7") == 1 and texts.count("1.50\u00d7") == 1
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["LSTM\ninference", "LSTM\ntraining", "GRU\ninference", "GRU\ntraining"]


def test_packed_modules_are_drawn():
    row = measured(CASES["tiny"], "gru", {TORCH: 20.0, IN_TORCH: 40.0, UNPACKED: 40.0}, lengths=(20,) * 16)
    figure = bars.case_figure(benchmark_of([row]).records)
    assert texts_of(figure).count("2.00\u00d7") == 1
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["GRU\ninference packed"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "fused in torch, unpacked" in legend and NON_FUSED not in legend


# Roofline


@pytest.mark.parametrize("cases", [["ds2"], list(CASES)], ids=len)
def test_no_label_on_the_roofline_covers_another(cases):
    figure = roofline_figure(benchmark_of(many_rows(cases)).records, BANDWIDTH)
    [axes] = figure.axes
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [text for text in axes.texts if text.get_text() in cases]
    assert [label.get_text() for label in labels] == cases
    boxes = {label.get_text(): label.get_window_extent(renderer) for label in labels}
    for (name, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other_box), (name, other)
    texts = texts_of(figure)
    assert "FMA peak 200 GFLOP/s" in texts and "memory: 30 GB/s" in texts


def test_points_without_bandwidth_or_peak_are_drawn():
    rows = [measured(CASES["tiny"], "lstm", {FUSED: 30.0}, peak=None)]
    assert texts_of(roofline_figure(benchmark_of(rows).records, {})) == ["tiny"]
    wrong = Row(CASES["tiny"], "gru", "inference", "float32", 1, 5, wrong="fused: y[0] is 1")
    assert texts_of(roofline_figure(benchmark_of([wrong]).records, {})) == []


# Summary


def test_the_summary_shows_every_case_and_the_mean():
    rows = [
        measured(CASES[case], mode, {"jax": 25.0, "mxnet-fused": 10.0, "mxnet-cells": 5.0, FUSED: 25.0 * factor}, phase)
        for case in ("tiny", "seq1")
        for phase in ("inference", "training")
        for mode, factor in (("lstm", 2.0), ("gru", 8.0))
    ]
    figure = speedup_figure(benchmark_of(rows).records, "a machine")
    assert len(figure.axes) == 2 and texts_of(figure) == ["4.00"] * 4
    assert figure.get_suptitle().strip() == "Times as fast as the best of two libraries"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["tiny: 20 steps of 16, 32 units", "seq1: 100 steps of 1, 256 units"]
    with pytest.raises(ValueError, match="another library"):
        speedup_figure(benchmark_of([measured(CASES["tiny"], "lstm", {FUSED: 1.0})]).records)


# The command


def test_the_command_draws_the_committed_baseline(tmp_path):
    """Two of its cases: all take several times as long to draw."""
    baseline = json.loads((ROOT / "benchmarks" / "baseline.json").read_text())
    baseline["rows"] = [row for row in baseline["rows"] if row["case"]["name"] in ("ds2", "stream1")]
    (tmp_path / "rows.json").write_text(json.dumps(baseline))
    folder = tmp_path / "figures"
    folder.mkdir()
    result = CliRunner().invoke(app, [str(tmp_path / "rows.json"), str(folder)])
    assert result.exit_code == 0, result.output
    names = {path.name for path in folder.iterdir()}
    assert names == {"speedup.svg", "roofline.svg", "case-ds2.svg", "case-stream1.svg"}
    assert len(re.findall(r"\.svg", result.output)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "."], "nowhere.json cannot be read"),
        ([str(ROOT / "benchmarks" / "baseline.json"), "nowhere"], "nowhere is not a folder"),
        ([str(ROOT / "benchmarks" / "baseline.json"), ".", "--format", "doc"], "unknown format 'doc'; valid: "),
    ],
)
def test_invalid_arguments(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and f"error: {message}" in result.output
