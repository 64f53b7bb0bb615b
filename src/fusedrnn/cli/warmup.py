"""``fusedrnn warmup``: compiles ahead what later runs will load from the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence

import fusedrnn
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.cli.console import names, steps
from fusedrnn.spec import DTYPES

_SECONDS_A_MODE = 3.0
# Hidden units that fill vectors, and one that would leave most of a vector empty: they may have kernels of their own.
_SIZES = 64, 1


def make_pairs(modes: str, dtypes: str) -> list[tuple[str, str]]:
    """Every mode with every dtype, from lists separated by commas.

    Raises:
        ValueError: If a name is unknown.
    """
    chosen = names(dtypes, "dtype", DTYPES)
    return [(mode, dtype) for mode in names(modes, "mode", NAMES) for dtype in chosen]


def run(pairs: Sequence[tuple[str, str]]) -> None:
    """Compile, or load what is already compiled, and say how long each took."""
    with steps([_SECONDS_A_MODE] * len(pairs)) as progress:
        for mode, dtype in pairs:
            progress.say(f"{mode} {dtype}")
            begin = time.perf_counter()
            for size in _SIZES:
                fusedrnn.RNNOp(fusedrnn.RNNSpec(mode, 1, size, dtype=dtype)).compile(training=True)
            progress.done(f"{mode} {dtype}: {time.perf_counter() - begin:.2f} s")
