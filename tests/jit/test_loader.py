"""Kernels are loaded once, by the modules that call them."""

import subprocess
import sys
import threading

from answering import TARGET, Builder, answer
from fusedrnn.jit import loader

PROGRAM = """
import sys
from fusedrnn.runtime.thread_pool import get_num_threads
get_num_threads()
print(*sorted(name for name in sys.modules if name.startswith("fusedrnn.engines.cpu")))
"""


def test_get_num_threads_loads_no_kernel_of_the_engine():
    """The package's own ``__init__`` loads the engines: it is replaced by an empty one."""
    stub = "import sys, types, importlib.util\n"
    stub += "spec = importlib.util.find_spec('fusedrnn'); package = importlib.util.module_from_spec(spec)\n"
    stub += "sys.modules['fusedrnn'] = package\n"
    result = subprocess.run([sys.executable, "-c", stub + PROGRAM], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == []


def test_load_once():
    """Threads that ask at the same time get the same code; another argument gets its own."""
    builders = []

    @loader.load_once(2)
    def load(number):
        builders.append(Builder(number))
        return loader.load("once", TARGET, builders[-1])

    results = []
    threads = [threading.Thread(target=lambda: results.append(load(7))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builders) == 1 and len(set(map(id, results))) == 1
    assert load(8) is not results[0] and len(builders) == 2
    load.cache_clear()
    assert load(7) is not results[0]


def test_functions_keep_their_code_loaded():
    call = loader.function(loader.load("held", TARGET, Builder()), "answer", 1)
    assert answer(call.code) == 42
    assert loader.address(call) == call.code.address("answer")
