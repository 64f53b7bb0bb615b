"""What a benchmark is to run, and its rows: what was run, and what it took."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.peaks import refusal, share_of
from fusedrnn.bench.peers.revision import Revision
from fusedrnn.bench.timing import Timing
from fusedrnn.testing.cases import Case

Array = NDArray[Any]


@dataclass(frozen=True)
class Plan:
    """What to run: every case with every mode in every phase, in that order."""

    cases: Sequence[Case]
    modes: Sequence[str]
    phases: Sequence[Phase]
    dtype: str = "float32"
    threads: int = 1
    torch: bool = False
    """Whether torch.nn's modules take part, as they are and accelerated."""
    only_torch: bool = False
    """Whether they alone do."""
    packed: bool = False
    """The same on packed sequences, with the accelerated module on unpacked ones beside them."""
    peers: Sequence[str] = ()
    """Other libraries, each in a process of its own, that the operator alone is compared with."""
    revisions: Sequence[Revision] = ()
    """Of ourselves, in the same way."""
    backends: Sequence[str] = ()
    """Engines of the operator, which are compared with each other alone."""
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    full: bool = False
    """Whether the network cell by cell runs all steps, however long it takes."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """What every row is of, in their order."""
        return list(itertools.product(self.cases, self.modes, self.phases))

    def contenders(self) -> tuple[str, ...]:
        """Names of those compared, in the order of their turns."""
        if self.backends:
            return tuple(self.backends)
        if self.peers or self.revisions:
            return FUSED, *self.peers, *(revision.name for revision in self.revisions)
        if self.packed:
            return TORCH, IN_TORCH, UNPACKED
        if self.only_torch:
            return TORCH, IN_TORCH
        return (NON_FUSED, FUSED, TORCH, IN_TORCH) if self.torch else (NON_FUSED, FUSED)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: what was run, and either what it took or what was wrong with it."""

    case: Case
    mode: str
    phase: str
    dtype: str
    threads: int
    flops: int
    """Useful operations of a call: of the steps that count, if sequences are packed."""
    peak: float | None = None
    """GFLOP/s of fused multiply-adds on these threads, the best that the run has measured by then."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    """Of a call of all steps."""
    wrong: str | None = None
    lengths: tuple[int, ...] | None = None
    """Of packed sequences."""
    peers: tuple[str, ...] = ()
    """Other libraries that were asked for; those in ``timings`` were right."""
    revisions: tuple[str, ...] = ()
    """The same of ourselves."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why the others of them, or of the engines, have no timing."""
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What each of them ran on."""
    backends: tuple[str, ...] = ()
    """Engines that were asked for; those in ``timings`` were right."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """How many of the steps were run of those whose timing is told from the first steps."""

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}{' packed' if self.lengths else ''}"

    @property
    def ours(self) -> str:
        """Whose figures stand for ours: the operator's, on the first engine that ran; or the modules' alone."""
        if self.backends:
            return next((name for name in self.backends if name in self.timings), FUSED)
        return IN_TORCH if IN_TORCH in self.timings and FUSED not in self.timings else FUSED

    def rate(self, who: str) -> float:
        """Samples, which are sequences, a second."""
        return self.case.N / self.timings[who].median

    def ratio(self, over: str, who: str | None = None) -> float:
        """How many times one of ours is as fast as another contender."""
        return self.timings[over].median / self.timings[who or self.ours].median

    def gflops(self, who: str | None = None) -> float:
        """Useful work done a second."""
        flops = self.flops
        if who == UNPACKED and self.lengths:
            flops = flops * self.case.T * self.case.N // sum(self.lengths)
        return flops / self.timings[who or self.ours].median / 1e9

    def share(self, who: str | None = None) -> float | None:
        """The part of the peak that one of ours reaches; None if nothing was measured, or if it is refused."""
        return share_of(self.gflops(who), self.peak) if self.peak else None

    @property
    def refused(self) -> dict[str, str]:
        """Those whose share comes out above 1, so that they have none, and why."""
        reasons = {who: refusal(self.gflops(who), self.peak) for who in self.timings}
        return {who: reason for who, reason in reasons.items() if reason}

    @property
    def best_peer(self) -> str | None:
        """The fastest of the other libraries, None if none was timed."""
        timed = [who for who in self.peers if who in self.timings]
        return min(timed, key=lambda who: self.timings[who].median, default=None)

    def over_best_peer(self) -> float | None:
        """How many times ours is as fast as the fastest of the other libraries."""
        best = self.best_peer
        return None if best is None or FUSED not in self.timings else self.ratio(best)

    def of_unpacked(self) -> float:
        """Useful work a second on packed sequences, as a part of that on unpacked ones."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)
