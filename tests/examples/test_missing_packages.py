"""Programs of a checkout say in one line which package they lack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = """
import os, sys
class Others:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *arguments):
        blocked = name.partition(".")[0] in os.environ["BLOCKED"].split()
        return None if blocked else self.finder.find_spec(name, *arguments)
sys.meta_path[:] = map(Others, sys.meta_path)
"""
FRAMEWORKS = "torch jax keras onnx onnxruntime matplotlib jinja2 adjustText sb3_contrib lightning"
TORCH = "PyTorch: install fusedrnn with its extra 'torch'"


def run_without(packages, program, folder, *arguments):
    (folder / "sitecustomize.py").write_text(BLOCK)
    variables = {**os.environ, "BLOCKED": packages, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT / "src")))}
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("program", "needed"),
    [
        ("benchmarks.accuracy", TORCH),
        ("benchmarks.compiled_loops", TORCH),
        ("benchmarks.figures", "Matplotlib: install fusedrnn with its extra 'figures'"),
        ("benchmarks.jax", "JAX: install fusedrnn with its extra 'jax'"),
        ("benchmarks.onnx_models", "onnx: install fusedrnn with its extra 'onnx'"),
        ("benchmarks.page", "jinja2: install fusedrnn with its extra 'figures'"),
        ("benchmarks.pytorch_cells", TORCH),
        ("benchmarks.scaling", TORCH),
        ("examples.recurrent_rl.sb3", "sb3_contrib: install it"),
        ("examples.train_lightning", "lightning: install it"),
    ],
)
def test_a_missing_package_is_named(program, needed, tmp_path):
    done = run_without(FRAMEWORKS, program, tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {program} needs {needed}\n")


@pytest.mark.parametrize("without", ["torch", "matplotlib"])
def test_the_character_model(without, tmp_path):
    done = run_without(without, "examples.char_lm", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: examples.char_lm needs "), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_module_of_ours_keeps_its_traceback(tmp_path):
    done = run_without("fusedrnn", "benchmarks.streams", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
