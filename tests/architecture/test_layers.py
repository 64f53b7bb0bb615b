"""The house's rules: what is imported by whom, what is not imported at all, and who reads the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fusedrnn

PACKAGE = Path(fusedrnn.__file__).parent
# From the ground up: a module imports from its own layer and those below it. Names are those of modules or packages;
# the public names, in __init__.py, stand between what makes them and what is built on them.
LAYERS = (
    {"env", "locks", "scalars", "dropout", "frozen_array"},
    {"cell"},
    {"layout"},
    {"spec"},
    {"jit"},
    {"runtime"},
    {"engines"},
    {"op"},
    {"mxnet"},
    {"__init__"},
    {"testing"},
    {"torch", "onnx"},
    {"bench"},
    {"demo"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Modules beside each other in a layer that may still not import one another.
APART = {("torch", "onnx"), ("onnx", "torch")}
FRAMEWORKS = ("torch", "jax", "onnx", "onnxruntime", "mxnet", "tensorflow", "keras", "flax", "numba", "scipy")
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def module_of(path):
    return f"fusedrnn.{name_of(path).removesuffix('.__init__')}"


MODULES = {module_of(path) for path in FILES}


def part(module):
    """The layer's name for a module of the package: its first folder or file."""
    return module.split(".")[0] if module else "__init__"


def imports(path):
    """The dotted names of the modules that a file imports, at its top or later; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def inside(path):
    """The parts of the package that a file imports from."""
    for name in imports(path):
        package, _, module = name.partition(".")
        if package == "fusedrnn":
            yield part(module)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_its_layer(path):
    assert part(name_of(path)) in LEVEL


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    own = part(name_of(path))
    for other in inside(path):
        assert LEVEL[other] <= LEVEL[own], f"{name_of(path)} imports {other}, which lies above it"
        assert (own, other) not in APART, f"{name_of(path)} imports {other}"


def test_no_circles():
    """Nor among the modules of one package."""
    below = {module_of(path): MODULES.intersection(imports(path)) for path in FILES}
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in sorted(below[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in sorted(below):
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_llvmlite_is_touched_by_codegen(path):
    users = {name.split(".")[0] for name in imports(path)}
    if part(name_of(path)) not in ("jit", "runtime", "engines"):
        assert "llvmlite" not in users


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_environment_is_read_by_config(path):
    """Every variable in one place, validated and documented."""
    if name_of(path) == "env":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        reads = (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")) or (
            isinstance(node, ast.ImportFrom) and node.module == "os"
        )
        assert not reads, f"{name_of(path)}, line {node.lineno}: {ast.unparse(node)}"


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


def test_layers_nobody_asked_for_are_not_loaded():
    code = "import fusedrnn, sys; assert not [name for name in sys.modules if 'gluon' in name]; "
    code += "from fusedrnn import mxnet; mxnet.gluon.rnn.LSTM(2)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert sorted(fusedrnn.__all__) == sorted(set(fusedrnn.__all__))
    for name in fusedrnn.__all__:
        assert getattr(fusedrnn, name).__doc__ or name == "__version__"
