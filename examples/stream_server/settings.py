"""The settings of the network that is served."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, Streams

CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Settings:
    """Sizes of the network. Its parameters are random, since the example does not use its results.

    Raises:
        ValueError: If an option is invalid; the message names the option, its value and what was expected.
    """

    cell: str = "gru"
    features: int = 128
    """The number of features of a frame."""
    hidden: int = 128
    """The hidden units of each layer."""
    layers: int = 2
    capacity: int = 1000
    """The most streams at a time."""

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"--cell must be one of {', '.join(CELLS)}; got {self.cell!r}")
        for name in ("features", "hidden", "layers", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; got {getattr(self, name)}")

    def streams(self) -> Streams:
        """The network with free slots for all streams."""
        spec = RNNSpec(self.cell, self.features, self.hidden, self.layers)
        return RNNOp.get(spec).streams(fusedrnn.init_params(spec, np.random.default_rng(0)), self.capacity)
