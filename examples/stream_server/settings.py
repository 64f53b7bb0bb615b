"""The settings of the network that is served."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

import fusedrnn
from fusedrnn import NetworkOp, NetworkSpec, RNNOp, RNNSpec, Streams
from fusedrnn.cell.cells import Cell
from fusedrnn.cli.cells import load_cell
from fusedrnn.cli.options import parse_sizes

CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu")
_LAYERS = 2


@dataclass(frozen=True)
class Settings:
    """The network and its streams. Its parameters are random, since the example does not use its results.

    Raises:
        ValueError: If an option is invalid; the message names the option, its value and what was expected.
    """

    cell: str = "gru"
    """One of :data:`CELLS`, or ``path.py:name`` or ``module:name`` of a cell that a user has written."""
    features: int = 128
    """The number of features of a frame."""
    hidden: tuple[int, ...] = (128,) * _LAYERS
    """The hidden units of each layer."""
    residual: str | None = None
    """What layers add to their output, as in :meth:`NetworkSpec.stack`."""
    capacity: int = 1000
    """The most streams at a time."""

    def __post_init__(self) -> None:
        for name in ("features", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more; got {getattr(self, name)}")
        try:
            _ = self.op
        except NotImplementedError as error:  # of a cell that no engine runs in these sizes
            raise ValueError(f"--cell {self.cell}: {error}") from None

    @classmethod
    def parse(
        cls, cell: str, features: int, hidden: str, layers: int | None, residual: str | None, capacity: int
    ) -> Settings:
        """The settings that options describe. ``hidden`` is a number for all layers, or has one for each.

        Raises:
            ValueError: If an option is invalid; the message names it.
        """
        sizes = parse_sizes("--hidden", hidden)
        if not sizes:
            raise ValueError(f"--hidden must be a number, or one for each layer, separated by commas; got {hidden!r}")
        if len(sizes) > 1 and layers is not None:
            raise ValueError(
                f"--layers needs a single number of hidden units; got --layers {layers} with --hidden {hidden}"
            )
        if len(sizes) == 1:
            sizes *= _LAYERS if layers is None else layers
        return cls(cell, features, tuple(sizes), residual, capacity)

    def options(self) -> list[str]:
        """The options of a command with these settings."""
        options = ["--cell", self.cell, "--features", str(self.features), "--capacity", str(self.capacity)]
        options += ["--hidden", ",".join(map(str, self.hidden))]
        return options if self.residual is None else [*options, "--residual", self.residual]

    @cached_property
    def spec(self) -> RNNSpec | NetworkSpec:
        """The network: an RNNSpec if all layers are alike."""
        cell = _checked_cell(self.cell)
        try:
            network = NetworkSpec.stack(cell, self.features, self.hidden, residual=self.residual)
        except ValueError as error:
            raise ValueError(f"--cell {self.cell}: {error}") from None
        return network if len(network.layers) > 1 else network.layers[0]

    @property
    def op(self) -> RNNOp | NetworkOp:
        """The operator of the network."""
        spec = self.spec
        return NetworkOp.get(spec) if isinstance(spec, NetworkSpec) else RNNOp.get(spec)

    def streams(self) -> Streams:
        """The network with free slots for all streams."""
        return self.op.streams(fusedrnn.init_params(self.spec, np.random.default_rng(0)), self.capacity)


def _checked_cell(name: str) -> str | Cell:
    """The mode of that name, or the user's cell."""
    if ":" in name:
        return load_cell(name)
    if name not in CELLS:
        raise ValueError(f"--cell must be one of {', '.join(CELLS)}, or path.py:name or module:name; got {name!r}")
    return name
