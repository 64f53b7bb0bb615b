"""A benchmark's pictures and its page: what stands on them, that nothing covers anything, that nothing is fetched."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.colors
import pytest
from fusedrnn.bench.results import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.html import duration, page
from fusedrnn.bench.plots import bars, labels
from fusedrnn.bench.plots.colours import colours, drawing_order
from fusedrnn.bench.plots.labels import Label
from fusedrnn.bench.plots.svg import markup
from fusedrnn.bench.ranking import OURS, best_other, over_best
from fusedrnn.bench.traffic import intensity, least_bytes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from fusedrnn.bench import bandwidth, plots
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import Timing
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES, Case

BANDWIDTH = {"L2": 200.0, "L3": 150.0, "memory": 30.0}
PEERS = (NON_FUSED, TORCH, "pytorch", "onnxruntime", "openvino", "jax", "keras", "mxnet-fused", "mxnet-cells")


def measured(case: Case, mode: str, gflops: dict[str, float], phase: str = "inference", **facts) -> Row:
    flops = case.spec(mode).flops(case.T, case.N, training=PHASES[phase].training)
    timings = {who: Timing((flops / (1e9 * speed),)) for who, speed in gflops.items()}
    return Row(case, mode, phase, "float32", 2, flops, timings=timings, **{"peak": 200.0, **facts})


def many_rows(cases, modes=MODES, others=(NON_FUSED, "openvino")) -> list[Row]:
    """Rows in which those of a case come close to each other."""
    turns = itertools.product(cases, modes, PHASES)
    return [
        measured(CASES[case], mode, {**dict.fromkeys(others, 60.0), FUSED: 150.0 + turn % 3, IN_TORCH: 140.0}, phase)
        for turn, (case, mode, phase) in enumerate(turns)
    ]


def make_page(rows: list[Row]) -> str:
    cases = list(dict.fromkeys(row.case for row in rows))
    plan = BenchConfig(cases, list(dict.fromkeys(row.mode for row in rows)), list(PHASES.values()), threads=2)
    return page(report(plan, rows, BANDWIDTH), rows)


# Who is ours


def test_ours_are_compared_with_the_best_of_the_others():
    row = measured(CASES["tiny"], "lstm", {NON_FUSED: 10.0, "v1.2": 50.0, "jax": 40.0, FUSED: 100.0, IN_TORCH: 25.0})
    assert best_other(row) == "v1.2"
    assert over_best(row, FUSED) == pytest.approx(2.0) and over_best(row, IN_TORCH) == pytest.approx(0.5)
    assert over_best(row, UNPACKED) is None and over_best(row, "jax") is None
    assert best_other(replace(row, revisions=("v1.2",))) == "jax"
    only = measured(CASES["tiny"], "lstm", {"v1.2": 50.0, FUSED: 100.0}, revisions=("v1.2",))
    assert over_best(only, FUSED) == pytest.approx(2.0)
    alone = measured(CASES["tiny"], "lstm", {FUSED: 100.0})
    assert best_other(alone) is None and over_best(alone, FUSED) is None


def test_everyone_has_a_colour_and_ours_come_last():
    strangers = [f"revision{turn}" for turn in range(9)]
    everyone = [FUSED, *strangers, *PEERS, IN_TORCH, UNPACKED]
    order = drawing_order(everyone)
    assert sorted(order) == sorted(everyone) and tuple(order[-3:]) == OURS
    palette = colours(everyone)
    assert list(palette) == order and all(matplotlib.colors.is_color_like(colour) for colour in palette.values())
    assert colours([FUSED, "jax"])["jax"] == palette["jax"]
    others = {palette[who] for who in order if who not in OURS}
    assert not others & {palette[who] for who in OURS}


# The roofline's axis


def test_the_least_traffic_of_a_small_network_counted_by_hand():
    case = Case("t", T=5, N=3, I=7, H=11)
    row = measured(case, "rnn_tanh", {FUSED: 1.0})
    recurrent, rest = 11 * 11, 11 * 7 + 2 * 11
    data = 5 * 3 * (7 + 11) + 2 * 3 * 11  # inputs, outputs, states before and after
    assert least_bytes(row) == 4 * (5 * recurrent + rest + data)
    training = measured(case, "rnn_tanh", {FUSED: 1.0}, "training")
    assert least_bytes(training) == 2 * least_bytes(row) + 4 * (recurrent + rest + data)
    assert least_bytes(replace(row, dtype="float64")) == 2 * least_bytes(row)
    assert intensity(row) == row.flops / least_bytes(row)


def test_a_packed_batch_moves_only_the_steps_that_count():
    case = Case("t", T=5, N=3, I=7, H=11)
    row = measured(case, "lstm", {FUSED: 1.0})
    assert least_bytes(replace(row, lengths=(5, 5, 5))) == least_bytes(row)
    shorter = replace(row, lengths=(4, 2, 1))
    assert least_bytes(row) - least_bytes(shorter) == 4 * ((15 - 7) * (7 + 11) + 4 * 11 * 11)


def test_more_sequences_share_the_weights():
    one, many = (measured(replace(CASES["seq1"], N=N), "lstm", {FUSED: 1.0}) for N in (1, 64))
    assert intensity(one) < 2 and intensity(many) > 30


# Bandwidth


def test_bandwidth_is_read_from_arrays_that_lie_where_they_should():
    caches = {"L1d": 1 << 15, "L2": 1 << 20, "L3": 1 << 25}
    sizes = bandwidth.sizes(2, caches)
    assert list(sizes) == ["L2", "L3", "memory"]
    assert sizes["L2"] < caches["L2"] < sizes["L3"] and 2 * sizes["L3"] < caches["L3"] < sizes["memory"]
    assert list(bandwidth.sizes(64, caches)) == ["L2", "memory"]
    assert list(bandwidth.sizes(1, {})) == ["memory"]


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_measured(monkeypatch, threads):
    monkeypatch.setattr(bandwidth, "_READ", 1 << 20)
    monkeypatch.setattr(bandwidth, "_MEMORY_OF_A_THREAD", 1 << 16)
    monkeypatch.setattr(bandwidth, "cache_sizes", lambda: {"L2": 1 << 16})
    found = bandwidth.measure_bandwidth(threads)
    assert set(found) == {"L2", "memory"} and all(speed > 0 for speed in found.values())


# Pictures


def test_every_case_has_its_bars_and_all_share_a_roofline(tmp_path):
    rows = many_rows(["tiny", "small", "bi2"], ("lstm", "gru"))
    plots.plot(rows, tmp_path / "rows.svg", BANDWIDTH)
    drawn = (tmp_path / "rows.svg").read_text()
    for case in ("tiny", "small", "bi2"):
        assert drawn.count(f"<!-- {case}: T, N, I, H = ") == 1
        assert drawn.count(f"<!-- {case} GRU training -->") == 1
    assert drawn.count("<!-- Roofline: ours in every case -->") == 1
    assert drawn.count("<!-- GFLOP/s -->") == 3 and "<!-- memory: 30 GB/s -->" in drawn
    assert "recurrent weights at every step" in drawn and "<!-- FMA peak 200 GFLOP/s  -->" in drawn
    assert drawn.count("<!-- openvino -->") == 1 and "2.5" in "".join(re.findall(r"<!-- (\S+)\u00d7 -->", drawn))


@pytest.mark.parametrize("peak", [None, 200.0, 5000.0])
def test_bars_are_useful_work_and_the_peak_stays_in_sight(peak):
    row = measured(CASES["tiny"], "lstm", {"jax": 50.0, FUSED: 100.0}, peak=peak)
    axes = Figure().add_subplot()
    bars.draw(axes, [row], 6.0)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50.0, 100.0])
    assert len(axes.lines) == (peak == 200.0)
    assert any("above the picture" in text.get_text() for text in axes.texts) == (peak == 5000.0)
    assert axes.get_ylim()[1] < (300 if peak == 200.0 else 130)


def test_a_contender_may_be_missing_from_a_row():
    rows = [
        measured(CASES["tiny"], "lstm", {"openvino": 20.0, "v1": 10.0, FUSED: 30.0}),
        measured(CASES["tiny"], "lstm", {"v1": 10.0, FUSED: 30.0}, "training"),
        measured(CASES["tiny"], "gru", {FUSED: 30.0}),
        Row(CASES["tiny"], "gru", "training", "float32", 2, 5, wrong="fused: y[0] is 1"),
    ]
    axes = Figure().add_subplot()
    bars.draw(axes, rows, 8.0)
    assert len(axes.patches) == 6
    said = [text.get_text().strip() for text in axes.texts]
    assert said.count("wrong") == 1 and said.count("3.00\u00d7") == 1 and said.count("1.50\u00d7") == 1
    edges = [tick.get_text() for tick in axes.get_xticklabels()]
    assert edges == ["LSTM\ninference", "LSTM\ntraining", "GRU\ninference", "GRU\ntraining"]


def words(text: Annotation, renderer) -> Bbox:
    """Where a name stands, without the line to its point."""
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


@pytest.mark.parametrize("cases", [["ds2"], list(CASES)])
def test_no_name_on_the_roofline_covers_another(cases):
    rows = many_rows(cases)
    figure = plots.roofline_figure(rows, BANDWIDTH)
    [axes] = figure.axes
    figure.draw_without_rendering()
    renderer = labels._renderer(figure)
    texts = [text for text in axes.texts if isinstance(text, Annotation) and "GB/s" not in text.get_text()]
    assert len(texts) == len(rows)
    boxes = [words(text, renderer) for text in texts]
    for (one, box), (other, next_box) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(next_box), (one.get_text(), other.get_text())
    room = axes.get_window_extent(renderer)
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1 for box in boxes)


def test_labels_of_one_point_all_find_room():
    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot()
    figure.draw_without_rendering()
    labels.place(figure, axes, [Label(f"name {turn}", 0.5, 0.5) for turn in range(12)], 8.0)
    renderer = labels._renderer(figure)
    boxes = [words(text, renderer) for text in axes.texts]
    assert len(boxes) == 12 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_points_without_bandwidth_or_peak_are_drawn(tmp_path):
    rows = [measured(CASES["tiny"], "lstm", {FUSED: 30.0}, peak=None)]
    plots.plot(rows, tmp_path / "rows.svg")
    assert "<!-- tiny LSTM inference -->" in (tmp_path / "rows.svg").read_text()


# The page


class Elements(HTMLParser):
    """Checks that every element ends, and collects ids, references, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_needs_nothing_else():
    text = make_page(many_rows(["tiny", "small"]))
    elements = Elements(text)
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.references and all(reference.startswith("#") for reference in elements.references)
    assert {reference[1:] for reference in elements.references} <= set(elements.ids)
    assert {name for name in re.findall(r"url\(#([^)]*)\)", text)} <= set(elements.ids)
    assert not re.search(r"https?:|file:|@import|url\((?!#)|<link|<img|<iframe", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_the_page_has_a_line_for_every_row_and_a_picture_for_every_case():
    rows = many_rows(["tiny", "small"], ("lstm",))
    rows[0] = measured(CASES["tiny"], "lstm", {NON_FUSED: 10.0, FUSED: 30.0})
    text = make_page(rows)
    head, *lines = Elements(text).rows
    assert head[1:5] == [NON_FUSED, "openvino", FUSED, IN_TORCH] and len(lines) == len(rows)
    assert all(len(line) == len(head) for line in lines)
    first, second = (dict(zip(head, line, strict=True)) for line in lines[:2])
    assert first[""] == "tiny LSTM inference" and first["openvino"] == first[IN_TORCH] == ""
    assert first["best other"] == NON_FUSED and first["fused over it"] == "3.00\u00d7"
    assert first["fused, GFLOP/s"] == "30.0" and first["fused, of peak"] == "15.0 %"
    assert second["openvino"] == duration(rows[1].timings["openvino"].median)
    assert text.count("<svg") == 3 and "How it was measured" in text
    assert "time series" not in text and "recurrent policy" in text


def test_percentiles_are_shown_where_a_timing_has_them():
    row = measured(CASES["tiny"], "lstm", {NON_FUSED: 10.0, FUSED: 30.0})
    timings = {NON_FUSED: row.timings[NON_FUSED], FUSED: Timing((0.002,), p50=0.002, p99=0.0031)}
    _, [_, theirs, ours, *_] = Elements(make_page([replace(row, timings=timings)])).rows
    assert "p50 2.00 ms" in ours and "p99 3.10 ms" in ours and "p" not in theirs


def test_the_page_says_who_has_no_time_and_why():
    row = measured(CASES["tiny"], "gru", {FUSED: 30.0}, "training", failures={"openvino": "cannot <train>"})
    text = make_page([row, replace(row, failures={}, versions={"jax": {"jax": "1.2", "jaxlib": "1.3"}})])
    assert "<li>openvino, tiny gru training: cannot &lt;train&gt;</li>" in text and "Without a time: 1" in text
    assert "<dt>versions of jax</dt><dd>jax 1.2, jaxlib 1.3</dd>" in text
    assert "Without a time" not in make_page([measured(CASES["tiny"], "gru", {FUSED: 30.0})])


def test_the_page_says_what_was_measured_on_a_part_and_what_has_no_share():
    row = measured(CASES["ds2"], "gru", {NON_FUSED: 30.0, FUSED: 230.0}, steps_run={NON_FUSED: 15})
    timings = row.timings | {NON_FUSED: Timing((1.0, 1.1, 0.9))}
    text = make_page([replace(row, timings=timings)])
    head, line = Elements(text).rows
    cells = dict(zip(head, line, strict=True))
    assert "15 of 300 steps" in cells[NON_FUSED] and "\u00b110 %" in cells[NON_FUSED]
    assert cells["fused, GFLOP/s"] == "230.0" and cells["fused, of peak"] == ""
    assert "Without a share of the peak: 1" in text and "<li>fused, ds2 gru inference: no share" in text
    assert "Without a share" not in make_page([measured(CASES["tiny"], "gru", {FUSED: 30.0})])


def test_what_stands_on_the_page_is_escaped():
    evil = "</script><script>alert(1)</script>"
    case = replace(CASES["tiny"], name="<b>&tiny", who="<i>")
    rows = [
        measured(case, "lstm", {"<u>": 10.0, FUSED: 20.0}),
        Row(case, "gru", "inference", "float32", 2, 5, wrong=evil),
    ]
    text = make_page(rows)
    elements = Elements(text)
    assert "alert(1)</script>" not in text and not {"<b>", "<i>", "<u>"} & set(re.findall(r"<\w>", text))
    assert elements.rows[0][1] == "<u>" and elements.rows[2][1] == f"wrong: {evil}"


def test_the_figures_can_be_read_back_from_the_page():
    rows = many_rows(["tiny"], ("gru",))
    text = make_page(rows)
    [embedded] = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    figures = json.loads(embedded)
    assert figures["bandwidth"] == BANDWIDTH and [row["phase"] for row in figures["rows"]] == list(PHASES)
    assert [row["least_bytes"] for row in figures["rows"]] == [least_bytes(row) for row in rows]


def test_a_page_of_nothing_but_wrong_rows():
    text = make_page([Row(CASES["tiny"], "gru", "inference", "float32", 2, 5, wrong="fused: y[0] is 1")])
    assert "wrong: fused: y[0] is 1" in text and Elements(text)


def test_a_drawing_takes_the_colours_of_its_page():
    drawn = markup(plots.case_figure(many_rows(["tiny"], ("lstm",))), "a", "bars")
    assert "currentColor" in drawn and "#010203" not in drawn and "#fdfeff" not in drawn
    assert drawn.startswith('<svg role="img" aria-label="bars"') and drawn.endswith("</svg>")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1234.5, "1234 s"),
        (12.34, "12.3 s"),
        (1.0, "1.00 s"),
        (0.5, "500 ms"),
        (0.0321, "32.1 ms"),
        (1.23e-4, "123 µs"),
        (4.26e-6, "4.26 µs"),
    ],
)
def test_durations_have_three_digits(seconds, said):
    assert duration(seconds) == said
