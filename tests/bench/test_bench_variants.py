"""``fusedrnn bench --variants``: every variant is checked and timed; other comparisons are rejected."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fusedrnn import RNNSpec
from fusedrnn.bench import runner, variants
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.rows import BenchConfig
from fusedrnn.cli.app import app
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES, Case

CASE = Case("mini", 3, 2, 5, 8)


def measured_row(mode, phase):
    config = BenchConfig([CASE], [mode], [PHASES[phase]], budget=0.0, pause=0.0, variants=True)
    stages = []
    [row] = runner.run(config, stages.append)
    assert len(stages) == 1 and row.wrong is None
    return row


@pytest.mark.parametrize(("mode", "phase"), [*((mode, "inference") for mode in MODES), ("gru", "training")])
def test_every_variant_is_right_and_timed(mode, phase):
    row = measured_row(mode, phase)
    names = [variants.PLAIN, *variants.VARIANTS[mode]]
    assert list(row.timings)[: len(names)] == names and not row.failures
    assert (variants.IN_TORCH_NN in row.timings) == (mode == "lstm")
    for name, timing in row.timings.items():
        assert row.gflops(name) == pytest.approx(row.flops_of[name] / timing.median * 1e-9)
        assert 0 < row.share(name) <= 1


def test_each_variant_has_its_own_number_of_operations():
    """A projection has its own product, coupled gates have three quarters of the gates."""
    flops, spec = measured_row("lstm", "inference").flops_of, RNNSpec("lstm", 5, 8)
    assert flops[variants.PLAIN] == 2 * 3 * 2 * 4 * 8 * (5 + 8) == spec.flops(3, 2)
    assert flops[variants.PROJECTION] == 2 * 3 * 2 * (4 * 8 * (5 + 4) + 4 * 8)
    assert flops["coupled gates"] == flops[variants.PLAIN] * 3 // 4


def test_a_wrong_variant_has_no_time(monkeypatch):
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
    row = measured_row("lstm", "inference")
    assert list(row.failures) == ["peepholes"] and row.failures["peepholes"].startswith("wrong: peepholes: y")
    assert "peepholes" not in row.timings and variants.PROJECTION in row.timings
    lines = {line["variant"]: line for line in variants.report([row])}
    assert lines["peepholes"]["wrong"].startswith("peepholes: y") and lines["peepholes"]["seconds"] is None
    assert lines[variants.PLAIN]["wrong"] is None


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
def test_options_that_variants_exclude(other):
    result = CliRunner().invoke(app, ["bench", "--variants", "--cases", "tiny", *other])
    assert result.exit_code == 2
    assert "--variants cannot be used with" in result.output
