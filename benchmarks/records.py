"""Reads the JSON of a benchmark, from ``fusedrnn bench --json`` or ``python -m benchmarks.compare --json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedrnn.bench.data import FUSED, IN_FORMAT, IN_TORCH, OURS

COMPARED = (*IN_FORMAT.values(), IN_TORCH)
"""Our contenders that run the same workload as the others. Unpacked sequences are another workload."""


@dataclass(frozen=True)
class Record:
    """One row of a benchmark.

    Attributes:
        case, mode, phase: The workload.
        seconds: Median seconds of a call, by contender.
        gflops: Useful work per second, by contender.
        data: The row as stored in the file.
        revisions: Contenders that are earlier revisions of fusedrnn.
    """

    case: str
    mode: str
    phase: str
    seconds: Mapping[str, float]
    gflops: Mapping[str, float]
    data: Mapping[str, Any]
    revisions: frozenset[str] = frozenset()

    @classmethod
    def of(cls, data: Mapping[str, Any], revisions: frozenset[str]) -> Record:
        """The record of a row in the file. Instead of its case and its seconds, a row may have a name and medians."""
        case = data["case"] if isinstance(data["case"], str) else data["case"]["name"]
        seconds = {
            name: timing["median"] if isinstance(timing, Mapping) else timing
            for name, timing in data["seconds"].items()
        }
        return cls(case, data["mode"], data["phase"], seconds, data.get("gflops", {}), data, revisions)

    @property
    def wrong(self) -> str | None:
        """A text that says what is wrong with a result."""
        return self.data.get("wrong")

    @property
    def peak(self) -> float | None:
        """The FMA peak in GFLOP/s."""
        return self.data.get("peak")

    @property
    def packed(self) -> bool:
        """Whether the sequences have different lengths."""
        return bool(self.data.get("lengths"))

    @property
    def intensity(self) -> float:
        """The arithmetic intensity: useful floating-point operations for each byte that must be moved."""
        intensity: float = self.data["flops"] / self.data["least_bytes"]
        return intensity

    @property
    def ours(self) -> str | None:
        """The contender that represents fusedrnn: the operator, the PyTorch modules, or the first engine."""
        names = (FUSED, IN_TORCH, *self.seconds)
        return next((name for name in names if name in self.seconds), None)

    @property
    def best_other(self) -> str | None:
        """The fastest contender that is not ours, in the format of :attr:`ours`."""
        return self.best_other_of(self.ours) if self.ours else None

    def best_other_of(self, contender: str) -> str | None:
        """The fastest contender that is not ours, in the same format of operands.

        A revision of fusedrnn counts only if there is no other contender.
        """
        formats = self.data.get("formats", {})
        same_format = [name for name in self.seconds if formats.get(name) == formats.get(contender)]
        others = [name for name in same_format if name not in OURS]
        libraries = [name for name in others if name not in self.revisions]
        return min(libraries or others, key=lambda name: self.seconds[name], default=None)

    def over_float32(self, name: str) -> float | None:
        """How many times as fast as in float32 the operator is in another format; None for other contenders."""
        ratio: float | None = self.data.get("over_float32", {}).get(name)
        return None if name == FUSED else ratio

    def over_best(self, name: str) -> float | None:
        """How many times as fast as the best other contender in its format our contender is."""
        if name not in self.seconds or name not in COMPARED:
            return None
        best = self.best_other_of(name)
        return self.seconds[best] / self.seconds[name] if best else None


@dataclass(frozen=True)
class Benchmark:
    """A whole file.

    Attributes:
        records: Its rows.
        bandwidth: GB/s by level.
        data: The content of the file.
    """

    records: Sequence[Record]
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def by_case(self) -> dict[str, list[Record]]:
        """The records of each case, in the order of the file."""
        cases: dict[str, list[Record]] = {}
        for record in self.records:
            cases.setdefault(record.case, []).append(record)
        return cases


def load(path: Path) -> Benchmark:
    """Read a file.

    Raises:
        ValueError: If it is not the JSON of a benchmark.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a file of `fusedrnn bench --json`") from None


def parse(data: Mapping[str, Any]) -> Benchmark:
    """The benchmark in parsed JSON."""
    revisions = frozenset(data.get("plan", {}).get("revisions", ()))
    records = [Record.of(row, revisions) for row in data["rows"]]
    return Benchmark(records, data.get("bandwidth") or {}, data)
