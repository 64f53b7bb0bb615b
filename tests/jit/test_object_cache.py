"""Machine code on disk: loaded again, compiled again when damaged, and optional where nothing can be written."""

import ctypes
import gc
import hashlib
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import llvmlite
import numpy as np
import pytest

from answering import TARGET, Builder, answer, build_caller
from fusedrnn import RNNOp, RNNSpec, env
from fusedrnn.engines.cpu import jobs
from fusedrnn.engines.cpu.jobs import load_job
from fusedrnn.engines.cpu.launch.call_kernel import load_bind
from fusedrnn.engines.cpu.weights.pack_kernel import load_pack
from fusedrnn.jit import compiler, loader, object_cache, sources
from fusedrnn.jit.host import emulated
from fusedrnn.jit.object_cache import ObjectCache
from fusedrnn.jit.target import known_targets
from fusedrnn.runtime.fingerprint import load_fingerprint
from fusedrnn.runtime.thread_pool import load_pool


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def only_file(folder):
    (path,) = folder.iterdir()
    return path


@contextmanager
def not_written(folder, reason=""):
    """Expects one warning, however many kernels are compiled, that names the folder and the reason."""
    with pytest.warns(RuntimeWarning, match=f"^fusedrnn keeps compiled kernels in memory.*{folder}.*{reason}") as said:
        yield
    assert len(said) == 1


def test_second_load_reads_the_disk(folder):
    build = Builder()
    assert [answer(loader.load("answer", TARGET, build)) for _ in range(3)] == [42] * 3
    assert build.calls == 1
    assert only_file(folder).name.startswith(f"answer-{TARGET.name}-")


def test_code_on_disk_is_what_runs(folder):
    """What another builder would emit does not matter."""
    loader.load("answer", TARGET, Builder(1))
    assert answer(loader.load("answer", TARGET, Builder(2))) == 1


def test_linked_code(folder):
    """Two callers of the same code, which has a file of its own and lives as long as either of them."""
    for build in (Builder(), Builder(number=0)):  # compiled, then as it is on disk
        called = object_cache.fetch("answer", TARGET, build)
        callers = [loader.load(name, TARGET, build_caller, links=(called,)) for name in ("one", "other")]
        del called
        gc.collect()
        into = np.zeros(1, np.int64)
        for code in callers:
            ctypes.CFUNCTYPE(None, ctypes.c_int64)(code.address("twice"))(into.ctypes.data)
            assert into[0] == 43
    names = sorted(path.name.split("-")[0] for path in folder.iterdir())
    assert names == ["answer", "one", "other"]


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-1],
    "only the header": lambda content: content[: len(object_cache._FORMAT) + 32],
    "half a header": lambda content: content[: len(object_cache._FORMAT) + 16],
    "longer": lambda content: content + b"\0",
    "a bit in the code": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "a bit in the format": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "a bit in the digest": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "the format of earlier versions": lambda content: hashlib.sha256(content[55:]).digest() + content[55:],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"no machine code",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_compiled_again(folder, damage):
    build = Builder()
    loader.load("answer", TARGET, build)
    path = only_file(folder)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert answer(loader.load("answer", TARGET, build)) == 42
    assert build.calls == 2
    assert only_file(folder).read_bytes() == good


def test_file_of_another_kernel_is_compiled_again(folder):
    """Another kernel's file, as good as it is, is not this kernel's: by name, by target, by key."""
    others = [("other", TARGET), ("answer", emulated(TARGET))]
    for name, target in others:
        loader.load(name, target, Builder(1))
    other_files = [path.read_bytes() for path in folder.iterdir()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "digest", lambda emitter: b"another version")
        loader.load("answer", TARGET, Builder(1))
    other_files += [path.read_bytes() for path in folder.iterdir() if path.read_bytes() not in other_files]
    assert len(set(other_files)) == 3

    for path in folder.iterdir():
        path.unlink()
    build = Builder(2)
    loader.load("answer", TARGET, build)
    path = only_file(folder)
    good = path.read_bytes()
    for content in other_files:
        path.write_bytes(content)
        assert answer(loader.load("answer", TARGET, build)) == 2
        assert path.read_bytes() == good
    assert build.calls == 4


