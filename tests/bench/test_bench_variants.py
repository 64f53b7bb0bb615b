"""``fusedrnn bench --variants``: every variant is checked and timed; other comparisons are rejected."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fusedrnn import RNNSpec
from fusedrnn.bench import variants
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.cli.app import app
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES, Case

CASE = Case("mini", 3, 2, 5, 8)


def rows_by_variant(mode, phase):
    stages = []
    config = BenchConfig([CASE], [mode], [PHASES[phase]], budget=0.0)
    (rows,) = variants.run(config, stages.append)
    assert len(stages) == 1
    return {row.name: row for row in rows}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(variants, "PAUSE", 0.0)


@pytest.mark.parametrize(("mode", "phase"), [*((mode, "inference") for mode in MODES), ("gru", "training")])
def test_every_variant_is_right_and_timed(mode, phase):
    rows = rows_by_variant(mode, phase)
    names = [variants.PLAIN, *variants.VARIANTS[mode]]
    assert list(rows)[: len(names)] == names
    assert (variants.IN_TORCH_NN in rows) == (mode == "lstm")
    for row in rows.values():
        assert row.wrong is None
        assert row.timing is not None
        assert row.gflops == pytest.approx(row.flops / row.timing.median * 1e-9)
        assert 0 < row.share <= 1


def test_work_is_that_of_the_variant():
    """A projection has its own product, coupled gates have three quarters of the gates."""
    rows, spec = rows_by_variant("lstm", "inference"), RNNSpec("lstm", 5, 8)
    assert rows[variants.PLAIN].flops == 2 * 3 * 2 * 4 * 8 * (5 + 8) == spec.flops(3, 2)
    assert rows[variants.PROJECTION].flops == 2 * 3 * 2 * (4 * 8 * (5 + 4) + 4 * 8)
    assert rows["coupled gates"].flops == rows[variants.PLAIN].flops * 3 // 4


def test_a_wrong_one_has_no_figure(monkeypatch):
    plain = PHASES["inference"].makers["fused"]

    def maker(work):
        contender = plain(work)

        def run(batch):
            computed = contender(batch)
            wrong = work.spec.peepholes

            def results():
                rows = computed()
                return rows | {"y": rows["y"] + np.float32(1)} if wrong else rows

            return results

        return run

    monkeypatch.setitem(PHASES["inference"].makers, "fused", maker)
    rows = rows_by_variant("lstm", "inference")
    assert "y" in rows["peepholes"].wrong
    assert rows["peepholes"].timing is None
    assert rows["peepholes"].share is None
    assert rows[variants.PROJECTION].wrong is None


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(CASES, "mini", CASE)
    path = tmp_path / "figures.json"
    options = ["--variants", "--cases", "mini", "--modes", "gru", "--seconds", "0", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", *options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "reset before" in result.output
    assert "of plain" in result.output
    figures = json.loads(path.read_text())
    assert {line["variant"] for line in figures["lines"]} == {variants.PLAIN, *variants.VARIANTS["gru"]}
    assert all(line["seconds"] for line in figures["lines"])


@pytest.mark.parametrize("other", [["--backends", "cpu"], ["--torch"], ["--only-torch"], ["--packed"]])
def test_what_it_does_not_go_with(other):
    result = CliRunner().invoke(app, ["bench", "--variants", "--cases", "tiny", *other])
    assert result.exit_code == 2
    assert "--variants cannot be used with" in result.output
