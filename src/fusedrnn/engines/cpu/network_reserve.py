"""What a training call of a network saves for its backward: the reserves of its layers in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import Weights
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.cpu.weights.cache import PackedWeights
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.runtime.buffers import Lease


@dataclass(frozen=True)
class NetworkReserveLayout:
    """The reserves of the layers, one after the other.

    Attributes:
        layers: The layout of each reserve.
        offsets: Where each reserve begins.
        size: Bytes of all reserves.
    """

    layers: tuple[ReserveLayout, ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(
        cls, tilings: Sequence[Tiling], steps: int, batch: int, save: SavePolicy, resets: bool
    ) -> NetworkReserveLayout:
        """The layout for T steps of N sequences; ``tilings`` are those of the layers."""
        layers = tuple(ReserveLayout.of(tiling, steps, batch, save, resets) for tiling in tilings)
        *offsets, size = accumulate((layer.size for layer in layers), initial=0)
        return cls(layers, tuple(offsets), size)


@dataclass(frozen=True, eq=False)
class NetworkResiduals:
    """What a training call saves; ``weights`` and ``seeds`` have an entry for each layer."""

    layout: NetworkReserveLayout
    seeds: tuple[int, ...]
    varlen: VarLen | None
    resets: Array | None
    lease: Lease
    weights: tuple[Weights | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the reserve; weights are shared with other calls and do not count."""
        return self.layout.size


def are_packed(weights: Sequence[Weights | None]) -> tuple[bool, ...]:
    """Whether the weights of each layer are packed."""
    return tuple([isinstance(layer, PackedWeights) for layer in weights])


def weights_addresses(weights: Sequence[Weights | None]) -> tuple[int, ...]:
    """The address of each layer's packed weights, or of its first parameter if they are unpacked; 0 for None."""
    return tuple([0 if layer is None else layer.address or layer.matrices[0] for layer in weights])
