"""What compiled kernels are named by covers all that emits code, however the package is installed, or none are kept."""

import ast
import compileall
import os
import pkgutil
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn.jit import sources

PACKAGE = Path(fusedrnn.__file__).parent
EMITTER = "fusedrnn/engines/cpu/kernels/gemm.py"
HEAVY = shutil.ignore_patterns("__pycache__", "torch", "onnx", "bench", "cli", "demo")


def module_files():
    """Every file of the package by the name of its module."""
    for path in PACKAGE.rglob("*.py"):
        parts = ("fusedrnn", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts).removesuffix(".__init__"), path


FILES = dict(module_files())


def imported(path):
    """The modules of this package that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (name for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def emits(path):
    """Whether a file has the means to emit code: it uses the language of ``build``, or LLVM itself."""
    return any(name.startswith(("llvmlite", "fusedrnn.jit.builder")) for name in imported(path))


def test_every_emitter_is_covered():
    """And so is all that any of them imports, from which it may take what it emits."""
    listed = set(sources._modules())
    todo = [name for name, path in FILES.items() if emits(path)]
    assert {f"fusedrnn.engines.cpu.kernels.{name}" for name in ("gemm", "forward", "backward")} <= set(todo)
    seen = {"fusedrnn"}  # what is taken from the package itself are modules, which are named with it
    while todo:
        name = todo.pop()
        if name in FILES and name not in seen:
            seen.add(name)
            todo += imported(FILES[name])
    assert "fusedrnn.cell.cells" in seen
    assert seen <= listed


@pytest.mark.parametrize(
    "name", ["fusedrnn.cell.cells", "fusedrnn.cell.expr", "fusedrnn.jit.vector", "fusedrnn.engines.cpu.kernels.forward"]
)
def test_any_of_them_matters(monkeypatch, name):
    plain, read = sources.digest.__wrapped__(), sources._content
    assert plain == sources.digest.__wrapped__()
    monkeypatch.setattr(sources, "_content", lambda which, spec: read(which, spec) + b"#" * (which == name))
    assert sources.digest.__wrapped__() not in (plain, None)


def test_files_that_changed_after_the_import(monkeypatch):
    """As when the package is upgraded beneath a running process: what it emits is not what the files say."""
    assert sources.digest.__wrapped__()
    newest = max(FILES[name].stat().st_ctime for name in sources._modules())
    monkeypatch.setattr(sources, "_IMPORTED_AT", newest - 1)
    assert sources.digest.__wrapped__() is None


@pytest.mark.parametrize("listing", [[], [pkgutil.ModuleInfo(None, "cells", False)]], ids=["nothing", "a part"])
def test_modules_that_are_not_listed(monkeypatch, listing):
    """Where the loader does not say what there is, nothing is taken for everything."""
    monkeypatch.setattr(pkgutil, "iter_modules", lambda path: listing)
    assert sources.digest.__wrapped__() is None


class Loader:
    """That of a frozen application, as far as it is asked."""

    def __init__(self, **methods):
        self.__dict__.update(methods)


def refuse(*arguments):
    raise OSError("no such file")


def frozen(**methods):
    return ModuleSpec("m", Loader(**methods), origin="/nowhere/m.pyc")


def code(source):
    return compile(source, "m.py", "exec")


def test_modules_without_a_file():
    """Of these the code is taken, whose constants may be anything."""
    texts = [
        "def f(a, *, b=1): return a + b",
        "def f(a, *, b=2): return a + b",
        "def f(a, *, b=1): return a - b",
        "def f(a, *, c=1): return a + c",
        "def f(a, *, b=1): return a.b",
        "def f(a, *, b=1): return (lambda: 'x')",
        "def f(a, *, b=1): return (lambda: 'y')",
        "def f(a): return a in {'p', 'q'}",
        "def f(a): return a in {'p', 'r'}",
        "x = 0.0",
        "x = -0.0",
        "x = 0",
        "x = False",
        "x = '\\ud800'",
    ]
    contents = [sources._content("m", frozen(get_data=refuse, get_code=lambda _, t=t: code(t))) for t in texts]
    assert len(set(contents)) == len(texts)
    again = [sources._content("m", frozen(get_code=lambda _, t=t: code(t))) for t in texts]
    assert contents == again


@pytest.mark.parametrize(
    "spec",
    [
        frozen(get_data=refuse),
        frozen(get_data=refuse, get_code=lambda name: None),
        ModuleSpec("m", Loader(get_data=lambda path: b"a part of a shared library"), origin="/site/m.cpython-311.so"),
        ModuleSpec("m", None, origin="frozen"),
    ],
)
def test_modules_that_cannot_be_read(monkeypatch, spec):
    """Neither source nor bytecode; the file of an extension module may be a stub that calls another."""
    with pytest.raises(LookupError, match="m can be read neither as source nor as bytecode"):
        sources._content("m", spec)
    plain = sources.find_spec
    gemm = "fusedrnn.engines.cpu.kernels.gemm"
    monkeypatch.setattr(sources, "find_spec", lambda name: spec if name == gemm else plain(name))
    assert sources.digest.__wrapped__() is None


def test_loaders_that_raise_what_they_like(monkeypatch):
    def fail(name):
        raise ZeroDivisionError

    plain = sources.find_spec
    spec = frozen(get_code=fail)
    gemm = "fusedrnn.engines.cpu.kernels.gemm"
    monkeypatch.setattr(sources, "find_spec", lambda name: spec if name == gemm else plain(name))
    assert sources.digest.__wrapped__() is None


# The package in the forms in which it may be installed. The program prints the digest of its sources, and once more
# after the file that it was imported from has changed.
PROGRAM = """
import os, sys
import fusedrnn
from fusedrnn.jit import sources
file = sys.argv[1]
assert fusedrnn.__file__.startswith(file), fusedrnn.__file__
print((sources.digest() or b"none").hex())
if os.path.isfile(file):
    os.utime(file)
    print(sources.digest.__wrapped__())
