"""Who is drawn in what colour: ours in blue, as nobody else."""

from __future__ import annotations

from collections.abc import Iterable

from fusedrnn.bench.computed import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.ranking import OURS

INK = "#010203"
"""Of axes and text: black to the eye, and found again by who embeds a drawing in a page that may be dark."""

PAPER = "#fdfeff"
"""Around text that stands on something: white, and found again in the same way."""

_KNOWN = {
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
    IN_TORCH: "#54aeff",
    UNPACKED: "#b6e3ff",
}
_OTHERS = ("#d58ab5", "#86b06a", "#6f7d95", "#b5b04e", "#a8618c", "#5f8f5a")


def drawing_order(contenders: Iterable[str]) -> list[str]:
    """Each once: the known others, then the unknown ones as they come, ours in the end."""
    found = dict.fromkeys(contenders)
    known = [who for who in _KNOWN if who in found]
    unknown = [who for who in found if who not in _KNOWN]
    return [*(who for who in known if who not in OURS), *unknown, *(who for who in known if who in OURS)]


def colours(contenders: Iterable[str]) -> dict[str, str]:
    """A colour for each, in the order in which they are drawn: fixed for known ones, from a cycle for others."""
    order = drawing_order(contenders)
    unknown = [who for who in order if who not in _KNOWN]
    return {who: _KNOWN.get(who) or _OTHERS[unknown.index(who) % len(_OTHERS)] for who in order}
