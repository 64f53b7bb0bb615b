"""Rows as lines of text: a finished row, and notes on rows that are not in a table."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.bench.data import NON_FUSED, UNPACKED
from fusedrnn.bench.rows import Row
from fusedrnn.bench.tables import number, percent


def peak_lines(rows: Sequence[Row]) -> list[str]:
    """A line with the peak of each format of a run, if it has several."""
    row = next((row for row in rows if row.peak and row.peaks), None)
    if row is None:
        return []
    peaks = {row.dtype: row.peak or 0.0, **row.peaks}
    return [f"peaks: {', '.join(f'{name} {rate_text(name, rate)}' for name, rate in peaks.items())}"]


def rate_text(number_format: str, rate: float) -> str:
    """A rate in a format, with its unit. Operations on integers are not floating-point operations."""
    return f"{rate:.1f} {'Gop/s' if number_format == 'int8' else 'GFLOP/s'}"


def extrapolated_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender whose time is extrapolated: in how many rows, and from how many steps."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row.steps_run):
        members = [row for row in rows if name in row.steps_run]
        steps, total = _range([row.steps_run[name] for row in members]), _range([row.case.T for row in members])
        lines.append(
            f"{name} measured on {steps} of {total} steps in {len(members)} of {len(rows)} rows, the time of all steps "
            "extrapolated; --full runs all steps"
        )
    return lines


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def rejected_share_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each share of the peak that is not shown because it is above 1."""
    return [f"{row.name}, {name}: {reason}" for row in rows for name, reason in row.rejected_shares.items()]


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each contender without a timing and each reason for this, with the rows that are affected."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for failure in row.failures.items():
            names.setdefault(failure, []).append(row.name)
    return [f"{contender}: {reason} ({_rows_in_words(where, rows)})" for (contender, reason), where in names.items()]


def _rows_in_words(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The names of some rows, abbreviated if these are all rows, or all rows of one phase."""
    if len(names) == len(rows) > 1:
        return "every row"
    for phase in dict.fromkeys(row.phase for row in rows):
        if len(names) > 1 and list(names) == [row.name for row in rows if row.phase == phase]:
            return f"every {phase} row"
    return ", ".join(names)


def summary(row: Row) -> str:
    """A finished row in one line."""
    if row.wrong:
        return f"{row.name}: wrong: {row.wrong}"
    if not row.timings:
        return f"{row.name}: {'nothing to time' if row.formats else 'every engine declines'}"
    rates = ", ".join(f"{name} {number(row.rate(name))}" for name in row.timings)
    packed = f"; {percent(row.packed_over_unpacked(), digits=1)} of unpacked GFLOP/s" if UNPACKED in row.timings else ""
    steps = row.steps_run.get(NON_FUSED)
    extrapolated = f" (measured on {steps} of {row.case.T} steps)" if steps else ""
    shares = ", ".join(f"{name} {share_text(row, name)}" for name in row.formats if name in row.timings)
    return f"{row.name}: samples/sec {rates}{extrapolated}; {shares or share_text(row)}{packed}"


def share_text(row: Row, contender: str | None = None) -> str:
    """A contender's share of the peak as text, by default that of :attr:`Row.ours`."""
    share, peak = row.share(contender), row.peak_name(contender or row.ours)
    return f"above the {peak} as measured" if share is None else f"{percent(share, digits=1)} of the {peak}"
