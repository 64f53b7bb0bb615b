"""What the programs share: the options of typer, and help that a terminal of any width can wrap."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer


class Program(typer.Typer):
    """A program whose commands are functions. The help of a command is the paragraphs of its docstring."""

    def __init__(self, **options: Any) -> None:
        super().__init__(add_completion=False, pretty_exceptions_enable=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """A decorator that makes a function a command, as :meth:`typer.Typer.command` does.

        Typer would print the line breaks of a docstring beside those of the terminal.
        """

        def register(function: Any) -> Any:
            paragraphs = (inspect.getdoc(function) or "").split("\n\n")
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            return super(Program, self).command(name, help=text, **options)(function)

        return register