def test_folder_in_place_of_the_file(folder):
    build = Builder()
    loader.load("answer", TARGET, build)
    path = only_file(folder)
    path.unlink()
    path.mkdir()
    with not_written(folder):
        assert answer(loader.load("answer", TARGET, build)) == 42
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_file_in_place_of_the_folder(folder):
    folder.parent.mkdir()
    folder.write_text("mine")
    build = Builder()
    with not_written(folder):
        assert [answer(loader.load("answer", TARGET, build)) for _ in range(2)] == [42, 42]
    assert build.calls == 2
    assert folder.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="no folder is read-only to this user")
def test_read_only_folder(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    with not_written(folder):
        assert answer(loader.load("answer", TARGET, Builder())) == 42
    assert not list(folder.iterdir())


@pytest.mark.parametrize("call", ["mkdir", "replace", "fdopen"])
def test_disk_that_cannot_be_written(folder, monkeypatch, call):
    """As a read-only folder does, or a full disk; whoever runs the tests."""

    def refuse(*args, **options):
        raise PermissionError(13, "refused")

    monkeypatch.setattr(os, call, refuse)
    with not_written(folder, "refused"):
        assert [answer(loader.load("answer", TARGET, Builder())) for _ in range(2)] == [42, 42]
    assert ObjectCache(folder).rejection() == "refused"
    assert not folder.exists() or not list(folder.iterdir())


def test_folder_that_is_used_has_no_rejection(folder):
    assert ObjectCache(folder).rejection() == ""
    assert folder.is_dir() and not list(folder.iterdir())


def test_user_without_a_home(monkeypatch):
    """A user without a home folder, as in some containers, has no cache: that costs time, nothing else."""

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(env.Path, "expanduser", homeless)
    assert env.cache_directory() is None
    assert answer(loader.load("answer", TARGET, Builder())) == 42


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_variable_disables_the_cache(tmp_path, monkeypatch, value):
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    build = Builder()
    assert [answer(loader.load("answer", TARGET, build)) for _ in range(2)] == [42, 42]
    assert build.calls == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [target for target in known_targets()[:-1]], ids=lambda target: target.name)
def test_key_depends_on_the_target(folder, other):
    generic = known_targets()[-1]

    def key(name, target):
        return object_cache._key(name, target, "answering")

    assert key("answer", generic) == key("answer", generic)
    assert key("answer", generic) != key("answer", other)
    assert key("answer", generic) != key("answer", emulated(generic))
    assert key("answer", other) != key("answer", replace(other, features="+avx512fp16"))
    assert key("answer", other) != key("other", other)


@pytest.mark.parametrize("what", ["llvmlite", "llvm", "sources"])
def test_key_depends_on_compiler_and_sources(folder, monkeypatch, what):
    """With another compiler, or other sources of our own, the code is compiled again."""
    build = Builder()
    loader.load("answer", TARGET, build)
    if what == "llvmlite":
        monkeypatch.setattr(llvmlite, "__version__", "0.0.1")
    elif what == "llvm":
        monkeypatch.setattr(compiler.llvm, "llvm_version_info", (1, 2, 3))
    else:
        monkeypatch.setattr(sources, "digest", lambda emitter: b"other sources")
    loader.load("answer", TARGET, build)
    assert build.calls == 2
    assert len(list(folder.iterdir())) == 2


def test_nothing_is_written_without_a_key(folder, monkeypatch):
    """Where it is not known what the code depends on, any file may be stale."""
    monkeypatch.setattr(sources, "digest", lambda emitter: None)
    build = Builder()
    assert [answer(loader.load("answer", TARGET, build)) for _ in range(2)] == [42, 42]
    assert build.calls == 2 and not folder.exists()


KEY = "0123456789abcdef" * 2
NAME = f"old{{}}-generic-{KEY}.o"
FOREIGN = ["notes.txt", "user.o", "main-avx2.o", f"main-{KEY}.o", f"x-y-{KEY}1.o", "left1xyz.tmp", f"{KEY}.tmp"]


