"""The named workloads that benchmarks and tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedrnn.cell.cells import Cell
from fusedrnn.spec import RNNSpec

ODD_SIZES = (1, 2, 3, 17, 63, 100, 129)
"""Values of T, N, I and H at and next to the sizes of vectors and tiles."""


@dataclass(frozen=True)
class Case:
    """A workload: T steps of N sequences of I features, ``layers`` layers of H units; ``who`` names a typical use."""

    name: str
    T: int
    N: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    who: str = ""

    def spec(self, mode: str | Cell, dtype: str = "float32") -> RNNSpec:
        """The network of this case with the cell ``mode``."""
        return RNNSpec(mode, self.I, self.H, self.layers, self.bidirectional, dtype=dtype)

    def at(self, T: int, N: int, I: int, H: int | None = None) -> Case:
        """The same network on an input of shape (T, N, I); with ``H`` with so many units."""
        return replace(self, T=T, N=N, I=I, H=H or self.H)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("ds2", 300, 20, 800, 800, who="MXNet's single-layer table"),
        Case("ds2-5bi", 300, 20, 800, 800, 5, True, who="MXNet's five-layer table"),
        Case("large", 50, 64, 1024, 1024, who="language model"),
        Case("bi2", 100, 64, 256, 256, 2, True, who="acoustic model"),
        Case("tagger", 30, 32, 300, 256, 1, True, who="sequence tagger"),
        Case("small", 50, 32, 64, 64, who="recurrent policy"),
        Case("forecaster", 60, 32, 40, 40, 2, who="time series"),
        Case("tiny", 20, 16, 16, 32, who="overheads"),
        Case("seq1", 100, 1, 256, 256, who="one utterance"),
        Case("stream1", 1, 1, 256, 256, who="streaming, one step"),
    )
}
