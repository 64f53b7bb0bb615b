"""The processes of all peers and revisions of a comparison. They stay from one row to the next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from benchmarks.peers.environments import PEERS, format_of, peer_of
from benchmarks.peers.exchange import read_results, write_workload
from benchmarks.peers.process import PeerError, PeerProcess, thread_variables
from benchmarks.peers.revision import Revision, checked_out
from fusedrnn.bench.data import Batch, Results, Workload

LOAD_SECONDS = 300.0
"""The time in seconds that a peer has to prepare a workload, including its first call."""

_TIMEOUT, _TIMEOUT_FACTOR = 60.0, 20.0
"""Timed calls may take that many seconds, plus that many times as long as they took before."""


class PeerCall:
    """A workload that a worker has loaded: a :class:`fusedrnn.bench.timing.RemoteCall`."""

    def __init__(self, process: PeerProcess, warm: float) -> None:
        self._process = process
        self.warm = warm

    def time(self, calls: int) -> Sequence[float]:
        """Seconds of each of ``calls`` consecutive calls.

        Raises:
            PeerError: If the worker cannot continue.
        """
        return self._process.time(calls, _TIMEOUT + _TIMEOUT_FACTOR * calls * self.warm)


class PeerProcesses:
    """One process for each peer and revision, started at its first workload and ended with the context.

    Args:
        peers: Names from :data:`benchmarks.peers.environments.PEERS`, each with a format of operands.
        revisions: Revisions of fusedrnn.
        threads: Number of threads of each process.
    """

    def __init__(self, peers: Sequence[str], revisions: Sequence[Revision], threads: int) -> None:
        self._peers, self._revisions, self._threads = peers, revisions, threads
        self._processes: dict[str, PeerProcess] = {}
        self._missing: dict[str, str] = {}
        self._stack = ExitStack()
        self.versions: dict[str, Mapping[str, str]] = {}
        """The package versions of the processes that have run a workload."""

    def __enter__(self) -> PeerProcesses:
        variables = thread_variables(self._threads)
        with ExitStack() as stack:
            for name in self._peers:
                peer = PEERS[peer_of(name)]
                if format_of(name) not in peer.formats:
                    self._missing[name] = peer.lacking
                    continue
                if not peer.environment.is_built():
                    self._missing[name] = f"peer {peer.name} is not built: run `make peers`"
                    continue
                self._processes[name] = PeerProcess(peer.environment.python, peer.worker, variables)
            for revision in self._revisions:
                path = stack.enter_context(checked_out(revision))
                self._processes[revision.name] = PeerProcess(
                    Path(sys.executable), "with_fusedrnn", {**variables, "PYTHONPATH": str(path)}
                )
            for process in self._processes.values():
                stack.enter_context(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def load(
        self,
        work: Workload,
        batch: Batch,
        training: bool,
        compare: Callable[[str, Results], str | None],
        say: Callable[[str], None],
    ) -> tuple[dict[str, PeerCall], dict[str, str]]:
        """Let all processes prepare and run a workload, and ``compare`` the results of each.

        Returns:
            The calls of the processes with right results, and for the others a text that says what is wrong.
        """
        calls: dict[str, PeerCall] = {}
        failures = dict(self._missing)
        for name, process in self._processes.items():
            say(name)
            with TemporaryDirectory(prefix="fusedrnn-peer-", ignore_cleanup_errors=True) as folder:
                try:
                    command = write_workload(work, batch, Path(folder), training=training, threads=self._threads)
                    answer = process.load(command | {"compute": format_of(name)}, LOAD_SECONDS)
                    wrong = compare(name, read_results(work, Path(folder)))
                except (PeerError, ValueError) as error:
                    failures[name] = str(error)
                    continue
            self.versions[name] = answer["facts"]
            if wrong:
                failures[name] = f"wrong: {wrong}"
                _unload(process)
            else:
                calls[name] = PeerCall(process, answer["seconds"])
        return calls, failures

    def unload(self) -> None:
        """Let all processes release the workload."""
        for process in self._processes.values():
            _unload(process)


def _unload(process: PeerProcess) -> None:
    try:
        process.unload()
    except PeerError:  # the process has ended; the next row starts another
        process.stop()
