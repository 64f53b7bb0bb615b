"""The key of compiled kernels covers the code that emits them, however the package is installed, and nothing else."""

import ast
import compileall
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn.jit import sources

PACKAGE = Path(fusedrnn.__file__).parent
FORWARD, BACKWARD = "fusedrnn.engines.cpu.kernels.forward", "fusedrnn.engines.cpu.kernels.backward"
COMMON, GEMM = "fusedrnn.engines.cpu.kernels.common_kernels", "fusedrnn.engines.cpu.kernels.gemm"
UNUSED = "torch", "jax", "keras", "mxnet", "onnx", "bench", "cli", "testing"  # no test here imports them
UNUSED_FILES = shutil.ignore_patterns("__pycache__", *UNUSED)


def module_files():
    """Every file of the package by the name of its module."""
    for path in PACKAGE.rglob("*.py"):
        parts = ("fusedrnn", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts).removesuffix(".__init__"), path


FILES = dict(module_files())


@cache
def imported(name):
    """The modules of this package that a module imports, in functions too; of a package, the names that it imports."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fusedrnn"):
            is_package = FILES[node.module].name == "__init__.py"
            names |= {f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("fusedrnn")}
    return names


def closure(emitter):
    """A module, the compiler, and all that either imports; but not what loads the code, and chooses the target."""
    names, pending = set(), [emitter, "fusedrnn.jit.compiler"]
    while pending:
        name = pending.pop()
        if name not in names and name not in ("fusedrnn.jit.loader", "fusedrnn.jit.host"):
            names.add(name)
            pending += imported(name)
    return names


# Modules with functions that build a whole module of LLVM's.
KERNELS = sorted(name for name, path in FILES.items() if "\ndef build_" in path.read_text(encoding="utf-8"))
UNRELATED = [
    "fusedrnn", "fusedrnn.op.stream", "fusedrnn.op.rnn_op", "fusedrnn.spec", "fusedrnn.layout", "fusedrnn.env",
    "fusedrnn.engines", "fusedrnn.engines.registry", "fusedrnn.engines.cpu.executor", "fusedrnn.engines.cpu.plan.cost",
    "fusedrnn.engines.cpu.plan.plans", "fusedrnn.jit.cache_folder", "fusedrnn.jit.loader", "fusedrnn.jit.host",
]  # fmt: skip


@pytest.fixture(autouse=True)
def clear_module_cache():
    """Each test reads the modules anew."""
    sources._module.cache_clear()


def digest(emitter, changed=None):
    """The digest as it is if a module changes."""
    read = sources._module

    def module(name):
        content, imports = read(name)
        return sources._Module(content + b"#" * (name == changed), imports)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_module", module)
        return sources.digest.__wrapped__(emitter)


def test_module_that_cannot_emit():
    """Nothing is kept on disk under a key that does not cover the emitter, as for a ``functools.partial`` of one."""
    assert {FORWARD, BACKWARD, COMMON, "fusedrnn.runtime.fingerprint"} <= set(KERNELS)
    assert digest("functools") is None and digest("fusedrnn.spec") is None and digest("no.such.module") is None


@pytest.mark.parametrize("emitter", KERNELS)
def test_every_import_of_an_emitter_is_covered(emitter):
    """And nothing else: what bytecode says is what the source says."""
    if ".jax." in emitter:  # whose package imports it
        pytest.importorskip("jax")
    assert sources.covered_modules(emitter) == closure(emitter)
    # Names that are taken from packages are modules: a package's own code is not covered.
    assert closure(emitter) <= FILES.keys()
    assert not [name for name in closure(emitter) if FILES[name].name == "__init__.py"]


@pytest.mark.parametrize("emitter", KERNELS)
def test_change_in_a_covered_module_changes_the_digest(emitter):
    if ".jax." in emitter:
        pytest.importorskip("jax")
    plain = digest(emitter)
    assert plain and plain == digest(emitter)
    assert {"fusedrnn.jit.builder", "fusedrnn.jit.compiler", emitter} <= closure(emitter)
    changed = [digest(emitter, name) for name in sorted(closure(emitter))]
    assert len({plain, *changed}) == 1 + len(changed) and None not in changed


@pytest.mark.parametrize("emitter", [name for name in KERNELS if name.startswith("fusedrnn.engines")])
def test_change_elsewhere_keeps_the_digest(emitter):
    """Nobody's kernels are compiled again for a docstring in the cost model."""
    assert set(UNRELATED) <= FILES.keys()
    assert {digest(emitter, name) for name in UNRELATED} == {digest(emitter)}
    above = "fusedrnn.op", "fusedrnn.engines.cpu.plan", "fusedrnn.torch", "fusedrnn.bench"
    assert not [name for name in closure(emitter) if name.startswith(above)]


