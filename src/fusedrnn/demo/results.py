"""What was measured: runs, how they compare, and both as data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

from fusedrnn.bench.facts import machine
from fusedrnn.demo.settings import Settings
from fusedrnn.demo.text import Corpus


class Step(NamedTuple):
    """One update of the parameters."""

    bits: float
    """The loss before it, bits per character."""
    seconds: float
    """What it took."""
    at: float
    """When it was done, in seconds since training began."""


@dataclass
class Run:
    """One contender's training, as far as it came."""

    name: str
    steps: list[Step] = field(default_factory=list)
    held_out: float | None = None
    """The loss on the held-out text in the end, bits per character; None if it did not come to that."""

    @property
    def median(self) -> float:
        """Seconds of a step: a moment in which the machine did something else does not decide."""
        return median(step.seconds for step in self.steps)

    @property
    def total(self) -> float:
        """Seconds of the training from its beginning to its end."""
        return self.steps[-1].at


@dataclass
class Results:
    """What all runs of the demo gave; only those that took a step count."""

    settings: Settings
    runs: list[Run] = field(default_factory=list)
    sample: str | None = None
    interrupted: bool = False

    @property
    def measured(self) -> list[Run]:
        """The runs with at least one step."""
        return [run for run in self.runs if run.steps]

    @property
    def pair(self) -> tuple[Run, Run] | None:
        """The two runs to compare, if there are two."""
        measured = self.measured
        return (measured[0], measured[1]) if len(measured) == 2 else None

    def rate(self, run: Run) -> float:
        """Characters a second, by the median step."""
        return self.settings.tokens / run.median

    @property
    def differences(self) -> list[float]:
        """How far the loss curves are apart, bits per character, at each step that both took."""
        if not self.pair:
            return []
        return [abs(a.bits - b.bits) for a, b in zip(self.pair[0].steps, self.pair[1].steps, strict=False)]

    @property
    def ratios(self) -> dict[str, float]:
        """The second run's speed over the first's: by the median step, and end to end if both came to the end."""
        if not self.pair:
            return {}
        first, second = self.pair
        found = {"median_step": first.median / second.median}
        if len(first.steps) == len(second.steps):
            found["end_to_end"] = first.total / second.total
        return found


def report(results: Results, corpus: Corpus) -> dict[str, Any]:
    """Every figure, ready for JSON. Losses are in bits per character, times in seconds."""
    return {
        "machine": machine() | {"threads": results.settings.threads},
        "settings": asdict(results.settings),
        "text": {
            "name": corpus.name,
            "train": len(corpus.train),
            "held_out": len(corpus.held_out),
            "alphabet": corpus.alphabet,
        },
        "interrupted": results.interrupted,
        "runs": {
            run.name: {
                "tokens_per_second": results.rate(run),
                "median_step": run.median,
                "end_to_end": run.total,
                "held_out": run.held_out,
                "bits": [step.bits for step in run.steps],
                "seconds": [step.seconds for step in run.steps],
                "at": [step.at for step in run.steps],
            }
            for run in results.measured
        },
        "fused_over_torch": results.ratios,
        "largest_difference": max(results.differences, default=None),
        "sample": results.sample,
    }