@pytest.fixture
def five_old(folder):
    """A folder with five old files of ours, of 1000 bytes, the first the youngest, and a few that are not ours."""
    folder.mkdir(parents=True)
    for age in range(5):
        (folder / NAME.format(age)).write_bytes(bytes(1000))
        os.utime(folder / NAME.format(age), (1000 - age, 1000 - age))
    for name in FOREIGN:
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (1, 1))
    (folder / NAME.format("folder")).mkdir()
    (folder / NAME.format("link")).symlink_to(folder / "notes.txt")
    return folder


@pytest.mark.parametrize("limit", [{"max_files": 3}, {"max_bytes": 2999}], ids=str)
def test_oldest_files_are_removed(five_old, limit):
    """Our own only, when there are too many or they are too large; whatever else is in the folder stays."""
    ObjectCache(five_old, **limit).write(NAME.format("new"), bytes(1000))
    left = {*FOREIGN, *(NAME.format(label) for label in ("new", 0, 1, "folder", "link"))}
    assert {path.name for path in five_old.iterdir()} == left


def test_file_just_written_is_not_removed(five_old):
    """Even if it alone is above the limits, and if the clock says that it is the oldest."""
    for path in five_old.iterdir():
        os.utime(path, (2**33, 2**33), follow_symlinks=False)
    ObjectCache(five_old, max_files=1, max_bytes=1).write(NAME.format("new"), bytes(1000))
    left = {path.name for path in five_old.iterdir()} - {*FOREIGN, NAME.format("folder"), NAME.format("link")}
    assert left == {NAME.format("new")}


def test_temporary_files_of_killed_processes_are_removed(five_old):
    """Those of this version and of earlier ones, once no process can still be writing them."""
    stem = NAME.format(7).removesuffix(".o")
    stale = [f"{stem}.0123456789abcdef.tmp", f"{stem}k3_x9abc.tmp"]
    for name in stale:
        (five_old / name).touch()
        os.utime(five_old / name, (1000, 1000))
    (five_old / f"{stem}.fedcba9876543210.tmp").touch()
    before = {path.name for path in five_old.iterdir()}
    loader.load("answer", TARGET, Builder())
    assert before - {path.name for path in five_old.iterdir()} == set(stale)


def test_pruning_recognises_all_our_files(folder):
    """Pruning recognises a kernel's file, and what it is written as first, that of an unusual cell too."""
    RNNOp(RNNSpec("rnn_relu", 3, 4, gate_clip=2.0)).compile()
    written = [path.name for path in folder.iterdir()]
    assert written
    for name in written:
        assert object_cache._OBJECT.fullmatch(name)
        assert object_cache._TEMPORARY.fullmatch(name.removesuffix(".o") + ".0123456789abcdef.tmp")


def test_unknown_function(folder):
    code = loader.load("answer", TARGET, Builder())
    with pytest.raises(LookupError, match="answer has no function 'question'"):
        code.address("question")


PROGRAM = """
import sys, numpy as np
from fusedrnn import RNNOp, RNNSpec
sys.stdin.readline()  # all at once
spec = RNNSpec("gru", 3, 16)
y, _, _ = RNNOp(spec).forward(np.ones((4, 2, 3), np.float32), np.full(spec.layout.size, 0.5, np.float32))
print(float(y.sum()))
"""


def test_concurrent_processes(folder, monkeypatch):
    """Several processes compile and write the same kernels: all are right, and so is what they leave behind."""
    start = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in start:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120) for process in start]
    assert [process.returncode for process in start] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert not [path for path in folder.iterdir() if path.suffix != ".o"]

    def refuse(*args):
        raise AssertionError("compiled once more")

    monkeypatch.setattr(compiler, "compile_module", refuse)
    for load in (load_bind, load_fingerprint, load_pool, load_pack, load_job, jobs._common):
        load.cache_clear()
    spec = RNNSpec("gru", 3, 16)
    y, _, _ = RNNOp(spec).forward(np.ones((4, 2, 3), np.float32), np.full(spec.layout.size, 0.5, np.float32))
    assert float(y.sum()) == float(results[0][0])