def test_emitter_outside_the_known_folders(tmp_path):
    """The key goes with the function that emits, not with a list of folders."""
    tree = copied(tmp_path)
    kernel = tree / "fusedrnn" / "elsewhere.py"
    kernel.write_text("from fusedrnn.jit.builder import Module\nfrom fusedrnn.jit import target\n")
    program = "import fusedrnn.elsewhere\nfrom fusedrnn.jit import sources\n"
    program += "print(*sources.covered_modules('fusedrnn.elsewhere'))"
    assert {"fusedrnn.elsewhere", "fusedrnn.jit.builder", "fusedrnn.jit.target"} <= set(digests(tree, program))


class Loader:
    """The loader of a frozen application, with only the methods that are called."""

    def __init__(self, **methods):
        self.__dict__.update(methods)


def refuse(*arguments):
    raise OSError("no such file")


def frozen(**methods):
    return ModuleSpec("m", Loader(**methods), origin="/nowhere/m.pyc")


def content(spec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "find_spec", lambda name: spec)
        return sources._module.__wrapped__("m").content


def code(source):
    return compile(source, "m.py", "exec")


def test_modules_without_a_file_are_described_by_their_code():
    """Constants may be anything."""
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
    contents = [content(frozen(get_data=refuse, get_code=lambda _, t=t: code(t))) for t in texts]
    assert len(set(contents)) == len(texts)
    again = [content(frozen(get_code=lambda _, t=t: code(t))) for t in texts]
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
        content(spec)
    plain = sources.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda name: spec if name == GEMM else plain(name))
    assert digest(FORWARD) is None


def test_loader_that_raises_any_error(monkeypatch):
    def fail(name):
        raise ZeroDivisionError

    plain = sources.find_spec
    spec = frozen(get_code=fail)
    monkeypatch.setattr(sources, "find_spec", lambda name: spec if name == GEMM else plain(name))
    assert digest(FORWARD) is None


# The package in the forms in which it may be installed. The program prints the digest of its sources, and once more
# after a file that it was imported from has changed.
PROGRAM = """
import importlib.util, os, sys
import fusedrnn
from fusedrnn.jit import sources
root = sys.argv[1]
assert fusedrnn.__file__.startswith(root), fusedrnn.__file__
EMITTER = "fusedrnn.engines.cpu.kernels.forward"
print((sources.digest(EMITTER) or b"none").hex())
os.utime(root if os.path.isfile(root) else importlib.util.find_spec("fusedrnn.engines.cpu.kernels.gemm").origin)
sources._module.cache_clear()
print(sources.digest.__wrapped__(EMITTER))
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
    shutil.copytree(PACKAGE, tree / "fusedrnn", ignore=UNUSED_FILES)
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
    "sources": (lambda tree: tree, PROGRAM),
    "an archive": (lambda tree: archive(tree), PROGRAM),
    "bytecode": (lambda tree: only_bytecode(tree), PROGRAM),
    "an archive of bytecode": (lambda tree: archive(only_bytecode(tree)), PROGRAM),
    "a frozen application": (lambda tree: only_bytecode(tree), FROZEN + PROGRAM),
}


@pytest.mark.parametrize(("install", "program"), FORMS.values(), ids=FORMS)
def test_digests_of_installed_packages(tmp_path, install, program):
    """Versions that differ in an emitter have different digests; the same one has the same in every process.

    There is no digest once a file has changed after the import, as when the package is upgraded beneath a running
    process: what that emits is not what the files say.
    """
    first, second = copied(tmp_path / "first"), copied(tmp_path / "second")
    with (second / "fusedrnn/engines/cpu/kernels/gemm.py").open("a", encoding="utf-8") as file:
        file.write("\nADDED = 1\n")
    first, second = Path(install(first)), Path(install(second))
    results = [digests(first, program, PYTHONHASHSEED="1")]
    other = digests(second, program)
    results.append(digests(first, program, PYTHONHASHSEED="2"))
    assert results[0][0] == results[1][0]
    assert len(results[0][0]) == len(other[0]) == 64 and results[0][0] != other[0]
    assert results[0][1] == results[1][1] == other[1] == "None"
