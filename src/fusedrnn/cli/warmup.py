"""``fusedrnn warmup``: compiles kernels into the cache ahead of time, and measures the rates that plans assume."""

from __future__ import annotations

import time
from itertools import product
from typing import Annotated, Any

import typer

import fusedrnn
from fusedrnn.cli import kernels_folder
from fusedrnn.cli.cells import load_cells
from fusedrnn.cli.console import fail, steps
from fusedrnn.cli.options import ALL_MODES, Cells, Modes, check_cells_alone, parse_modes, parse_names
from fusedrnn.runtime.bandwidth import measured_rates
from fusedrnn.spec import COMPUTE, DTYPES

_FORMATS = ", ".join(COMPUTE)
_HIDDEN_SIZES = 64, 1
"""A size that fills vectors, and one that leaves most of a vector empty. They may have different kernels."""


def warmup(
    modes: Modes = ALL_MODES,
    cell: Cells = "",
    dtypes: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(DTYPES)}.")] = ",".join(DTYPES),
    compute: Annotated[
        str,
        typer.Option(help=f"Also kernels with GEMM operands in these formats, separated by commas: {_FORMATS}."),
    ] = "",
) -> None:
    """Compile kernels ahead of time, so that no first call has to.

    Kernels depend on the cell, the float type and the format of GEMM operands; not on sizes, layers or directions. For
    a spec with options of the cell, such as a projection, call `fusedrnn.RNNOp(spec).compile(training=True)` instead.

    This also measures the rates of this machine that the cost model uses, unless they have been measured before.
    """
    try:
        check_cells_alone(cell, modes)
        chosen: list[Any] = [*load_cells(cell)] if cell else parse_modes(modes)
        formats: list[tuple[str, str | None]] = [(dtype, None) for dtype in parse_names(dtypes, "dtype", DTYPES)]
        if compute:
            formats += [("float32", name) for name in parse_names(compute, "format", COMPUTE)]
        kernels = [_ops(mode, dtype, name) for mode, (dtype, name) in product(chosen, formats)]
    except ValueError as error:
        fail(str(error))
    if reason := kernels_folder.rejection():
        fail(f"no kernels can be kept: {reason}")
    measured_rates()
    with steps(len(kernels)) as progress:
        for ops in kernels:
            name = f"{ops[0].spec.mode_name} {ops[0].spec.operand_format}"
            progress.say(name)
            start = time.perf_counter()
            for op in ops:
                op.compile(training=op.spec.is_trainable)
            progress.done(f"{name}: {time.perf_counter() - start:.2f} s")


def _ops(mode: Any, dtype: str, compute: str | None) -> list[fusedrnn.RNNOp]:
    """The ops whose kernels are those of a cell in a format."""
    heads = getattr(mode, "heads", 1)
    specs = [fusedrnn.RNNSpec(mode, size * heads, size * heads, dtype=dtype, compute=compute) for size in _HIDDEN_SIZES]
    return [fusedrnn.RNNOp(spec) for spec in specs]
