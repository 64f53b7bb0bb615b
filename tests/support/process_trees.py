"""Commands in processes of their own. All of the processes end with the block, whatever happens in it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_MARK = "TEST_PROCESS_TREE"
_LIMIT = 240  # seconds; a command takes a few


def processes(mark: str, session: int) -> list[int]:
    """The processes that inherited the mark, or belong to the session.

    Ray's processes overwrite their environment, torchrun's have sessions of their own, but none do both.
    """
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            state, *fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            is_marked = f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if state != "Z" and (is_marked or int(fields[2]) == session):
                pids.append(int(folder.name))
    return pids


def kill_all(mark: str, session: int) -> None:
    """Send SIGKILL until no process is left: one may start another meanwhile."""
    while pids := processes(mark, session):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Command:
    """A running Python script, and what it has written so far."""

    def __init__(self, process: subprocess.Popen[str], mark: str) -> None:
        self.process, self.mark = process, mark
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until the first line that the pattern matches."""
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line matches {pattern!r}:\n{self.output}")

    def finish(self) -> str:
        """The whole output, once the command has ended without an error."""
        self.lines += self.process.stdout
        assert self.process.wait() == 0, self.output
        return self.output

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def kill(self) -> None:
        """End all its processes at once."""
        kill_all(self.mark, self.process.pid)
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def running(*arguments: object, **environment: str) -> Iterator[Command]:
    """``python ARGUMENTS``, which runs as long as the block."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), _MARK: mark, **environment},
    )  # fmt: skip
    command = Command(process, mark)
    # It ends a command that hangs; whoever reads its output then comes to the end.
    timer = threading.Timer(_LIMIT, kill_all, (mark, process.pid))
    timer.start()
    try:
        yield command
    finally:
        timer.cancel()
        command.kill()