"""
# As the loaders of frozen applications: bytecode that is in no file, under paths that lead nowhere.
FROZEN = """
import importlib.machinery, sys
class Frozen(importlib.machinery.SourcelessFileLoader):
    def get_data(self, path):
        if sys._getframe(1).f_code.co_name == "get_code":
            return super().get_data(path)
        raise OSError(path)
class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and name.startswith("fusedrnn"):
            spec.loader = Frozen(name, spec.origin)
        return spec
sys.meta_path.insert(0, Finder())
"""


def copied(tmp_path):
    """The package's sources, without what no test here imports."""
    tree = tmp_path / "tree"
    shutil.copytree(PACKAGE, tree / "fusedrnn", ignore=HEAVY)
    return tree


def only_bytecode(tree):
    for path in tree.rglob("*.py"):
        assert compileall.compile_file(path, legacy=True, quiet=2)
        path.unlink()
    return tree


def archive(tree):
    path = shutil.make_archive(str(tree.parent / tree.name), "zip", tree)
    shutil.rmtree(tree)
    return path


def digests(path, program=PROGRAM, **environment):
    search = os.pathsep.join((str(path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": search, **environment}, cwd=path.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FORMS = {
    "an archive": (lambda tree: archive(tree), PROGRAM),
    "bytecode": (lambda tree: only_bytecode(tree), PROGRAM),
    "an archive of bytecode": (lambda tree: archive(only_bytecode(tree)), PROGRAM),
    "a frozen application": (lambda tree: only_bytecode(tree), FROZEN + PROGRAM),
}


@pytest.mark.parametrize(("install", "program"), FORMS.values(), ids=FORMS)
def test_two_versions_in_every_form(tmp_path, install, program):
    """Versions that differ in an emitter have different digests; the same one has the same in every process."""
    first, second = copied(tmp_path / "first"), copied(tmp_path / "second")
    with (second / EMITTER).open("a", encoding="utf-8") as file:
        file.write("\nADDED = 1\n")
    first, second = Path(install(first)), Path(install(second))
    results = [digests(first, program, PYTHONHASHSEED="1")]
    other = digests(second, program)
    results.append(digests(first, program, PYTHONHASHSEED="2"))
    assert results[0][0] == results[1][0]
    assert len(results[0][0]) == len(other[0]) == 64 and results[0][0] != other[0]
    if first.is_file():  # it has been touched meanwhile, which is no other content
        assert results[0][1] == other[1] == "None"
