"""The options of a run. They are checked once, without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

CELLS = ("gru", "lstm")


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of its training.

    The defaults give a model of realistic size that learns something within a minute on two cores.

    Raises:
        ValueError: If an option is invalid; the message names the option, its value and what was expected.
    """

    cell: str = "gru"
    hidden: int = 256
    """The hidden units of each layer, and the size of the embedding."""
    layers: int = 2
    steps: int = 300
    """The number of updates of the parameters."""
    batch: int = 32
    """The number of text streams in a batch."""
    length: int = 100
    """The characters of each stream in a step. Gradients go no further back."""
    lr: float = 4e-3
    dropout: float = 0.0
    seed: int = 0
    threads: int = 1
    sample: int = 500
    """The number of characters to generate at the end."""
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"unknown cell {self.cell!r}; valid: {', '.join(CELLS)}")
        for name in ("hidden", "layers", "steps", "batch", "length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; got {getattr(self, name)}")
        for name in ("seed", "sample"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 or more; got {getattr(self, name)}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"--lr must be above 0 and at most 1; got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be from 0 to below 1; got {self.dropout}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more and finite; got {self.temperature}")
        if self.dropout and self.layers == 1:
            raise ValueError(f"--dropout {self.dropout} acts between layers, and --layers is 1")

    @property
    def tokens(self) -> int:
        """The number of characters in a step."""
        return self.batch * self.length
