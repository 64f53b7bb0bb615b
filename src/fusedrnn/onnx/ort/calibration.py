"""Measures which recurrent nodes of a model are faster on the fused operator, and whether that makes the model faster.

Two profiled sessions, one of which has all nodes replaced, tell the time of each node. A session in which the faster
ones are replaced is then compared with ONNX Runtime alone. All is measured in alternation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from fusedrnn.onnx.ort.feeds import Feeds
from fusedrnn.onnx.ort.sessions import Sessions, node_times

# The least share of its time in ONNX Runtime alone that a model must save.
_MIN_GAIN = 0.02
_MIN_ROUNDS = 5
# A profile has room for a million events.
_MAX_PROFILED_ROUNDS = 200
_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class NodeTimes:
    """The times of a node in its fastest run, in seconds.

    Attributes:
        onnxruntime: In ONNX Runtime.
        fused: On the fused operator, with the best number of threads; None if the node cannot be replaced.
        threads: That number.
    """

    onnxruntime: float
    fused: float | None
    threads: int

    @property
    def saved(self) -> float:
        """The seconds that the fused operator saves, negative if it takes longer."""
        return 0.0 if self.fused is None else self.onnxruntime - self.fused

    @property
    def pays(self) -> bool:
        """Whether the node is faster on the fused operator."""
        return self.saved > 0


def measure_nodes(
    sessions: Sessions, feeds: Sequence[Feeds], threads: Sequence[int], seconds: float
) -> dict[int, NodeTimes]:
    """The times of the nodes that these feeds run, by number; of several feeds, the sums.

    Args:
        sessions: Makes the sessions.
        feeds: One set of feeds or several.
        threads: Numbers of threads to try.
        seconds: How long to measure, about.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = sessions.profiled([], Path(folder))
        after = sessions.profiled(sessions.replaceable, Path(folder))
        settings = [(before, 0), *((after, count) for count in threads)]
        num_runs, num_warm, began = 0, _WARM_UP_RUNS * len(feeds), perf_counter()
        least, most = (num_warm + rounds * len(feeds) for rounds in (_MIN_ROUNDS, _MAX_PROFILED_ROUNDS))
        while num_runs < least or (num_runs < most and perf_counter() - began < seconds):
            for session, count in settings:
                if count:
                    sessions.set_num_threads(dict.fromkeys(sessions.replaceable, count))
                    session.run(None, feeds[num_runs % len(feeds)])  # prepares the one that is measured
                session.run(None, feeds[num_runs % len(feeds)])
            num_runs += 1
        profiles = [node_times(session) for session in (before, after)]
    step = 2 * len(threads)
    runs = {0: profiles[0], **{count: profiles[1][2 * index + 1 :: step] for index, count in enumerate(threads)}}
    times = {count: _fastest(each[num_warm:], len(feeds)) for count, each in runs.items()}
    results = {}
    for number, time in times[0].items():
        fused = {count: times[count][number] for count in threads if number in sessions.replaceable}
        best = min(fused, key=fused.__getitem__, default=1)
        results[number] = NodeTimes(time, fused.get(best), best)
    return results


def _fastest(runs: Sequence[dict[int, float]], num_feeds: int) -> dict[int, float]:
    """The fastest run of each node, of several feeds the sum: what else the machine does only makes a node slower."""
    totals: dict[int, float] = {}
    for first in range(num_feeds):
        of_feeds = runs[first::num_feeds]
        for number in {number for run in of_feeds for number in run}:
            totals[number] = totals.get(number, 0.0) + min(run[number] for run in of_feeds if number in run)
    return totals


class Times(NamedTuple):
    """The times of a session.

    Attributes:
        median: The median seconds of a run; of several feeds, of a run of each.
        fastest: Those of the fastest run.
        relative: The median of the ratio to the first session's run in the same round: what else the machine does
            mostly slows down both.
    """

    median: float
    fastest: float
    relative: float


def compare(sessions: Sequence[Any], feeds: Sequence[Feeds], seconds: float) -> list[Times]:
    """The times of each session, measured in alternation for about so many seconds."""
    for session in sessions:
        for each in feeds:
            for _ in range(_WARM_UP_RUNS):
                session.run(None, each)
    turns = list(enumerate(sessions))
    began, rounds = perf_counter(), list[list[float]]()
    while len(rounds) < _MIN_ROUNDS or perf_counter() - began < seconds:
        times = [0.0] * len(sessions)
        for each in feeds:
            for number, session in turns:
                start = perf_counter()
                session.run(None, each)
                times[number] += perf_counter() - start
        turns.reverse()  # neither is always the first
        rounds.append(times)
    return [
        Times(median(of_session), min(of_session), median(times[number] / times[0] for times in rounds))
        for number, of_session in enumerate(zip(*rounds, strict=True))
    ]


def pays(before: Times, after: Times, saved: float) -> bool:
    """Whether replaced nodes make a model faster.

    Both the typical and the fastest run must be, and the time that the nodes themselves save must explain it: on a busy
    machine two equal sessions differ, too.

    Args:
        before: Of ONNX Runtime alone, the first session of a comparison.
        after: With replaced nodes.
        saved: The seconds that the nodes save.
    """
    limit = 1 - _MIN_GAIN
    is_faster = after.relative <= limit and after.fastest <= limit * before.fastest
    return is_faster and saved >= _MIN_GAIN * before.fastest
