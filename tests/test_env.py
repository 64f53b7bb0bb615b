"""Environment variables: their effects; wrong values of ours raise errors, those of others are ignored."""

import os
import re

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, env
from fusedrnn.engines.cpu import jobs
from fusedrnn.engines.onednn import library
from fusedrnn.jit import host
from fusedrnn.jit.host import available_targets, current_target, emulated, target_for
from fusedrnn.jit.target import is_x86, known_targets
from fusedrnn.runtime import thread_pool

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    monkeypatch.setattr(thread_pool, "_num_threads", None)
    for name in ("FUSEDRNN_TARGET", "FUSEDRNN_NUM_THREADS", "OMP_NUM_THREADS", "FUSEDRNN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    thread_pool._default.cache_clear()
    yield
    thread_pool._default.cache_clear()


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        (None, None, CORES),
        ("3", None, 3),
        (" 3 ", "7", 3),
        (None, "7", 7),
        ("", "7", 7),
        (None, "5,2,1", 5),
        (None, "0", CORES),
        (None, "-2", CORES),
        (None, "many", CORES),
        (None, "²", CORES),
        (None, "", CORES),
        (None, "99999999", 1024),
        ("1024", None, 1024),
    ],
)
def test_num_threads(monkeypatch, own, shared, expected):
    for name, value in (("FUSEDRNN_NUM_THREADS", own), ("OMP_NUM_THREADS", shared)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert fusedrnn.get_num_threads() == expected
    fusedrnn.set_num_threads(2)
    assert fusedrnn.get_num_threads() == 2


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "²", "1025", "3,2", "99999999999999999999"])
def test_bad_num_threads(monkeypatch, value):
    monkeypatch.setenv("FUSEDRNN_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"^FUSEDRNN_NUM_THREADS must be .*; got '{re.escape(value)}'"):
        fusedrnn.get_num_threads()


@pytest.mark.parametrize("value", ["-1", "5", "yes", "1.0"])
def test_bad_debug_level(monkeypatch, value):
    monkeypatch.setenv("FUSEDRNN_DEBUG", value)
    with pytest.raises(ValueError, match=f"^FUSEDRNN_DEBUG must be 0, 1, 2, 3 or 4; got '{value}'"):
        env.debug()


@pytest.mark.parametrize("value", ["sse9", "avx2-emulated-emulated", "emulated", "avx512 avx2"])
def test_unknown_target(monkeypatch, value):
    monkeypatch.setenv("FUSEDRNN_TARGET", value)
    names = ", ".join(target.name for target in known_targets())
    for use in (current_target, lambda: RNNOp(RNNSpec("gru", 1, 1)), lambda: RNNOp.get(RNNSpec("gru", 1, 1))):
        with pytest.raises(ValueError, match=f"^FUSEDRNN_TARGET must be one of {names}.*; got '{value}'"):
            use()


def test_target_that_the_processor_lacks(monkeypatch):
    monkeypatch.setattr(host, "_host_features", lambda: frozenset())
    widest = known_targets()[0]
    if not widest.required:
        pytest.skip("the only target needs nothing")
    monkeypatch.setenv("FUSEDRNN_TARGET", widest.name)
    message = f"'{widest.name}', which this processor cannot run .*it lacks .*{min(widest.required)}.*-emulated"
    with pytest.raises(ValueError, match=message):
        current_target()


@pytest.mark.skipif(not is_x86(), reason="AMX is an extension of x86")
@pytest.mark.parametrize(
    ("processor", "permitted", "chosen"),
    [
        ("sapphirerapids", True, "avx512-amx"),
        ("sapphirerapids", False, "avx512-vnni"),  # its vdpbf16ps is slower than products in float32
        ("another", False, "avx512-bf16"),
    ],
)
def test_tiles_need_permission(monkeypatch, processor, permitted, chosen):
    """Without it the next target runs, and to ask for tiles is an error that says why."""
    (amx,) = (target for target in known_targets() if target.has_tiles)
    monkeypatch.setattr(host, "_host_features", lambda: frozenset(amx.required))
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: permitted)
    monkeypatch.setattr(host, "_host_name", lambda: processor)
    monkeypatch.delenv("FUSEDRNN_TARGET", raising=False)
    assert current_target().name == target_for(64, "float32").name == chosen
    monkeypatch.setenv("FUSEDRNN_TARGET", "avx512-amx")
    if permitted:
        assert current_target() == amx
    else:
        with pytest.raises(ValueError, match=r"it lacks permission to use AMX.*available: avx512-bf16, "):
            current_target()


