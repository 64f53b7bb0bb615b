"""Standard output and error of a command: they are always there, and take any text."""

from __future__ import annotations

import io
import os
import sys

_FAILING = "strict", "surrogateescape"
"""How a stream may treat what its encoding lacks, if that raises an error."""


def prepare() -> None:
    """Let standard output print ``?`` for characters that its encoding lacks, and open the streams that are closed.

    A table with ``µ`` would otherwise end a command after minutes of measuring, for instance in a pipe on Windows.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            _discard(name)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in _FAILING:
            stream.reconfigure(errors="replace")


def output_fails() -> bool:
    """Whether standard output cannot be written, as on a full disk. Then it is discarded from now on."""
    try:
        sys.stdout.write("\n")  # a write that fails need not leave text that a flush would write
        sys.stdout.flush()
    except OSError:
        _discard("stdout")
        return True
    return False


def _discard(name: str) -> None:
    """Let a stream write to nowhere."""
    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 -- for the rest of the process
