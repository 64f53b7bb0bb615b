"""The configuration of a benchmark, and its rows: one workload in one phase with the times of all contenders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import Array
from fusedrnn.bench.peaks import rejection, share_of
from fusedrnn.bench.results import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.timing import Timing
from fusedrnn.testing.cases import Case


@dataclass(frozen=True)
class BenchConfig:
    """What to run: every case with every mode in every phase, in that order."""

    cases: Sequence[Case]
    modes: Sequence[str]
    phases: Sequence[Phase]
    dtype: str = "float32"
    threads: int = 1
    torch: bool = False
    """Compare with torch.nn's modules too, original and accelerated."""
    only_torch: bool = False
    """Compare those modules alone."""
    packed: bool = False
    """Compare them on packed sequences, with the accelerated module on unpacked ones as a further contender."""
    backends: Sequence[str] = ()
    """Compare these engines of the operator with each other alone."""
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    full: bool = False
    """Run all steps of the non-fused network, however long that takes."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """Case, mode and phase of each row."""
        return list(itertools.product(self.cases, self.modes, self.phases))

    def contenders(self) -> tuple[str, ...]:
        """Names of the contenders, in the order of their turns."""
        if self.backends:
            return tuple(self.backends)
        if self.packed:
            return TORCH, IN_TORCH, UNPACKED
        if self.only_torch:
            return TORCH, IN_TORCH
        return (NON_FUSED, FUSED, TORCH, IN_TORCH) if self.torch else (NON_FUSED, FUSED)


AnyRow = TypeVar("AnyRow", bound="Row")


@dataclass(frozen=True)
class Row:
    """One workload in one phase, and either the times of the contenders or what is wrong with a result."""

    case: Case
    mode: str
    phase: str
    dtype: str
    threads: int
    flops: int
    """Useful floating-point operations of a call; padding does not count."""
    peak: float | None = None
    """GFLOP/s of fused multiply-adds on these threads, the best that the run has measured so far."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    """Times of a call of all steps, by contender; they are right."""
    wrong: str | None = None
    """Which result is wrong, and how."""
    lengths: tuple[int, ...] | None = None
    """Of packed sequences."""
    backends: tuple[str, ...] = ()
    """Engines to compare."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a contender has no timing, by contender."""
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Package versions of contenders in other processes."""
    steps_run: Mapping[str, int] = field(default_factory=dict)
    """Number of steps that ran, for contenders whose time is extrapolated from their first steps."""

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}{' packed' if self.lengths else ''}"

    @property
    def ours(self) -> str:
        """The contender that stands for fusedrnn: the operator, the first engine that ran, or the modules."""
        if self.backends:
            return next((name for name in self.backends if name in self.timings), FUSED)
        return IN_TORCH if IN_TORCH in self.timings and FUSED not in self.timings else FUSED

    def rate(self, contender: str) -> float:
        """Samples, which are sequences, per second."""
        return self.case.N / self.timings[contender].median

    def ratio(self, base: str, contender: str | None = None) -> float:
        """How many times as fast as ``base`` a contender is, by default :attr:`ours`."""
        return self.timings[base].median / self.timings[contender or self.ours].median

    def gflops(self, contender: str | None = None) -> float:
        """Useful work per second of a contender, by default of :attr:`ours`."""
        flops = self.flops
        if contender == UNPACKED and self.lengths:
            flops = flops * self.case.T * self.case.N // sum(self.lengths)
        return flops / self.timings[contender or self.ours].median / 1e9

    def share(self, contender: str | None = None) -> float | None:
        """The share of the peak that a contender reaches; None if there is no peak or the share is rejected."""
        return share_of(self.gflops(contender), self.peak) if self.peak else None

    @property
    def rejected_shares(self) -> dict[str, str]:
        """The reason for each contender whose share of the peak is rejected because it is above 1."""
        reasons = {name: rejection(self.gflops(name), self.peak) for name in self.timings}
        return {name: reason for name, reason in reasons.items() if reason}

    def packed_over_unpacked(self) -> float:
        """Useful work per second on packed sequences, relative to unpacked ones."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)
