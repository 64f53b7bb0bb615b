"""The documents say what is true: snippets run, links lead somewhere, paths, commands and variables exist."""

import ast
import doctest
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import fusedrnn
from benchmarks.accuracy import app as accuracy
from benchmarks.compare.__main__ import app as compare
from benchmarks.compiled_loops import app as compiled_loops
from benchmarks.figures.__main__ import app as figures
from benchmarks.jax import app as jax_app
from benchmarks.keras.__main__ import app as keras_models
from benchmarks.onnx_models import app as onnx_models
from benchmarks.page import app as page_app
from benchmarks.peers import environments
from benchmarks.published_cells.__main__ import app as published_cells
from benchmarks.pytorch_cells import app as pytorch_cells
from benchmarks.scaling import app as scaling
from benchmarks.streams import app as streams_app
from examples.char_lm.__main__ import app as char_lm
from examples.stream_server.__main__ import app as stream_server
from fusedrnn import env, mxnet
from fusedrnn.cli.app import app
from fusedrnn.onnx import backend, read, weights_io
from fusedrnn.onnx.ort import accelerated_session
from fusedrnn.op import network_op, rnn_op, stream, streams

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "fusedrnn"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
MODULES = {
    "benchmarks.accuracy": accuracy,
    "benchmarks.compare": compare,
    "benchmarks.compiled_loops": compiled_loops,
    "benchmarks.figures": figures,
    "benchmarks.jax": jax_app,
    "benchmarks.keras": keras_models,
    "benchmarks.published_cells": published_cells,
    "benchmarks.onnx_models": onnx_models,
    "benchmarks.pytorch_cells": pytorch_cells,
    "benchmarks.page": page_app,
    "benchmarks.scaling": scaling,
    "benchmarks.streams": streams_app,
    "examples.char_lm": char_lm,
    "examples.stream_server": stream_server,
}
"""Commands of the form ``python -m NAME``."""
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MOST_LINES = {"README.md": 150, "docs/architecture.md": 150}

sys.path.append(str(DOCS / "tools"))


def check_onnx(names):
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    before, after = (read(names[name])["encoder"].params for name in ("model", "trained"))
    np.testing.assert_array_equal(before, names["layer"].params)
    np.testing.assert_array_equal(after, names["params"])
    assert names["Y"].shape == (20, 1, 16, 32)
    np.testing.assert_array_equal(names["Y"][10], names["Y_h"])
    assert not names["Y"][11:].any()
    assert names["scores"].shape == (16, 3) and len(names["session"].report.nodes) == 1


def check_mxnet(names):
    assert names["y"].shape == (20, 8, 128)
    assert names["total"].any()


RESULTS = {
    "README.md": lambda names: names["dx"].shape == (100, 8, 40),
    "docs/quickstart.md": lambda names: names["y"].shape == (100, 8, 128),
    "docs/guides/pytorch.md": lambda names: names["y"].shape == (100, 4, 128),
    "docs/guides/jax.md": lambda names: names["ys"].shape == (8, 100, 32),
    "docs/guides/keras.md": lambda names: np.isfinite(names["history"].history["loss"]).all(),
    "docs/guides/onnx.md": check_onnx,
    "docs/guides/mxnet.md": check_mxnet,
}
"""What the snippets of a page must lead to, beyond running."""


@pytest.fixture
def unchanged_process(monkeypatch):
    """Restores what snippets change in the process. The allocator cannot be restored: it does not change."""
    threads = fusedrnn.get_num_threads()
    monkeypatch.setattr(fusedrnn, "keep_freed_memory", lambda: False)
    yield
    fusedrnn.set_num_threads(threads)


# Keras's variables, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if SNIPPET.search(text)])
def test_snippets_run_in_order(page, unchanged_process):
    names = {"__name__": "snippets"}
    for snippet in SNIPPET.findall(TEXTS[page]):
        exec(compile(snippet, page, "exec"), names)
    if page in RESULTS:
        assert RESULTS[page](names) in (None, True)


