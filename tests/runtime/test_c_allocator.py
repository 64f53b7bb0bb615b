"""The options of the C library's allocator hold for the whole process, so each test has a process of its own."""

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, json, resource, sys
from fusedrnn.runtime.c_allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults, kept = [], keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100 << 20)
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, faults]))
"""


def page_faults(mode):
    """What the function returned, and the page faults of each use of a block of 100 MiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the options")
def test_memory_is_kept():
    _, by_default = page_faults("default")
    is_kept, faults = page_faults("keep")
    assert is_kept is True
    assert min(by_default) > 1000 * max(faults[1:])


def test_other_libraries(monkeypatch):
    from fusedrnn.runtime import c_allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert c_allocator.keep_freed_memory() is False
