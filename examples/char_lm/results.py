"""The measurements: runs, their comparison, and both as data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

from examples.char_lm.settings import Settings
from examples.char_lm.text import Corpus
from fusedrnn.bench.report import environment_report


class Step(NamedTuple):
    """One update of the parameters."""

    bits: float
    """The loss before the update, bits per character."""
    seconds: float
    """The duration of the step in seconds."""
    elapsed: float
    """Seconds from the start of the training to the end of the step."""


@dataclass
class Run:
    """The training of one contender, up to where it stopped."""

    name: str
    steps: list[Step] = field(default_factory=list)
    held_out: float | None = None
    """The final loss on the held-out text, bits per character; None if the run stopped earlier."""

    @property
    def median(self) -> float:
        """The median seconds of a step. A short disturbance of the machine does not change the median."""
        return median(step.seconds for step in self.steps)

    @property
    def total(self) -> float:
        """Seconds of the training from start to end."""
        return self.steps[-1].elapsed


@dataclass
class Results:
    """The runs of the example, and the sampled text."""

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
        """The two runs to compare, or None if fewer than two were measured."""
        measured = self.measured
        return (measured[0], measured[1]) if len(measured) == 2 else None

    def rate(self, run: Run) -> float:
        """Characters per second of the median step."""
        return self.settings.tokens / run.median

    @property
    def differences(self) -> list[float]:
        """The distance between the loss curves, in bits per character, at each step that both runs took."""
        if not self.pair:
            return []
        return [abs(a.bits - b.bits) for a, b in zip(self.pair[0].steps, self.pair[1].steps, strict=False)]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as the first run the second is: by median step, and in total if both took all."""
        if not self.pair:
            return {}
        first, second = self.pair
        ratios = {"median_step": first.median / second.median}
        if len(first.steps) == len(second.steps):
            ratios["end_to_end"] = first.total / second.total
        return ratios


def report(results: Results, corpus: Corpus) -> dict[str, Any]:
    """Every figure, ready for JSON. Losses are in bits per character, times in seconds."""
    return {
        "machine": environment_report() | {"threads": results.settings.threads},
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
                "at": [step.elapsed for step in run.steps],
            }
            for run in results.measured
        },
        "fused_over_torch": results.ratios,
        "largest_difference": max(results.differences, default=None),
        "sample": results.sample,
    }