@pytest.mark.parametrize(
    "module",
    [rnn_op, network_op, stream, streams, mxnet, accelerated_session, backend, weights_io],
    ids=lambda module: module.__name__,
)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def anchors(text):
    """The fragments of a page's headings on the site."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target, fragment in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if fragment and path.suffix == ".md":
            assert fragment[1:] in anchors(path.read_text(encoding="utf-8")), target + fragment


@pytest.mark.parametrize("page", TEXTS)
def test_paths_exist(page):
    """Paths in code spans: relative to the package, or to the root of the repository."""
    for name in re.findall(r"`([\w./-]+(?:\.py|\.md|\.json|\.npz|\.txt|/))`", TEXTS[page]):
        if page != "CHANGELOG.md" and "/" in name:
            assert (PACKAGE / name).exists() or (ROOT / name).exists() or (PACKAGE.parent / name).exists(), name


@pytest.mark.parametrize(("page", "most"), MOST_LINES.items())
def test_pages_stay_short(page, most):
    assert len(TEXTS[page].splitlines()) <= most


def test_every_folder_has_its_page():
    described = "".join(text for page, text in TEXTS.items() if page.startswith(("docs/internals/", "docs/arch")))
    for pattern in "*/__init__.py", "engines/*/__init__.py", "engines/cpu/*/__init__.py":
        for path in PACKAGE.glob(pattern):
            assert f"`{path.parent.relative_to(PACKAGE).as_posix()}/" in described, path


def test_every_file_has_a_summary():
    """The page that lists every file takes the first lines of docstrings."""
    for path in PACKAGE.rglob("*.py"):
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert summary.endswith((".", "?", ":")), path


def test_emitters_are_listed():
    """The table of classes whose methods are those of several files has all of them, each with its file."""
    table = TEXTS["docs/internals/kernels.md"].partition("## Who emits what")[2].partition("\n## ")[0]
    emitters = {"ThreadShare"}
    paths = sorted((PACKAGE / "engines" / "cpu" / "kernels").glob("*.py"))
    classes = [(node, path) for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = [(node, path) for node, path in classes if isinstance(node, ast.ClassDef)]
    for _ in classes:
        emitters |= {node.name for node, _ in classes if emitters & {ast.unparse(base) for base in node.bases}}
    rows = table.splitlines()
    for node, path in classes:
        is_listed = any(f"`{node.name}`" in row and f"`{path.name}`" in row for row in rows)
        assert is_listed is (node.name in emitters), node.name


def test_names_of_the_code_exist():
    """Names in code spans of the pages on the code."""
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    known = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    for page, text in TEXTS.items():
        if page.startswith(("docs/internals/", "docs/arch")):
            unknown = set(re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", text)) - known
            assert not unknown, page


def test_commands_and_options_exist():
    runner = CliRunner()
    shell = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
    shells = (block for text in TEXTS.values() for block in shell.findall(text))
    command = r"(?:fusedrnn|python -m) ((?<=fusedrnn )\w+|benchmarks\.\w+|examples\.(?:char_lm|stream_server \w+))"
    commands = {
        *(call for text in TEXTS.values() for call in re.findall(rf"`{command}([^`|]*)`", text)),
        *(call for block in shells for call in re.findall(rf"{command}([^\n#]*)", block)),
    }
    commands = {(name, options) for name, options in commands if name != "benchmarks.peers"}
    assert {name.split()[0] for name, _ in commands} >= {"bench", "info", "warmup", *MODULES}
    described = {}
    for command, options in commands:
        if command not in described:
            module, *subcommand = command.split()
            called, names = (MODULES[module], subcommand) if module in MODULES else (app, [command])
            shown = runner.invoke(called, [*names, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
            assert shown.exit_code == 0, command
            described[command] = shown.output
        for option in re.findall(r"--[a-z]+(?:-[a-z]+)*", options):
            assert option in described[command] or option == "--help", f"{command} {option}"


@pytest.mark.parametrize("name", [*MODULES, "fusedrnn"])
def test_help_is_shown_as_it_is_written(name):
    """Rich takes words in square brackets for markup, and does not print them. It keeps line breaks of paragraphs."""
    command = typer.main.get_command(MODULES.get(name, app))
    for each in getattr(command, "commands", {"": command}).values():
        assert each.help and not re.search(r"[^\n]\n[^\n]", each.help), each.help
        for text in (each.help, *(param.help for param in each.params if hasattr(param, "help"))):
            assert "[" not in (text or ""), text


def test_variables_are_those_that_are_read():
    readers = Path(env.__file__), Path(environments.__file__)
    read_in_code = {name for path in readers for name in re.findall(r"FUSEDRNN_[A-Z_]+", path.read_text())}
    assert set(re.findall(r"FUSEDRNN_[A-Z_]+", TEXTS["docs/api/environment.md"])) == read_in_code


def test_tables_are_those_of_the_data():
    """Run ``python docs/tools/tables.py`` after a change of the data."""
    tables = pytest.importorskip("tables")
    marked = [page for page, text in TEXTS.items() if tables.MARKED.search(text)]
    assert {"README.md", "docs/performance.md", "docs/benchmarks/peers.md"} <= set(marked)
    for page in marked:
        assert tables.with_tables(TEXTS[page]) == TEXTS[page], page


def test_figures_of_the_readme_were_measured():
    """The figures of the table of problems, each from the data of the machine that the table names."""
    files = (DOCS / "benchmarks" / "data").glob("*.json")
    data = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    seconds = {
        (row["case"], row["mode"], row["phase"]): row["seconds"]
        for row in data["peers-zen4-avx512"]["rows"]
        if row["threads"] == 2
    }
    forecaster, stream = seconds["forecaster", "gru", "inference"], seconds["stream1", "lstm", "inference"]
    tagger = seconds["tagger", "lstm", "training"]
    inference = [row for row in data["engines-zen4-avx512"]["rows"] if row["phase"] == "inference"]
    over_onednn = [row["fused_over_onednn"] for row in inference]
    of_large = [row["fused_over_onednn"] for row in inference if row["case"] in ("ds2", "large", "bi2", "tagger")]
    modules = data["pytorch-zen4-avx512"]["rows"]
    over_torch = {
        phase: np.exp(np.mean([
            np.log(row["fused_in_torch_over"]["torch.nn"]) for row in modules if row["phase"] == phase
        ]))
        for phase in ("inference", "training")
    }
    figures = {
        "{0[inference]:.2f} times as fast as torch.nn 2.13 in inference, {0[training]:.2f} in training": over_torch,
        "two-layer GRU of 40 units: {:.1f} times as fast as ONNX Runtime": forecaster["ONNX RT"] / forecaster["fused"],
        "one step of an LSTM of 256 units: {:.0f} µs": stream["fused"] * 1e6,
        "ONNX Runtime {:.1f} µs": stream["ONNX RT"] * 1e6,
        "LSTM tagger: {:.1f} times as fast as MXNet": tagger["MXNet fused"] / tagger["fused"],
        "our engine in inference: {:.1f} times as fast as PyPI's build of oneDNN": np.exp(np.mean(np.log(over_onednn))),
        "{:.2f} in the 16 rows of ds2, large, bi2 and tagger": np.exp(np.mean(np.log(of_large))),
    }
    assert (len(over_onednn), len(of_large)) == (40, 16)
    for text, figure in figures.items():
        assert text.format(figure) in TEXTS["README.md"]


def test_no_return_value_begins_with_a_type():
    """Of the first line of what is returned, the pages of the API take all before a colon for a type."""
    for path in PACKAGE.rglob("*.py"):
        for line in re.findall(r"^ +Returns:\n +(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert ":" not in re.sub(r":\w+:`", "`", line), (path, line)
