"""Scratch memory that is declared once: plans take offsets from a declaration, kernels the fields of a struct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_CACHE_LINE = 64


def round_up_to_cache_line(size: int) -> int:
    """Round a size up to whole cache lines."""
    return -(-size // _CACHE_LINE) * _CACHE_LINE


def pad_against_conflicts(size: int) -> int:
    """Round a row's size up to an odd number of cache lines, so that rows do not all map to the same cache sets."""
    return (-(-size // _CACHE_LINE) | 1) * _CACHE_LINE


class Arena:
    """A piece of memory that consists of regions, each from a cache line on.

    Args:
        stride: The name of its size, by which copies of it follow one another.
        regions: The size of each region: a function of the sizes of a plan, see
            :mod:`fusedrnn.engines.cpu.plan.plans`.
    """

    def __init__(self, stride: str, **regions: Callable[[Any], int]) -> None:
        self._regions = regions
        self.names = tuple(regions)
        self.fields = (*(f"{name}_offset" for name in regions), stride)

    def place(self, sizes: Any) -> list[int]:
        """The offsets of the regions, then the size."""
        offsets = [0]
        for size in self._regions.values():
            offsets.append(offsets[-1] + round_up_to_cache_line(size(sizes)))
        return offsets

    def size(self, sizes: Any) -> int:
        """Bytes of the arena."""
        return self.place(sizes)[-1]


class ScratchLayout(NamedTuple):
    """The scratch of a plan.

    Attributes:
        offsets: The offset in the workspace of each of its regions.
        fields: The values of the other fields of the kernels' struct.
        zeroed: Bytes at the start of the workspace that must be zero when a call begins.
        size: Bytes of the workspace.
    """

    offsets: Mapping[str, int]
    fields: Mapping[str, int]
    zeroed: int
    size: int


class Scratch:
    """The scratch of a kernel: a workspace, arenas of which it holds one or several, and strides within these.

    The workspace begins with the barriers and the progress of layers, which must be zero.

    Attributes:
        fields: The struct's fields: pointers to the workspace's regions, offsets and sizes of the arenas, strides.
    """

    def __init__(self, workspace: Arena, *arenas: Arena, strides: tuple[str, ...]) -> None:
        self._workspace, self._arenas, self._strides = workspace, arenas, strides
        self.fields = (*workspace.names, *(name for arena in arenas for name in arena.fields), *strides)

    def lay_out(self, sizes: Any) -> ScratchLayout:
        """Place everything for the sizes of a plan."""
        *offsets, size = self._workspace.place(sizes)
        fields = {stride: getattr(sizes, stride) for stride in self._strides}
        for arena in self._arenas:
            fields.update(zip(arena.fields, arena.place(sizes), strict=True))
        return ScratchLayout(dict(zip(self._workspace.names, offsets, strict=True)), fields, offsets[2], size)
