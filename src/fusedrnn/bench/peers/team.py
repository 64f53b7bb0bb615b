"""The rivals of a benchmark: other libraries and other revisions of ours, each in its process, from row to row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from fusedrnn.bench.computed import Results
from fusedrnn.bench.data import Batch, Workload
from fusedrnn.bench.peers.environments import PEERS
from fusedrnn.bench.peers.problems import read_results, write_problem
from fusedrnn.bench.peers.process import PeerError, PeerProcess, thread_variables
from fusedrnn.bench.peers.revision import Revision, exported

LOADING = 300.0
"""Seconds that a rival has to make itself ready for a row, its first call included."""

_PATIENCE, _SLOWER = 60.0, 20.0
"""Calls that are timed may take so many seconds, plus so many times what they took before."""


class RivalCall:
    """A problem that a worker has loaded, as :func:`fusedrnn.bench.timing.alternate` takes it."""

    def __init__(self, process: PeerProcess, warm: float) -> None:
        self._process = process
        self.warm = warm

    def time(self, calls: int) -> Sequence[float]:
        """Seconds of each of so many calls.

        Raises:
            PeerError: If the worker cannot go on.
        """
        return self._process.time(calls, _PATIENCE + _SLOWER * calls * self.warm)


class Team:
    """Processes for peers and revisions, started when first needed and ended with the context.

    Args:
        peers: Names from :data:`fusedrnn.bench.peers.environments.PEERS`.
        revisions: Of ourselves.
        threads: For each of them.
    """

    def __init__(self, peers: Sequence[str], revisions: Sequence[Revision], threads: int) -> None:
        self._peers, self._revisions, self._threads = peers, revisions, threads
        self._processes: dict[str, PeerProcess] = {}
        self._unable: dict[str, str] = {}
        self._stack = ExitStack()
        self.versions: dict[str, Mapping[str, str]] = {}
        """Of those that ran: names of packages and their versions."""

    def __enter__(self) -> Team:
        variables = thread_variables(self._threads)
        with ExitStack() as stack:
            for name in self._peers:
                peer = PEERS[name]
                if not peer.environment.is_built():
                    self._unable[name] = f"peer {name} is not built: run `make peers`"
                    continue
                self._add(stack, name, PeerProcess(peer.environment.python, peer.worker, variables))
            for revision in self._revisions:
                path = stack.enter_context(exported(revision))
                of_revision = {**variables, "PYTHONPATH": str(path)}
                self._add(stack, revision.name, PeerProcess(Path(sys.executable), "with_fusedrnn", of_revision))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _add(self, stack: ExitStack, name: str, process: PeerProcess) -> None:
        self._processes[name] = stack.enter_context(process)

    def load(
        self,
        work: Workload,
        batch: Batch,
        training: bool,
        compare: Callable[[Results], str | None],
        say: Callable[[str], None],
    ) -> tuple[dict[str, RivalCall], dict[str, str]]:
        """Have all of them prepare a problem and compare what they compute of it.

        Returns:
            Those that are right, ready to be timed; and of the others what is the matter.
        """
        ready: dict[str, RivalCall] = {}
        failures = dict(self._unable)
        for name, process in self._processes.items():
            say(name)
            with TemporaryDirectory(prefix="fusedrnn-peer-", ignore_cleanup_errors=True) as folder:
                try:
                    problem = write_problem(work, batch, Path(folder), training=training, threads=self._threads)
                    answer = process.load(problem, LOADING)
                    wrong = compare(read_results(work, Path(folder)))
                except (PeerError, ValueError) as error:
                    failures[name] = str(error)
                    continue
            self.versions[name] = answer["facts"]
            if wrong:
                failures[name] = f"wrong: {wrong}"
                self._unload(process)
            else:
                ready[name] = RivalCall(process, answer["seconds"])
        return ready, failures

    def unload(self) -> None:
        """Have all of them let the problem go."""
        for process in self._processes.values():
            self._unload(process)

    @staticmethod
    def _unload(process: PeerProcess) -> None:
        try:
            process.unload()
        except PeerError:  # it is gone: the next row starts another
            process.stop()
