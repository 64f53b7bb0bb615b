"""Names beside points, none upon another: each where there is room, with a line to its point if that is far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fusedrnn.bench.plots.colours import INK

Box = NDArray[np.float64]
"""Left, bottom, right, top, in pixels; or one such row for each of several."""

_MARKER = 4.0
"""Points from the middle of a marker to where no name may reach."""

_NEAR = 6.0
"""Points from a marker's middle to its name, where there is room."""

_RING = 5.0
"""Points between one distance that is tried and the next."""

_WIDER = 1.05
"""How much wider a text may turn out at another resolution."""

_RINGS = 80
_TURNS = 16


@dataclass(frozen=True)
class Label:
    """A name for the point at ``x``, ``y``, in the units of the axes."""

    text: str
    x: float
    y: float
    colour: str = INK


def place(
    figure: Figure,
    axes: Axes,
    labels: Sequence[Label],
    fontsize: float,
    lines: Sequence[tuple[float, float]] = (),
    others: Sequence[Artist] = (),
) -> None:
    """Write the labels into axes that are otherwise finished and laid out, those in the densest crowd first.

    None covers another, nor a labelled point, nor one of ``lines``, points along whatever is drawn, nor one of the
    ``others``, nor does any leave the axes; one for which no place is found stands right beside its point nevertheless.
    """
    renderer = _renderer(figure)
    unit = figure.dpi / 72.0
    points = [_pixels(axes, label.x, label.y) for label in labels]
    taken = [_around(x, y, _MARKER * unit) for x, y in points]
    taken += [_around(*_pixels(axes, *point), unit) for point in lines]
    taken += [np.array(other.get_window_extent(renderer).extents) for other in others]
    room = np.array(axes.get_window_extent(renderer).padded(-unit).extents)

    def crowd(at: int) -> float:
        x, y = points[at]
        return sum(1.0 / (1.0 + math.hypot(x - u, y - v) / unit) for u, v in points)

    for at in sorted(range(len(labels)), key=crowd, reverse=True):
        written = axes.text(0.5, 0.5, labels[at].text, transform=axes.transAxes, fontsize=fontsize)
        extent = written.get_window_extent(renderer)
        written.remove()
        size = _WIDER * extent.width / unit, extent.height / unit
        offset, box = _free_place(points[at], size, unit, room, np.array(taken))
        taken.append(box)
        _write(axes, labels[at], offset, fontsize)


def _renderer(figure: Figure) -> RendererBase:
    """What measures texts, whatever the figure will be saved as."""
    return FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call, no-any-return]


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    return float(across), float(up)


def _free_place(
    point: tuple[float, float], size: tuple[float, float], unit: float, room: Box, taken: Box
) -> tuple[tuple[float, float], Box]:
    """The nearest free place for a text of that size in points: its offset in points, and the box it fills."""
    offsets = list(_offsets())
    for offset in offsets:
        box = _box(point, offset, size, unit)
        inside = (box[:2] >= room[:2]).all() and (box[2:] <= room[2:]).all()
        if inside and not ((box[:2] < taken[:, 2:]) & (taken[:, :2] < box[2:])).all(axis=1).any():
            return offset, box
    return offsets[0], _box(point, offsets[0], size, unit)


def _offsets() -> Iterator[tuple[float, float]]:
    """In points, from near to far, all around, beginning on the right."""
    for ring in range(_RINGS):
        distance = _NEAR + _RING * ring
        for turn in range(_TURNS):
            angle = 2 * math.pi * turn / _TURNS
            yield distance * math.cos(angle), distance * math.sin(angle)


def _side(dx: float) -> str:
    """Which end of the text is held: the one that is nearer to the point."""
    return "center" if abs(dx) < 1.0 else "left" if dx > 0 else "right"


def _box(point: tuple[float, float], offset: tuple[float, float], size: tuple[float, float], unit: float) -> Box:
    share = {"left": 0.0, "center": 0.5, "right": 1.0}[_side(offset[0])]
    left, bottom = point[0] + unit * (offset[0] - share * size[0]), point[1] + unit * (offset[1] - size[1] / 2)
    return np.array((left, bottom, left + unit * size[0], bottom + unit * size[1]))


def _around(x: float, y: float, radius: float) -> Box:
    return np.array((x - radius, y - radius, x + radius, y + radius))


def _write(axes: Axes, label: Label, offset: tuple[float, float], fontsize: float) -> None:
    far = math.hypot(*offset) > _NEAR + _RING
    line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.4, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
    axes.annotate(
        label.text,
        (label.x, label.y),
        offset,
        textcoords="offset points",
        ha=_side(offset[0]),
        va="center",
        fontsize=fontsize,
        color=label.colour,
        arrowprops=line if far else None,
        zorder=5,
    )
