"""The configuration of a benchmark, and its rows: one workload in one phase with the times of all contenders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, UNPACKED, Array, Workload
from fusedrnn.bench.timing import PAUSE, Timing
from fusedrnn.testing.cases import Case

MEASUREMENTS = 3
"""Number of times that a row is measured at most if its share of the peak is above 100 %."""


@dataclass(frozen=True)
class BenchConfig:
    """What to run: every case with every mode in every phase, in that order."""

    cases: Sequence[Case]
    modes: Sequence[str]
    phases: Sequence[Phase]
    dtype: str = "float32"
    threads: int = 1
    contenders: Sequence[str] = (NON_FUSED, FUSED)
    """Their names, in the order of their turns. With unpacked sequences among them, the others run packed ones."""
    engines: bool = False
    """The contenders are engines of the operator."""
    variants: bool = False
    """The contenders are the variants of each cell."""
    budget: float = 5.0
    """Seconds to spend on timing a row, if its calls are short enough."""
    full: bool = False
    """Run all steps of the non-fused network, however long that takes."""
    data: Array | None = None
    """The user's input (T, N, I), whose shape the cases have; None for text."""
    pause: float = PAUSE
    """Seconds of rest before each turn, except where only PyTorch modules take turns."""

    def rows(self) -> list[tuple[Case, str, Phase]]:
        """Case, mode and phase of each row."""
        return list(itertools.product(self.cases, self.modes, self.phases))


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
    flops_of: Mapping[str, int] = field(default_factory=dict)
    """Like ``flops``, for contenders whose network or sequences differ from those of the row."""

    @classmethod
    def of(cls: type[AnyRow], config: BenchConfig, work: Workload, phase: Phase, **fields: Any) -> AnyRow:
        """The row of a workload, before it is timed."""
        lengths = None if work.lengths is None else tuple(map(int, work.lengths))
        flops = work.flops(training=phase.training)
        backends = tuple(config.contenders) if config.engines else ()
        sizes = work.case, work.spec.mode, phase.name, config.dtype, config.threads, flops
        return cls(*sizes, lengths=lengths, backends=backends, **fields)

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
        name = contender or self.ours
        return self.flops_of.get(name, self.flops) / self.timings[name].median / 1e9

    def share(self, contender: str | None = None) -> float | None:
        """The share of the peak that a contender reaches; None if there is no peak or the share is above 1."""
        if not self.peak:
            return None
        share = self.gflops(contender) / self.peak
        return share if share <= 1.0 else None

    @property
    def rejected_shares(self) -> dict[str, str]:
        """The reason for each contender whose share of the peak is rejected because it is above 1."""
        return {
            name: f"no share of the FMA peak: {self.gflops(name):.1f} GFLOP/s are above the {self.peak:.1f} GFLOP/s "
            f"measured as the peak, in {MEASUREMENTS} measurements"
            for name in self.timings
            if self.peak and self.share(name) is None
        }

    def packed_over_unpacked(self) -> float:
        """Useful work per second on packed sequences, relative to unpacked ones."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)
