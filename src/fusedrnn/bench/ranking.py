"""Who of a row is ours, who is not, and how ours stand to the best of the others."""

from __future__ import annotations

from fusedrnn.bench.computed import FUSED, IN_TORCH, UNPACKED
from fusedrnn.bench.rows import Row

OURS = (FUSED, IN_TORCH, UNPACKED)
COMPARED = (FUSED, IN_TORCH)
"""Those of ours that run what the others run."""


def best_other(row: Row) -> str | None:
    """The fastest contender that is not ours; None if none was measured.

    Earlier revisions of ourselves count only where there is nobody else.
    """
    others = [who for who in row.timings if who not in OURS]
    strangers = [who for who in others if who not in row.revisions]
    return min(strangers or others, key=lambda who: row.timings[who].median, default=None)


def over_best(row: Row, who: str) -> float | None:
    """How many times ``who``, one of ours, is as fast as the best of the others; None if that cannot be said."""
    best = best_other(row)
    return row.ratio(best, who) if best and who in row.timings and who in COMPARED else None
