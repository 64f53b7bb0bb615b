"""Forked children, for tests of what they inherit."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# From Python 3.12 on, a fork warns if there are threads. The tests check that it works all the same.
FORK_WARNING = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def in_child(work):
    """Run ``work`` in a forked child; return the bytes that it returned, none if it failed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # ends a child that hangs: it must not outlive the tests
        try:
            os.write(write, bytes(work()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return content


@contextmanager
def busy_threads(work):
    """Two other threads that call ``work`` again and again."""
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            work()

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
