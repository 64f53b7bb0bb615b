"""The command line: ``fusedrnn bench | info | warmup``."""

from __future__ import annotations

import sys

from fusedrnn.cli import streams
from fusedrnn.extras import EXTRAS, needs


def main() -> None:
    """Run the command line. If a package is missing, say which extra installs it."""
    streams.prepare()
    try:
        from fusedrnn.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if EXTRAS.get(package) != "bench":
            raise
        print(f"error: {needs('the command line', package)}", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except OSError as error:
        if not streams.output_fails():
            raise
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