def test_target_default_is_the_widest(monkeypatch):
    assert current_target() == available_targets()[0]
    monkeypatch.setenv("FUSEDRNN_TARGET", " GENERIC ")
    assert current_target() == known_targets()[-1]


def test_emulated_targets_use_native_instructions():
    """The other's shapes, this processor's instructions; told apart by name, and so in every cache."""
    for target in known_targets():
        twin, native = emulated(target), available_targets()[0]
        assert (twin.vector_bits, twin.registers) == (target.vector_bits, target.registers)
        assert (twin.cpu, twin.features, twin.fma) == (native.cpu, native.features, native.fma)
        assert twin.name == f"{target.name}-emulated"


@pytest.mark.skipif(not is_x86(), reason="a tile for each processor with AVX-512")
@pytest.mark.parametrize(("processor", "tile"), [("znver4", (6, 4)), ("sapphirerapids", (9, 3))])
def test_tile_of_the_processor(monkeypatch, processor, tile):
    """Of float32 and of products of vectors; those of widened operands and of AMX have one on all processors."""
    (amx,) = (target for target in known_targets() if target.has_tiles)
    monkeypatch.setattr(host, "_host_features", lambda: frozenset(amx.required))
    monkeypatch.setattr(host, "_tiles_are_permitted", lambda: True)
    monkeypatch.setattr(host, "_host_name", lambda: processor)
    for target in [target for target in host.available_targets() if target.registers == 32]:
        assert target.for_compute("float32").tile == (tile if target.vector_bits == 512 else (6, 4))
        assert target.for_compute("int8_weights").tile == (6, 4)


def test_an_op_keeps_its_target(monkeypatch):
    """RNNOp.get asks again, an op in hand stays what it is."""
    spec = RNNSpec("gru", 2, 3)
    monkeypatch.setenv("FUSEDRNN_TARGET", "generic")
    first = RNNOp.get(spec)
    monkeypatch.setenv("FUSEDRNN_TARGET", "generic-emulated")
    second = RNNOp.get(spec)
    assert first is not second
    assert (first.by_address().target.name, second.by_address().target.name) == ("generic", "generic-emulated")


@pytest.mark.parametrize("level", range(5))
def test_debug_ladder(monkeypatch, capfd, level):
    """1 the plan, 2 times, 3 LLVM IR, 4 assembly; to stderr, each level with those below it."""
    monkeypatch.setenv("FUSEDRNN_DEBUG", str(level))
    monkeypatch.setattr(jobs, "load_job", jobs.load_job.__wrapped__)
    spec = RNNSpec("rnn_relu", 2, 3)
    op = RNNOp(spec)
    for _ in range(2):
        op.forward(np.ones((5, 4, 2), np.float32), np.ones(spec.layout.size, np.float32))
    out, err = capfd.readouterr()
    assert not out
    assert err.count("T=5 N=4: 1 thread(s)") == (level >= 1)  # the second call is no new problem
    assert len(re.findall(r"inference [\d.]+ us", err)) == 2 * (level >= 2)
    assert ("define" in err and "LLVM IR of forward_rnn_relu_float32" in err) == (level >= 3)
    assert ("retq" in err or "ret\n" in err) == (level >= 4)


