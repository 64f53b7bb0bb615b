"""fusedrnn bench --variants: what is measured, what is shown, what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fusedrnn import RNNSpec
from fusedrnn.bench import variants
from fusedrnn.bench.contenders import PHASES
from fusedrnn.cli.app import app
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES, Case

CASE = Case("mini", 3, 2, 5, 8)


def lines(mode, phase):
    told = []
    (found,) = variants.run([CASE], [mode], [PHASES[phase]], "float32", 1, 0.0, told.append)
    assert len(told) == 1
    return {line.name: line for line in found}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(variants, "PAUSE", 0.0)


@pytest.mark.parametrize(("mode", "phase"), [*((mode, "inference") for mode in MODES), ("gru", "training")])
def test_every_variant_is_right_and_timed(mode, phase):
    found = lines(mode, phase)
    names = [variants.PLAIN, *variants.VARIANTS[mode]]
    assert list(found)[: len(names)] == names
    assert (variants.IN_TORCH_NN in found) == (mode == "lstm")
    for line in found.values():
        assert line.wrong is None
        assert line.timing is not None
        assert line.gflops == pytest.approx(line.flops / line.timing.median * 1e-9)
        assert 0 < line.share <= 1


def test_work_is_that_of_the_variant():
    """A projection has its own product, coupled gates have three quarters of the gates."""
    found, spec = lines("lstm", "inference"), RNNSpec("lstm", 5, 8)
    assert found[variants.PLAIN].flops == 2 * 3 * 2 * 4 * 8 * (5 + 8) == spec.flops(3, 2)
    assert found[variants.PROJECTION].flops == 2 * 3 * 2 * (4 * 8 * (5 + 4) + 4 * 8)
    assert found["coupled gates"].flops == found[variants.PLAIN].flops * 3 // 4


def test_a_wrong_one_has_no_figure(monkeypatch):
    plain = PHASES["inference"].makers["fused"]

    def maker(work):
        contender = plain(work)

        def run(batch):
            computed = contender(batch)
            wrong = work.spec.peepholes

            def results():
                found = computed()
                return found | {"y": found["y"] + np.float32(1)} if wrong else found

            return results

        return run

    monkeypatch.setitem(PHASES["inference"].makers, "fused", maker)
    found = lines("lstm", "inference")
    assert "y" in found["peepholes"].wrong
    assert found["peepholes"].timing is None
    assert found["peepholes"].share is None
    assert found[variants.PROJECTION].wrong is None


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


@pytest.mark.parametrize("other", [["--plot", "rows.png"], ["--html", "page.html"], ["--backends", "cpu"], ["--torch"]])
def test_what_it_does_not_go_with(other):
    result = CliRunner().invoke(app, ["bench", "--variants", "--cases", "tiny", *other])
    assert result.exit_code == 2
    assert "--variants goes with --json alone" in result.output
