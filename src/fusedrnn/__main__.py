"""``python -m fusedrnn``: the command line, for systems where its script is not on the path."""

from __future__ import annotations

from fusedrnn.cli import main

main()
