"""The page: self-contained, a line for every row, everything escaped, the JSON inside."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from typer.testing import CliRunner

from benchmarks.figures.bars import case_figure
from benchmarks.figures.style import inline_svg
from benchmarks.page import app, render
from drawn_rows import BANDWIDTH, benchmark_of, many_rows, measured
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_FORMAT, IN_TORCH, NON_FUSED
from fusedrnn.bench.report import least_bytes
from fusedrnn.bench.rows import Row
from fusedrnn.bench.tables import duration
from fusedrnn.bench.timing import Timing
from fusedrnn.testing.cases import CASES

WRONG = Row(CASES["tiny"], "gru", "inference", "float32", 2, 5, wrong="fused: y[0] is 1")


def make_page(rows: list[Row]) -> str:
    return render(benchmark_of(rows))


class Elements(HTMLParser):
    """Asserts that every element is closed; collects ids, references, and the text of table cells."""

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


def test_the_page_is_self_contained():
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
    assert text.count("<svg") == 3 and "<h2>Method</h2>" in text
    assert "time series" not in text and "recurrent policy" in text


def test_percentiles_are_shown_where_a_timing_has_them():
    row = measured(CASES["tiny"], "lstm", {NON_FUSED: 10.0, FUSED: 30.0})
    timings = {NON_FUSED: row.timings[NON_FUSED], FUSED: Timing((0.002,), p50=0.002, p99=0.0031)}
    _, [_, non_fused, fused, *_] = Elements(make_page([replace(row, timings=timings)])).rows
    assert "p50 2.00 ms" in fused and "p99 3.10 ms" in fused and "p" not in non_fused


def test_the_page_says_why_a_contender_has_no_time():
    row = measured(CASES["tiny"], "gru", {FUSED: 30.0}, "training", failures={"openvino": "cannot <train>"})
    text = make_page([row, replace(row, failures={}, versions={"jax": {"jax": "1.2", "jaxlib": "1.3"}})])
    assert "<li>openvino, tiny GRU training: cannot &lt;train&gt;</li>" in text and "Without a time: 1" in text
    assert "<dt>versions of jax</dt><dd>jax 1.2, jaxlib 1.3</dd>" in text
    assert "Without a time" not in make_page([measured(CASES["tiny"], "gru", {FUSED: 30.0})])


def test_the_page_says_what_is_extrapolated_and_what_has_no_share():
    row = measured(CASES["ds2"], "gru", {NON_FUSED: 30.0, FUSED: 230.0}, steps_run={NON_FUSED: 15})
    timings = row.timings | {NON_FUSED: Timing((1.0, 1.1, 0.9))}
    text = make_page([replace(row, timings=timings)])
    head, line = Elements(text).rows
    cells = dict(zip(head, line, strict=True))
    assert "15 of 300 steps" in cells[NON_FUSED] and "\u00b110 %" in cells[NON_FUSED]
    assert cells["fused, GFLOP/s"] == "230.0" and cells["fused, of peak"] == ""
    assert "Without a share of the peak: 1" in text and "<li>fused, ds2 GRU inference: no share" in text
    assert "Without a share" not in make_page([measured(CASES["tiny"], "gru", {FUSED: 30.0})])


def test_everything_on_the_page_is_escaped():
    evil = "</script><script>alert(1)</script>"
    case = replace(CASES["tiny"], name="<b>&tiny", who="<i>")
    rows = [measured(case, "lstm", {"<u>": 10.0, FUSED: 20.0}), replace(WRONG, case=case, wrong=evil)]
    text = make_page(rows)
    elements = Elements(text)
    assert "alert(1)</script>" not in text and not {"<b>", "<i>", "<u>"} & set(re.findall(r"<\w>", text))
    assert elements.rows[0][1] == "<u>" and elements.rows[2][1] == f"wrong: {evil}"


def test_the_json_can_be_read_back_from_the_page():
    rows = many_rows(["tiny"], ("gru",))
    [text] = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', make_page(rows), re.DOTALL)
    figures = json.loads(text)
    assert figures["bandwidth"] == BANDWIDTH and [row["phase"] for row in figures["rows"]] == list(PHASES)
    assert [row["least_bytes"] for row in figures["rows"]] == [least_bytes(row) for row in rows]


def test_a_page_of_wrong_rows_alone():
    text = make_page([WRONG])
    assert "wrong: fused: y[0] is 1" in text and Elements(text)


def test_a_figure_takes_the_colours_of_its_page():
    svg = inline_svg(case_figure(benchmark_of(many_rows(["tiny"], ("lstm",))).records), "a", "bars")
    assert "currentColor" in svg and "#010203" not in svg and "#fdfeff" not in svg
    assert svg.startswith('<svg role="img" aria-label="bars"') and svg.endswith("</svg>")


def test_the_command(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(benchmark_of(many_rows(["tiny"], ("gru",))).data))
    result = CliRunner().invoke(app, [str(tmp_path / "rows.json"), str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "tiny GRU inference" in (tmp_path / "page.html").read_text(encoding="utf-8")
    result = CliRunner().invoke(app, [str(tmp_path / "rows.json"), str(tmp_path)])
    assert result.exit_code == 2 and "it is a folder" in result.output


def test_formats_have_the_share_of_their_peak_the_ratio_to_float32_and_their_own_best_other():
    formats = {**{name: number_format for number_format, name in IN_FORMAT.items()}, "jax": "float32"}
    formats |= {"openvino bfloat16": "bfloat16", "onnxruntime int8": "int8"}
    speeds = {FUSED: 100.0, IN_FORMAT["bfloat16"]: 150.0, IN_FORMAT["int8"]: 300.0}
    others = {"jax": 50.0, "openvino bfloat16": 300.0, "onnxruntime int8": 200.0}
    row = measured(CASES["tiny"], "lstm", speeds | others, formats=formats, peaks={"bfloat16": 300.0, "int8": 400.0})
    page = make_page([row, measured(CASES["tiny"], "gru", {FUSED: 100.0})])
    headings, line, plain = Elements(page).rows
    cells = dict(zip(headings, line, strict=True))
    shares = [cells[f"{name}, of peak"] for name in speeds]
    assert shares == ["50.0 %", "50.0 %", "75.0 %"]
    ratios = [cells[f"{name} over float32"] for name in speeds if name != FUSED]
    assert ratios == ["1.50\u00d7", "3.00\u00d7"] and "fused over float32" not in cells
    assert [cells[f"{name} over it"] for name in speeds] == ["2.00\u00d7", "0.50\u00d7", "1.50\u00d7"]
    assert plain[-2:] == ["", ""]
    assert "float32 200 GFLOP/s, bfloat16 300 GFLOP/s, int8 400 GFLOP/s" in page
