"""``fusedrnn warmup``: compiles kernels into the cache ahead of time, and measures the rates that plans assume."""

from __future__ import annotations

import time
from itertools import product
from typing import Annotated

import typer

import fusedrnn
from fusedrnn.cli import kernels_folder
from fusedrnn.cli.console import fail, steps
from fusedrnn.cli.options import ALL_MODES, Modes, parse_modes, parse_names
from fusedrnn.runtime.bandwidth import measured_rates
from fusedrnn.spec import DTYPES

_HIDDEN_SIZES = 64, 1
"""A size that fills vectors, and one that leaves most of a vector empty. They may have different kernels."""


def warmup(
    modes: Modes = ALL_MODES,
    dtypes: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(DTYPES)}.")] = ",".join(DTYPES),
) -> None:
    """Compile kernels ahead of time, so that no first call has to. Kernels depend on the cell and the float type.

    This also measures the rates of this machine that the cost model uses, unless they have been measured before.
    """
    try:
        pairs = list(product(parse_modes(modes), parse_names(dtypes, "dtype", DTYPES)))
    except ValueError as error:
        fail(str(error))
    if reason := kernels_folder.rejection():
        fail(f"no kernels can be kept: {reason}")
    measured_rates()
    with steps(len(pairs)) as progress:
        for mode, dtype in pairs:
            progress.say(f"{mode} {dtype}")
            start = time.perf_counter()
            for size in _HIDDEN_SIZES:
                fusedrnn.RNNOp(fusedrnn.RNNSpec(mode, 1, size, dtype=dtype)).compile(training=True)
            progress.done(f"{mode} {dtype}: {time.perf_counter() - start:.2f} s")
