"""A program whose packages are not all installed ends with one line that says which is missing, and exit code 2."""

from __future__ import annotations

import sys
from types import TracebackType

_OURS = "benchmarks", "examples", "fusedrnn"


def say_what_is_missing() -> None:
    """Replace the traceback of an import that fails, in a program that ``python -m`` runs from one of our folders.

    The folders call this as they are imported, which is before the program's own imports.
    """
    if sys.argv[:1] == ["-m"]:  # python -m, until it has found the program
        sys.excepthook = _end


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    line = _line(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
        return
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _line(error: BaseException) -> str | None:
    """What is missing; None if the error says something else."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in ("", *_OURS):
            return None
        from fusedrnn.extras import needs

        return needs(_program(), package)
    is_ours = isinstance(error, ImportError) and isinstance(error.__cause__, ModuleNotFoundError)
    return f"{_program()}: {error}" if is_ours else None


def _program() -> str:
    """The name of the program as ``python -m`` takes it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]
