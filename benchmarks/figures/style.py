"""The common parts of all figures: names, colours, and how a figure is saved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fusedrnn.bench.data import FUSED, IN_FORMAT, IN_TORCH, NON_FUSED, OURS, TORCH, UNPACKED

MODE_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "ReLU", "rnn_tanh": "tanh"}

INK = "#010203"
"""The colour of axes and text. No other value is equal, so that it can be replaced in an SVG for dark pages."""

PAPER = "#fdfeff"
"""The colour of the background, which can be replaced in the same way."""

DARK_INK, DARK_PAPER = "#e3e8ee", "#14181d"

STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedrnn",
}
"""Settings of Matplotlib for every figure."""

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}

_KNOWN_COLOURS = {
    NON_FUSED: "#b0b7c3",
    "mxnet-cells": "#cdb79e",
    "mxnet-fused": "#94704c",
    "jax": "#d9b32b",
    "keras": "#c9504c",
    "onnxruntime": "#8f6fc9",
    "openvino": "#3b9c8c",
    TORCH: "#e8833a",
    "pytorch": "#e8833a",
    FUSED: "#1f6feb",
    IN_FORMAT["bfloat16"]: "#0a3d91",
    IN_FORMAT["int8"]: "#0b8fb8",
    IN_FORMAT["int8_weights"]: "#5b7fc7",
    IN_TORCH: "#54aeff",
    UNPACKED: "#b6e3ff",
}
"""The colours of contenders. Only ours are blue."""
_OTHER_COLOURS = ("#d58ab5", "#86b06a", "#6f7d95", "#b5b04e", "#a8618c", "#5f8f5a")


def drawing_order(contenders: Iterable[str]) -> list[str]:
    """Each contender once: first known other ones, then unknown ones, then ours."""
    names = dict.fromkeys(contenders)
    known = [name for name in _KNOWN_COLOURS if name in names]
    unknown = [name for name in names if name not in _KNOWN_COLOURS]
    return [*(name for name in known if name not in OURS), *unknown, *(name for name in known if name in OURS)]


def colours(contenders: Iterable[str]) -> dict[str, str]:
    """A colour for each contender, in drawing order: fixed for known contenders, from a cycle for unknown ones."""
    order = drawing_order(contenders)
    unknown = [name for name in order if name not in _KNOWN_COLOURS]
    cycle = {name: _OTHER_COLOURS[index % len(_OTHER_COLOURS)] for index, name in enumerate(unknown)}
    return {name: _KNOWN_COLOURS.get(name) or cycle[name] for name in order}


def formats() -> tuple[str, ...]:
    """File formats that Matplotlib can save."""
    return tuple(sorted(Figure().canvas.get_supported_filetypes()))


def save(figure: Figure, path: Path) -> None:
    """Save a figure with its background. An SVG has dark colours if the reader's system prefers them."""
    with matplotlib.rc_context(STYLE):
        if path.suffix != ".svg":
            figure.savefig(path, dpi=150, facecolor=PAPER)
            return
        text = StringIO()
        figure.savefig(text, format="svg", facecolor=PAPER, metadata=_NO_METADATA)
    rules = "".join(
        f'[style*="{attribute}: {light}"]{{{attribute}:{dark}!important}}'
        for light, dark in ((INK, DARK_INK), (PAPER, DARK_PAPER))
        for attribute in ("fill", "stroke")
    )
    style = f"<style>text{{font-family:system-ui,sans-serif}}@media(prefers-color-scheme:dark){{{rules}}}</style>"
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1{style}", text.getvalue(), count=1), encoding="utf-8")


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an ``<svg>`` element that refers to nothing outside itself, in the colours of its page.

    Args:
        figure: A figure that was drawn with :data:`STYLE`.
        prefix: Letters and digits that make its ids unique within the page.
        description: A description in plain words, for readers who cannot see the figure.
    """
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace(' id="', f' id="{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace('xlink:href="#', f'href="#{prefix}-')
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1).strip()
