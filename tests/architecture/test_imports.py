"""What importing the package loads, and who reads the environment. import-linter checks who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn

PACKAGE = Path(fusedrnn.__file__).parent
FRAMEWORKS = (
    "torch", "jax", "onnx", "onnxruntime", "mxnet", "tensorflow", "keras", "flax", "equinox", "numba", "scipy",
)  # fmt: skip


def test_imports_are_absolute():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}, line {node.lineno}"


def test_the_environment_is_read_in_one_place():
    """Every variable is validated and documented in env.py; oneDNN's library sets one that OpenCL's loader reads."""
    for path in PACKAGE.rglob("*.py"):
        if path in (PACKAGE / "env.py", PACKAGE / "engines" / "onednn" / "library.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reads = (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")) or (
                isinstance(node, ast.ImportFrom) and node.module == "os"
            )
            assert not reads, f"{path}, line {node.lineno}: {ast.unparse(node)}"


def test_a_forked_child_finds_no_lock_held():
    """A child renews the locks of locks.py; cached properties of lazy.py need none, those of functools have one."""
    with_locks = {"functools": {"cached_property"}, "threading": {"Lock", "RLock", "Condition", "Event", "Semaphore"}}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = set()
            if isinstance(node, ast.ImportFrom):
                names = with_locks.get(node.module, set()) & {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = with_locks.get(node.value.id, set()) & {node.attr}
            assert not names or path == PACKAGE / "locks.py", f"{path}, line {node.lineno}: {names}"


def test_the_type_of_arrays_has_one_definition():
    for path in PACKAGE.rglob("*.py"):
        assert path == PACKAGE / "arrays.py" or "NDArray[Any]" not in path.read_text(encoding="utf-8"), path


def test_variables_are_documented():
    """The page on configuration, config's docstring, names each variable that it reads."""
    text = (PACKAGE / "env.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("FUSEDRNN_"):
            assert f"``{node.value.split()[0]}``" in ast.get_docstring(tree)


def loaded_by(statements):
    program = f"import sys\n{statements}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statements",
    [
        "import fusedrnn",
        "import fusedrnn, numpy as np\n"
        "spec = fusedrnn.RNNSpec('gru', 2, 2)\n"
        "fusedrnn.RNNOp(spec).forward(np.ones((2, 2, 2), 'f4'), np.ones(spec.layout.size, 'f4'))",
        "import fusedrnn.mxnet.rnn, fusedrnn.engines.reference.forward",
        "import numpy as np\n"
        "from fusedrnn import mxnet as mx\n"
        "layer = mx.gluon.rnn.GRU(2)\n"
        "layer.initialize()\n"
        "layer(np.ones((2, 2, 2), 'f4'))",
    ],
    ids=["import", "call", "cells", "mxnet's layers"],
)
def test_no_framework_is_loaded(statements):
    loaded = loaded_by(statements)
    assert {"fusedrnn", "numpy", "llvmlite"} <= loaded
    assert not loaded & {*FRAMEWORKS, "matplotlib", "rich", "typer", "threadpoolctl", "pytest"}


def test_jax_alone_loads_no_library_of_layers():
    loaded = loaded_by("import fusedrnn.jax; fusedrnn.jax.rnn, fusedrnn.jax.Report")
    assert "jax" in loaded and not loaded & {"flax", "equinox", "torch"}


def test_layers_nobody_asked_for_are_not_loaded():
    code = "import fusedrnn, sys; assert not [name for name in sys.modules if 'gluon' in name]; "
    code += "from fusedrnn import mxnet; mxnet.gluon.rnn.LSTM(2)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert sorted(fusedrnn.__all__) == sorted(set(fusedrnn.__all__))
    for name in fusedrnn.__all__:
        assert getattr(fusedrnn, name).__doc__ or name == "__version__"
