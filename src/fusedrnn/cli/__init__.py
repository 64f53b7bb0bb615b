"""The command line: ``fusedrnn bench | info | warmup``."""

from __future__ import annotations

import sys

from fusedrnn.cli import streams

_EXTRA = {"rich", "threadpoolctl", "typer"}


def main() -> None:
    """Run the command line. If a package is missing, say which extra installs it."""
    streams.prepare()
    try:
        from fusedrnn.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        print(f"error: the command line needs {package}: pip install 'fusedrnn[bench]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except OSError as error:
        if not streams.output_fails():
            raise
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
