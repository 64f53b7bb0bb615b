"""The documents say what is true: snippets run, commands and variables exist, links lead somewhere."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fusedrnn
from fusedrnn import env, mxnet
from fusedrnn.cli.app import app
from fusedrnn.onnx import backend as onnx_backend
from fusedrnn.onnx import read
from fusedrnn.onnx import weights_io as onnx_layers
from fusedrnn.op import rnn_op as operator

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_snippets_of_the_readme_run_in_order():
    names = {}
    threads = fusedrnn.get_num_threads()
    try:
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
            exec(snippet, names)
    finally:
        fusedrnn.set_num_threads(threads)
    assert names["y"].shape == (100, 8, 64)
    np.testing.assert_allclose(names["fused"], names["unfused"], atol=1e-6)


def test_snippets_of_the_page_on_pytorch_run_in_order():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pytorch.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["y"].shape == (100, 4, 128)


def test_snippets_of_the_page_on_onnx_run_in_order():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    before, after = (read(names[name])["encoder"].params for name in ("model", "trained"))
    np.testing.assert_array_equal(before, names["layer"].params)
    np.testing.assert_array_equal(after, names["params"])
    assert names["Y"].shape == (20, 1, 16, 32)
    np.testing.assert_array_equal(names["Y"][10], names["Y_h"])
    assert not names["Y"][11:].any()


def test_snippets_of_the_page_on_mxnet_run_in_order():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mxnet.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["y"].shape == (20, 8, 128)
    assert names["total"].any()


@pytest.mark.parametrize("module", [operator, mxnet, onnx_backend, onnx_layers], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_commands_and_options_exist():
    runner = CliRunner()
    for command, options in re.findall(r"`fusedrnn (\w+)([^`|]*)`", (ROOT / "README.md").read_text()):
        described = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
        assert described.exit_code == 0, command
        for option in re.findall(r"--[a-z]+", options):
            assert option in described.output or option == "--help", f"{command} {option}"


def test_variables_are_those_that_are_read():
    read = set(re.findall(r"FUSEDRNN_[A-Z_]+", Path(env.__file__).read_text()))
    assert set(re.findall(r"FUSEDRNN_[A-Z_]+", (ROOT / "README.md").read_text())) == read


def test_the_tree_in_the_architecture_page_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "src" / "fusedrnn"
    for path in [*package.glob("*.py"), *package.glob("engine/*.py"), *package.glob("codegen/*.py")]:
        if path.name != "__init__.py":
            assert path.name in text, path
