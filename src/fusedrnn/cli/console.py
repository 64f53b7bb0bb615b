"""What all commands share: reading lists of names, failing in a line, showing progress on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_PIPE_WIDTH = 120
"""Columns to print where no terminal says how many it has."""


def output() -> Console:
    """Standard output, as wide as its terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def fail(message: str) -> NoReturn:
    """Say what is wrong with the call, and exit with code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def names(given: str, what: str, valid: Collection[str]) -> list[str]:
    """The names in a list separated by commas, each once.

    Raises:
        ValueError: Naming what is unknown and all that is valid.
    """
    found = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if unknown := [name for name in found if name not in valid]:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}")
    if not found:
        raise ValueError(f"no {what} given; valid: {', '.join(valid)}")
    return found


class Steps:
    """Progress through a known number of steps: what runs now, and a line for each that is done."""

    def __init__(self, say: Callable[[str], None], done: Callable[[str], None]) -> None:
        self.say = say
        """Tell what is being done."""
        self.done = done
        """Tell that a step is done, and how it went."""


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Show progress on standard error: a bar if that is a terminal, else only a line for each finished step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Steps(lambda text: None, lambda text: typer.echo(text, err=True))
        return
    what = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def done(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False)
            progress.advance(task)

        yield Steps(lambda text: progress.update(task, description=text), done)
