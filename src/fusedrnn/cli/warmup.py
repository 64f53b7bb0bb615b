"""``fusedrnn warmup``: compiles kernels into the cache ahead of time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import fusedrnn
from fusedrnn.cli.console import steps
from fusedrnn.cli.options import parse_modes, parse_names
from fusedrnn.spec import DTYPES

_HIDDEN_SIZES = 64, 1
"""A size that fills vectors, and one that leaves most of a vector empty: they may have kernels of their own."""


def make_pairs(modes: str, dtypes: str) -> list[tuple[str, str]]:
    """Every mode with every dtype, from lists separated by commas.

    Raises:
        ValueError: If a name is unknown.
    """
    parsed_dtypes = parse_names(dtypes, "dtype", DTYPES)
    return [(mode, dtype) for mode in parse_modes(modes) for dtype in parsed_dtypes]


def run(pairs: Sequence[tuple[str, str]]) -> None:
    """Compile the kernels, or load those already compiled, and print how long each pair took."""
    with steps(len(pairs)) as progress:
        for mode, dtype in pairs:
            progress.say(f"{mode} {dtype}")
            start = time.perf_counter()
            for size in _HIDDEN_SIZES:
                fusedrnn.RNNOp(fusedrnn.RNNSpec(mode, 1, size, dtype=dtype)).compile(training=True)
            progress.done(f"{mode} {dtype}: {time.perf_counter() - start:.2f} s")