@pytest.mark.skipif(not is_x86(), reason="x86 alone has vectors that are worked on in halves")
def test_half_vectors_where_they_leave_fewer_lanes_empty(monkeypatch):
    """On processors that take them one after the other; not on others, and not if a target is asked for."""
    whole, half = (next(t for t in known_targets() if t.name == name) for name in ("avx512", "avx512-half"))
    monkeypatch.delenv("FUSEDRNN_TARGET", raising=False)
    monkeypatch.setattr(host, "available_targets", lambda: (whole, half))
    monkeypatch.setattr(host, "_host_name", lambda: "znver4")
    chosen = {size: target_for(size, "float32") for size in (1, 8, 9, 16, 17, 40, 63, 100, 800)}
    assert [size for size, target in chosen.items() if target is half] == [1, 8, 17, 40, 100]
    assert target_for(8, "float64") is whole
    monkeypatch.setattr(host, "_host_name", lambda: "sapphirerapids")
    assert target_for(40, "float32") is whole
    monkeypatch.setattr(host, "_host_name", lambda: "znver4")
    monkeypatch.setattr(host, "available_targets", lambda: (known_targets()[-1],))
    assert target_for(40, "float32") is known_targets()[-1]


def test_opencl_finds_a_driver_inside_the_block(monkeypatch, tmp_path):
    """If there is one, and the environment does not name others."""
    driver = tmp_path / "libdriver.so"
    monkeypatch.delenv("OCL_ICD_FILENAMES", raising=False)
    monkeypatch.delenv("OCL_ICD_VENDORS", raising=False)
    with library.opencl_driver(driver):
        assert "OCL_ICD_FILENAMES" not in os.environ
    driver.touch()
    with library.opencl_driver(driver):
        assert os.environ["OCL_ICD_FILENAMES"] == str(driver)
    assert "OCL_ICD_FILENAMES" not in os.environ
    monkeypatch.setenv("OCL_ICD_VENDORS", "elsewhere")
    with library.opencl_driver(driver):
        assert "OCL_ICD_FILENAMES" not in os.environ


def test_path_of_onednn(monkeypatch, tmp_path):
    """A bare name is a file of the current folder: the system's loader would look for it in folders of its own."""
    monkeypatch.delenv("FUSEDRNN_ONEDNN", raising=False)
    assert env.onednn() is None
    monkeypatch.setenv("FUSEDRNN_ONEDNN", f" {tmp_path / 'libdnnl.so.3'} ")
    assert env.onednn() == tmp_path / "libdnnl.so.3"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDRNN_ONEDNN", "libdnnl.so.3")
    assert env.onednn() == tmp_path / "libdnnl.so.3"


def test_path_of_onednn_in_an_unknown_home(monkeypatch):
    """What is asked for by name is refused by name; the cache is done without, see test_cache_folder."""
    monkeypatch.setenv("FUSEDRNN_ONEDNN", "~no-such-user-at-all/libdnnl.so.3")
    with pytest.raises(ImportError, match=r"FUSEDRNN_ONEDNN must be .*~no-such-user-at-all/libdnnl\.so\.3"):
        library.find()


HOMES = {
    "linux": ("XDG_CACHE_HOME", ".cache"),
    "win32": ("LOCALAPPDATA", "AppData/Local"),
    "darwin": (None, "Library/Caches"),
}


@pytest.mark.parametrize("platform", HOMES)
def test_the_cache_folder_by_default(monkeypatch, tmp_path, platform):
    """Where the system's custom has it; what is relative would depend on where a program is started, and is ignored."""
    variable, below_home = HOMES[platform]
    monkeypatch.setattr(env.sys, "platform", platform)
    monkeypatch.setattr(env, "warn_once", None)
    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_directory() == tmp_path / below_home / "fusedrnn"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "own"))
        assert env.cache_directory() == tmp_path / "own" / "fusedrnn"
        for relative in ("", "own", "."):
            monkeypatch.setenv(variable, relative)
            assert env.cache_directory() == tmp_path / below_home / "fusedrnn"
    for home in ("own", "."):
        monkeypatch.setenv("HOME", home)
        assert env.cache_directory() is None


def test_a_warning_is_given_once(tmp_path):
    """For each cause, whatever the text; a warning that is turned into an error is not raised at every call."""
    for cause in (f"{tmp_path}/a", f"{tmp_path}/b"):
        with pytest.warns(RuntimeWarning, match=f"^first {cause}$") as said:
            env.warn_once(cause, f"first {cause}")
            env.warn_once(cause, "second")
        assert len(said) == 1
