"""Measures which recurrent nodes of a model are faster on the fused operator, and whether that makes the model faster.

Two profiled sessions give the time of each node: one is ONNX Runtime alone, the other has all nodes replaced. Then a
session in which only the faster nodes are replaced is compared with ONNX Runtime alone. The sessions of a comparison
run in alternation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from fusedrnn.onnx.ort.feeds import Feeds
from fusedrnn.onnx.ort.sessions import Sessions, node_times

_Round = TypeVar("_Round")
# The smallest saving that counts, as a share of the model's time in ONNX Runtime alone.
_MIN_GAIN = 0.02
# The least number of rounds, even if they take up to _MAX_EXCESS times as long as planned. The first rounds do not
# count.
_MIN_ROUNDS, _WARM_UP_ROUNDS, _MAX_EXCESS = 7, 2, 4
# A profile has room for a million events.
_MAX_PROFILED_ROUNDS = 200


def _rounds(seconds: float, most: int | None = None) -> Iterator[int]:
    """The numbers of rounds that take about that many seconds; at least one."""
    began = perf_counter()
    for number in count():
        elapsed = perf_counter() - began
        is_late = elapsed >= (_MAX_EXCESS * seconds if number < _MIN_ROUNDS else seconds)
        if number and (is_late or number == most):
            return
        yield number


def _without_warm_up(rounds: Sequence[_Round]) -> Sequence[_Round]:
    """The rounds that count."""
    return rounds[min(_WARM_UP_ROUNDS, len(rounds) - 1) :]


@dataclass(frozen=True)
class NodeTimes:
    """The times of a node in its fastest run, in seconds.

    Attributes:
        onnxruntime: The time in ONNX Runtime.
        fused: The time on the fused operator with the best number of threads; None if the node cannot be replaced.
        threads: That number of threads.
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
    """The times of the nodes that these feeds run, by number; with several feeds, the sums over them.

    Args:
        sessions: Makes the sessions.
        feeds: One set of feeds or several.
        threads: Numbers of threads to try.
        seconds: How long to measure, approximately.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = sessions.profiled([], Path(folder))
        after = sessions.profiled(sessions.replaceable, Path(folder))
        for _ in _rounds(seconds, _MAX_PROFILED_ROUNDS):
            for each in feeds:
                before.run(None, each)
                for num_threads in threads:
                    sessions.set_num_threads(dict.fromkeys(sessions.replaceable, num_threads))
                    for _ in range(2):  # the first run prepares the second, which counts
                        after.run(None, each)
        profiles = [node_times(session) for session in (before, after)]
    step = 2 * len(threads)
    times = _fastest(profiles[0], len(feeds))
    fused = {each: _fastest(profiles[1][2 * index + 1 :: step], len(feeds)) for index, each in enumerate(threads)}
    results = {}
    for number, time in times.items():
        candidates = {each: fused[each][number] for each in threads if number in sessions.replaceable}
        best = min(candidates, key=candidates.__getitem__, default=1)
        results[number] = NodeTimes(time, candidates.get(best), best)
    return results


def _fastest(runs: Sequence[dict[int, float]], num_feeds: int) -> dict[int, float]:
    """The fastest run of each node, summed over feeds. Other work on the machine can only make a node slower."""
    totals: dict[int, float] = {}
    for first in range(num_feeds):
        of_feeds = _without_warm_up(runs[first::num_feeds])
        for number in {number for run in of_feeds for number in run}:
            totals[number] = totals.get(number, 0.0) + min(run[number] for run in of_feeds if number in run)
    return totals


class Times(NamedTuple):
    """The times of a session.

    Attributes:
        median: The median seconds of a run; with several feeds, of one run of each.
        fastest: The seconds of the fastest run.
        relative: The median of the ratio to the first session's run in the same round, since other work on the machine
            mostly slows down both.
    """

    median: float
    fastest: float
    relative: float


def compare(sessions: Sequence[Any], feeds: Sequence[Feeds], seconds: float) -> list[Times]:
    """The times of each session, measured in alternation for about that many seconds."""
    turns, rounds = list(enumerate(sessions)), list[list[float]]()
    for _ in _rounds(seconds):
        times = [0.0] * len(sessions)
        for each in feeds:
            for number, session in turns:
                start = perf_counter()
                session.run(None, each)
                times[number] += perf_counter() - start
        turns.append(turns.pop(0))  # so that each session is sometimes the first
        rounds.append(times)
    counted = _without_warm_up(rounds)
    return [
        Times(median(of_session), min(of_session), median(times[number] / times[0] for times in counted))
        for number, of_session in enumerate(zip(*counted, strict=True))
    ]


def pays(before: Times, after: Times, saved: float) -> bool:
    """Whether replaced nodes make a model faster.

    Both the typical and the fastest run must be faster, and the nodes themselves must save enough time to explain this,
    because on a busy machine even two equal sessions differ.

    Args:
        before: The times of ONNX Runtime alone, the first session of a comparison.
        after: The times with replaced nodes.
        saved: The seconds that the nodes save.
    """
    limit = 1 - _MIN_GAIN
    is_faster = after.relative <= limit and after.fastest <= limit * before.fastest
    return is_faster and saved >= _MIN_GAIN * before.fastest
