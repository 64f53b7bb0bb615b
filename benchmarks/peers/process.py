"""A process that runs one peer, and answers one command at a time."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.peers.environments import child_environment
from fusedrnn.bench.timing import ContenderFailed

WORKERS = Path(__file__).parent / "workers"

CLOSE_SECONDS = 2.0
"""The time in seconds that a worker has to exit by itself."""

_STDERR_LINES = 20
"""How many latest lines of a worker's standard error are kept, to explain why it ended."""

_MAX_MESSAGE = 300
"""How many characters of an error are shown."""


class PeerError(ContenderFailed):
    """A peer could not execute a command. The message says why, but does not name the peer."""


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that limit the thread pools of the libraries."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FUSEDRNN_NUM_THREADS")
    return {**dict.fromkeys(names, count), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class PeerProcess:
    """A worker process. It starts at the first command, and again at the first command after it was stopped.

    Args:
        python: The interpreter of its environment.
        worker: The module in ``workers``.
        variables: Environment variables to set for it.
    """

    def __init__(self, python: Path, worker: str, variables: Mapping[str, str]) -> None:
        self._command = [str(python), "-u", str(WORKERS / "protocol.py"), worker]
        self._environment = child_environment(variables)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._stderr: deque[str] = deque()
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The id of the process; None if it is not running."""
        return self._process.pid if self._process else None

    def load(self, workload: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Prepare a workload and run it. Returns the seconds of the ``cold`` call and of a warm call, and ``facts``.

        Raises:
            PeerError: If the peer cannot, or takes longer than ``timeout`` seconds.
        """
        return self.ask({"do": "load", **workload}, timeout)

    def time(self, calls: int, timeout: float) -> Sequence[float]:
        """Seconds of each of ``calls`` consecutive calls.

        Raises:
            PeerError: If a call fails, or all calls together take longer than ``timeout`` seconds.
        """
        seconds: list[float] = self.ask({"do": "time", "calls": calls}, timeout)["seconds"]
        return seconds

    def unload(self) -> None:
        """Release the workload and its memory."""
        if self._process:
            self.ask({"do": "unload"}, timeout=60.0)

    def ask(self, command: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            PeerError: If the answer is an error, or does not come within ``timeout`` seconds, after which the process
                is stopped.
        """
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise PeerError(f"no answer within {timeout:.0f} s") from None
        except BrokenPipeError:
            line = None
        except BaseException:  # after an interrupt, a late answer would count as the answer to the next command
            self.stop()
            raise
        if line is None:
            raise PeerError(self._exit_message(process))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(" ".join(answer["error"].split())[:_MAX_MESSAGE])
        return answer

    def stop(self) -> None:
        """End the process. Kill it if it does not exit when told to."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout and process.stderr
        with suppress(OSError):
            process.stdin.write('{"do": "close"}\n')
            process.stdin.close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()

    def _start(self) -> subprocess.Popen[str]:
        answers: queue.Queue[str | None] = queue.Queue()
        stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._process = process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=self._environment,
            start_new_session=True,  # interrupts from the terminal are for this process only
        )
        assert process.stdout and process.stderr
        self._answers, self._stderr = answers, stderr
        self._readers = [
            threading.Thread(target=_read_answers, args=(process.stdout, answers), daemon=True),
            threading.Thread(target=stderr.extend, args=(process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return process

    def _exit_message(self, process: subprocess.Popen[str]) -> str:
        self.stop()
        last = next((line.strip() for line in reversed(self._stderr) if line.strip()), "")
        return f"its process ended with code {process.returncode}{': ' + last[:_MAX_MESSAGE] if last else ''}"


def _read_answers(lines: IO[str], answers: queue.Queue[str | None]) -> None:
    """Queue each line, then None when the process has ended."""
    for line in lines:
        answers.put(line)
    answers.put(None)
