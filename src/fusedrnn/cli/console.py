"""What all commands share: errors in one line, output files, and progress on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fusedrnn.cli import streams

_PIPE_WIDTH = 120
"""The number of columns if the output is not a terminal."""


def output() -> Console:
    """Standard output, as wide as its terminal."""
    streams.prepare()
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def fail(message: str) -> NoReturn:
    """Print an error, and exit with code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def finite(value: float) -> float:
    """The value of an option, if it is finite: a callback for options."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def check_writable(option: str, path: Path | None) -> None:
    """Check that a file can be written. Commands do so before minutes of measuring rather than after.

    Raises:
        ValueError: If it cannot be written; the message has the option and the reason.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path}: it is a folder; expected the path of a file")
    try:
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            os.unlink(os.path.realpath(path))  # of a link, the file that it points to
    except OSError as error:
        raise ValueError(f"{option} {path}: it cannot be written: {error.strerror}") from error


def write_json(path: Path, figures: Any) -> None:
    """Write every figure to the file of ``--json``; exit with an error if it cannot be written."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        fail(f"--json {path}: it cannot be written: {error.strerror}")


class Steps(NamedTuple):
    """Progress through a known number of steps."""

    say: Callable[[str], None]
    """A function to call with a description of the current step."""
    done: Callable[[str], None]
    """A function to call with the result of each finished step."""


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Show progress on standard error: on a terminal a bar with the remaining time, else a line per finished step."""
    console = Console(stderr=True)
    columns = (
        *(SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def done(text: str) -> None:
            bar.advance(task)
            if console.is_terminal:
                console.print(text, markup=False, highlight=False)
            else:
                typer.echo(f"{text} ({bar.tasks[0].completed:g}/{total})", err=True)

        yield Steps(lambda text: bar.update(task, description=text), done)
