"""The configuration of a benchmark, and its rows: a workload in a phase, with the times of all contenders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fusedrnn.arrays import Array
from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, UNPACKED, Workload
from fusedrnn.bench.timing import PAUSE, Timing
from fusedrnn.cell.cells import Cell
from fusedrnn.testing.cases import Case

MEASUREMENTS = 3
"""The most times that a row is measured if its share of the peak is above 100 %."""


@dataclass(frozen=True)
class BenchConfig:
    """What to run: every case with every mode in every phase, in that order."""

    cases: Sequence[Case]
    modes: Sequence[str | Cell]
    phases: Sequence[Phase]
    dtype: str = "float32"
    threads: int = 1
    contenders: Sequence[str] = (NON_FUSED, FUSED)
    """Names of contenders, in the order of their turns. If one runs unpacked sequences, the others run packed ones."""
    engines: bool = False
    """Whether the contenders are engines of the operator."""
    variants: bool = False
    """Whether the contenders are the variants of each cell."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """The format of GEMM operands by contender, if the contenders are the operator in several formats."""
    budget: float = 5.0
    """The seconds for timing a row, if its calls are short enough."""
    full: bool = False
    """Whether to run all steps of the non-fused network, even if it is slow."""
    data: Array | None = None
    """The user's input (T, N, I), with the same sizes as the cases; None for text."""
    pause: float = PAUSE
    """Seconds of rest before each turn, except if only PyTorch modules take turns."""

    def rows(self) -> list[tuple[Case, str | Cell, Phase]]:
        """Case, mode and phase of each row."""
        return list(itertools.product(self.cases, self.modes, self.phases))


AnyRow = TypeVar("AnyRow", bound="Row")


@dataclass(frozen=True)
class Row:
    """A workload in a phase, with the times of the contenders, or with a text on a wrong result."""

    case: Case
    mode: str
    phase: str
    dtype: str
    threads: int
    flops: int
    """Useful floating-point operations of a call; padding does not count."""
    peak: float | None = None
    """The peak: GFLOP/s of fused multiply-adds on these threads, the best that the run has measured so far."""
    timings: Mapping[str, Timing] = field(default_factory=dict)
    """Times of a call of all steps, by contender. Their results are right."""
    wrong: str | None = None
    """A text that says which result is wrong, and how."""
    lengths: tuple[int, ...] | None = None
    """The lengths of packed sequences; None if sequences are not packed."""
    backends: tuple[str, ...] = ()
    """Engines to compare."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a contender has no timing, by contender."""
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Package versions of contenders in other processes."""
    steps_run: Mapping[str, int] = field(default_factory=dict)
    """By contender whose time is extrapolated from its first steps, the number of these steps."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """The format of GEMM operands, for contenders whose format differs from the dtype."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """Like ``peak``, by format of GEMM operands, without the dtype."""
    flops_of: Mapping[str, int] = field(default_factory=dict)
    """Like ``flops``, for contenders whose network or sequences differ from those of the row."""
    cell: Cell | None = None
    """The cell that ``mode`` names, if it is a user cell."""

    @classmethod
    def of(cls: type[AnyRow], config: BenchConfig, work: Workload, phase: Phase, **fields: Any) -> AnyRow:
        """The row of a workload, before it is timed."""
        lengths = None if work.lengths is None else tuple(map(int, work.lengths))
        flops = work.flops(training=phase.training)
        backends = tuple(config.contenders) if config.engines else ()
        sizes = work.case, work.spec.mode_name, phase.name, config.dtype, config.threads, flops
        cell = work.spec.mode if isinstance(work.spec.mode, Cell) else None
        return cls(*sizes, lengths=lengths, backends=backends, cell=cell, **{"formats": config.formats, **fields})

    @property
    def name(self) -> str:
        """Case, mode and phase."""
        return f"{self.case.name} {self.mode} {self.phase}{' packed' if self.lengths else ''}"

    @property
    def is_wrong(self) -> bool:
        """Whether a contender has a wrong result."""
        return self.wrong is not None or any(reason.startswith("wrong") for reason in self.failures.values())

    @property
    def ours(self) -> str:
        """The contender that represents fusedrnn: the operator, the first engine or format that ran, or the modules."""
        if self.backends:
            return next((name for name in self.backends if name in self.timings), FUSED)
        if self.formats and FUSED not in self.timings:
            return next(iter(self.timings), FUSED)
        return IN_TORCH if IN_TORCH in self.timings and FUSED not in self.timings else FUSED

    def rate(self, contender: str) -> float:
        """Samples per second, where a sample is a sequence."""
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
        peak = self.peak_of(contender or self.ours)
        if not peak:
            return None
        share = self.gflops(contender) / peak
        return share if share <= 1.0 else None

    def peak_of(self, contender: str) -> float | None:
        """The peak of the format of a contender's GEMM operands."""
        return self.peaks.get(self.formats.get(contender, self.dtype), self.peak)

    @property
    def rejected_shares(self) -> dict[str, str]:
        """By contender whose share of the peak is rejected because it is above 1, the reason."""
        return {
            name: f"no share of the {self.peak_name(name)}: {self.gflops(name):.1f} GFLOP/s are above the {peak:.1f} "
            f"GFLOP/s measured as the peak, in {MEASUREMENTS} measurements"
            for name in self.timings
            if (peak := self.peak_of(name)) and self.share(name) is None
        }

    def peak_name(self, contender: str) -> str:
        """The name of a contender's peak."""
        number_format = self.formats.get(contender, self.dtype)
        return "FMA peak" if number_format == self.dtype else f"peak of {number_format}"

    def over_float32(self, contender: str) -> float | None:
        """How many times as fast as the operator in float32 a contender is; None if float32 has no time."""
        return self.ratio(FUSED, contender) if {FUSED, contender} <= self.timings.keys() else None

    def packed_over_unpacked(self) -> float:
        """Useful work per second on packed sequences, relative to that on unpacked sequences."""
        return self.gflops(IN_TORCH) / self.gflops(UNPACKED)
