"""A figure as markup inside a page: no file of its own, and in the page's colours, light or dark."""

from __future__ import annotations

import re
from io import StringIO

import matplotlib
from matplotlib.figure import Figure

from fusedrnn.bench.plots.colours import INK, PAPER

_DATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def markup(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an ``<svg>`` element that refers to nothing outside itself.

    ``prefix``, letters and digits, keeps its ids apart from those of other figures in the page; ``description``, plain
    words without markup, is for those who cannot see it. Axes and text take the page's ``color``, what stands behind
    text its ``--paper``.
    """
    written = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusedrnn"}):
        figure.savefig(written, format="svg", transparent=True, metadata=_DATA)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace(' id="', f' id="{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace('xlink:href="#', f'href="#{prefix}-')
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1).strip()
