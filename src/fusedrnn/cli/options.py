"""Options that several commands share, and the functions that read their values."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from fusedrnn.arrays import Array
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import IN_FORMAT
from fusedrnn.bench.tables import MODE_NAMES
from fusedrnn.cli.console import finite
from fusedrnn.env import MAX_THREADS
from fusedrnn.scalars import MAX_BYTES
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES, Case

ALL_MODES, ALL_PHASES = ",".join(MODE_NAMES), ",".join(PHASES)

Cases = Annotated[str, typer.Option(help=f"Workloads, separated by commas: {', '.join(CASES)}.")]
Modes = Annotated[str, typer.Option(help=f"Cells, separated by commas: {', '.join(MODE_NAMES)}.")]
Cells = Annotated[
    str,
    typer.Option(
        "--cell", help="Cells of your own instead of --modes, separated by commas: path.py:name or module:name."
    ),
]
Phases = Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PHASES)}.")]
Dtype = Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}.")]
Compute = Annotated[
    str, typer.Option(help=f"Compare formats of GEMM operands, separated by commas: {', '.join(IN_FORMAT)}.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MAX_THREADS, help="Number of threads.", show_default="fusedrnn's own default")
]
Data = Annotated[
    Path | None,
    typer.Option(help="A .npy array (T, N, I) to run instead of text; it replaces the cases' own T, N and I."),
]
Steps = Annotated[str, typer.Option(help="Time steps T instead of the cases' own, separated by commas.")]
Batch = Annotated[str, typer.Option(help="Sequences N instead of the cases' own, separated by commas.")]
Hidden = Annotated[str, typer.Option(help="Hidden units H instead of the cases' own, separated by commas.")]
Seconds = Annotated[
    float, typer.Option(min=0, callback=finite, help="Time to spend on a row, if its calls are short enough.")
]
Json = Annotated[Path | None, typer.Option(help="Write every figure to this file.")]


def parse_names(text: str, what: str, valid: Collection[str]) -> list[str]:
    """The names in a list that is separated by commas, without duplicates.

    Raises:
        ValueError: If a name is unknown, or there is none; the message lists the valid names.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in valid]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}")
    if not names:
        raise ValueError(f"no {what} given; valid: {', '.join(valid)}")
    return names


parse_modes = partial(parse_names, what="mode", valid=MODE_NAMES)


def check_cells_alone(cells: str, modes: str) -> None:
    """Check that ``--modes`` is left out where there are cells of the user's, which replace it.

    Raises:
        ValueError: If both are given.
    """
    if cells and modes != ALL_MODES:
        raise ValueError("--modes cannot be used with --cell, which replaces it")


def parse_dtype(dtype: str) -> str:
    """The dtype itself, after a check.

    Raises:
        ValueError: If it is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; valid: {', '.join(DTYPES)}")
    return dtype


def parse_cases(text: str, steps: str = "", batch: str = "", hidden: str = "", x: Array | None = None) -> list[Case]:
    """The cases in a list, at each T of ``steps``, N of ``batch`` and H of ``hidden``; with ``x``, at its T, N and I.

    Raises:
        ValueError: If a name or number is invalid, or ``x`` comes with other sizes.
    """
    cases = [CASES[name] for name in parse_names(text, "case", CASES)]
    if x is not None and (steps or batch):
        raise ValueError(f"--data cannot be used with {'--steps' if steps else '--batch'}: it has its own shape")
    T_x, N_x, I_x = (0, 0, 0) if x is None else x.shape
    options = {"--steps": steps, "--batch": batch, "--hidden": hidden}
    sizes = list(product(*(_parse_numbers(option, numbers) for option, numbers in options.items())))
    return [case.at(T or T_x or case.T, N or N_x or case.N, I_x or case.I, H) for case in cases for T, N, H in sizes]


def _parse_numbers(option: str, text: str) -> list[int]:
    """The positive numbers in a list, without duplicates; a single 0 if it is empty."""
    return list(dict.fromkeys(parse_sizes(option, text))) or [0]


def parse_sizes(option: str, text: str) -> list[int]:
    """The positive numbers in a list that is separated by commas, in their order; none if the text is empty.

    Raises:
        ValueError: If one is no positive number, or larger than any size; the message names the option.
    """
    numbers = [number.strip() for number in text.split(",")] if text.strip() else []
    if invalid := [number for number in numbers if not _is_size(number)]:
        raise ValueError(
            f"{option} must be positive numbers up to {MAX_BYTES}, separated by commas; got {invalid[0]!r}"
        )
    return [int(number) for number in numbers]


def _is_size(number: str) -> bool:
    """Whether a text is a size that memory can address."""
    return number.isdecimal() and len(number) <= len(str(MAX_BYTES)) and 1 <= int(number) <= MAX_BYTES
