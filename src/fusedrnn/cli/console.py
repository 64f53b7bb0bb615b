"""What all commands share: reading lists of names, failing in a line, showing progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

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


def minutes(seconds: float) -> str:
    """Such as ``6:05``."""
    return "{}:{:02d}".format(*divmod(round(seconds), 60))


class Pace:
    """How long steps of known expected seconds still take, corrected by how long the finished ones took."""

    def __init__(self, expected: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = list(expected), clock
        self._finished = 0
        self._begin = self._since = clock()

    def finish(self) -> None:
        """A step is done."""
        self._finished += 1
        self._since = self._clock()

    @property
    def share(self) -> float:
        """The part of all that is done, by expected time."""
        return sum(self._expected[: self._finished]) / max(sum(self._expected), 1e-9)

    def left(self) -> float:
        """Seconds until all is done."""
        done, to_do = self._expected[: self._finished], self._expected[self._finished :]
        slower = (self._since - self._begin) / max(sum(done), 1e-9) if done else 1.0
        current = to_do[0] * slower if to_do else 0.0
        return max(0.0, current - (self._clock() - self._since)) + sum(to_do[1:]) * slower

    def __str__(self) -> str:
        return f"{self._finished}/{len(self._expected)}, about {minutes(self.left())} left"


class _PaceColumn(ProgressColumn):
    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(str(self._pace))


class Steps:
    """Progress through known steps: what runs now, and a line for each that is done."""

    def __init__(self, say: Callable[[str], None], done: Callable[[str], None]) -> None:
        self.say = say
        """Tell what is being done."""
        self.done = done
        """Tell that a step is done, and how it went."""


@contextmanager
def steps(expected: Sequence[float]) -> Iterator[Steps]:
    """Show progress on standard error, through steps that are expected to take these seconds.

    A terminal gets a bar, what runs, and the time left; anything else a line for each finished step.
    """
    console, pace = Console(stderr=True), Pace(expected)
    if not console.is_terminal:

        def line(text: str) -> None:
            pace.finish()
            typer.echo(f"{text} ({pace})", err=True)

        yield Steps(lambda text: None, line)
        return
    what = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), _PaceColumn(pace), what)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def done(text: str) -> None:
            pace.finish()
            progress.console.print(text, markup=False, highlight=False)
            progress.update(task, completed=pace.share)

        yield Steps(lambda text: progress.update(task, description=text), done)
