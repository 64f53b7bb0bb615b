"""Our side of a worker: a process that runs one peer, asked for one thing at a time."""

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

from fusedrnn import env
from fusedrnn.bench.timing import LostError

WORKERS = Path(__file__).parent / "workers"

CLOSING = 2.0
"""Seconds that a worker has to end by itself."""

_LINES_KEPT = 20
"""Of what a worker prints, to tell what it died of."""

_LONGEST_NOTE = 300
"""Characters of an error that are shown."""


class PeerError(LostError):
    """A peer could not do what it was asked for; the message says why, for a reader who knows its name."""


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that tell the libraries' thread pools how many threads to have."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "FUSEDRNN_NUM_THREADS")
    return {**dict.fromkeys(names, count), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}


class PeerProcess:
    """A worker, started when it is first asked for something, and again after it was stopped.

    Args:
        python: Interpreter of its environment.
        worker: Module in ``workers``, or the path of a file.
        environment: Variables to set for it.
    """

    def __init__(self, python: Path, worker: str, environment: Mapping[str, str]) -> None:
        self._command = [str(python), "-u", str(WORKERS / "protocol.py"), worker]
        self._environment = env.child_environment(environment)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque()
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return self._process.pid if self._process else None

    def load(self, problem: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """Have a problem prepared and run. Gives seconds of the ``cold`` call and of a warm one, and ``facts``.

        Raises:
            PeerError: If it cannot or does not within ``limit`` seconds.
        """
        return self.ask({"do": "load", **problem}, limit)

    def time(self, calls: int, limit: float) -> Sequence[float]:
        """Seconds of each of so many calls, one after the other.

        Raises:
            PeerError: If one fails, or all take more than ``limit`` seconds.
        """
        seconds: list[float] = self.ask({"do": "time", "calls": calls}, limit)["seconds"]
        return seconds

    def unload(self) -> None:
        """Have the problem let go, so that its memory is free."""
        if self._process:
            self.ask({"do": "unload"}, limit=60.0)

    def ask(self, command: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            PeerError: If it is an error, or there is none within ``limit`` seconds; the process is stopped then.
        """
        process = self._process or self._start()
        assert process.stdin
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.stop()
            raise PeerError(f"given up after {limit:.0f} s") from None
        except BrokenPipeError:
            line = None
        except BaseException:  # an interrupt: what it answers later would be taken for the next answer
            self.stop()
            raise
        if line is None:
            raise PeerError(self._epitaph(process))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(" ".join(answer["error"].split())[:_LONGEST_NOTE])
        return answer

    def stop(self) -> None:
        """End the process, by force if it is not waiting for a command."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout and process.stderr
        with suppress(OSError):
            process.stdin.write('{"do": "close"}\n')
            process.stdin.close()
        try:
            process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()

    def _start(self) -> subprocess.Popen[str]:
        answers: queue.Queue[str | None] = queue.Queue()
        said: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=self._environment,
            start_new_session=True,  # an interrupt from the terminal is ours to handle
        )
        assert process.stdout and process.stderr
        self._answers, self._said = answers, said
        self._readers = [
            threading.Thread(target=_answers_into, args=(process.stdout, answers), daemon=True),
            threading.Thread(target=said.extend, args=(process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return process

    def _epitaph(self, process: subprocess.Popen[str]) -> str:
        self.stop()
        last = next((line.strip() for line in reversed(self._said) if line.strip()), "")
        return f"its process ended with code {process.returncode}{': ' + last[:_LONGEST_NOTE] if last else ''}"


def _answers_into(lines: IO[str], answers: queue.Queue[str | None]) -> None:
    """Each line, then None."""
    for line in lines:
        answers.put(line)
    answers.put(None)
