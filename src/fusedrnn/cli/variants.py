"""``fusedrnn bench --variants``: the lines of each cell as they come, then a table, a file and an exit code."""

from __future__ import annotations

import json
from pathlib import Path

from fusedrnn.bench import variants
from fusedrnn.bench.estimate import expected_seconds
from fusedrnn.bench.facts import machine
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.bench.peaks import at_best_peak
from fusedrnn.bench.rows import Plan
from fusedrnn.cli.console import output, steps
from fusedrnn.runtime.peak import measure_peak


def run(plan: Plan, json_path: Path | None) -> bool:
    """Measure what the plan's cases, cells and phases have of variants. Returns whether every result was right."""
    groups = []
    # As many turns as there are variants, each like a row of its own.
    rows = expected_seconds(plan, measure_peak(plan.dtype, plan.threads))
    counts = [len(variants.VARIANTS[mode]) + 1 for _, mode, _ in plan.rows()]
    with steps([seconds * count for seconds, count in zip(rows, counts, strict=True)]) as progress:
        for lines in variants.run(
            plan.cases, plan.modes, plan.phases, plan.dtype, plan.threads, plan.budget, progress.say
        ):
            groups.append(lines)
            first = lines[0]
            progress.done(f"{first.case.name} {NAMES[first.mode]}-{first.phase.capitalize()}")
    best = iter(at_best_peak([line for lines in groups for line in lines]))
    groups = [[next(best) for _ in lines] for lines in groups]
    console, facts = output(), machine()
    console.print(f"{facts['processor']}, {facts['target_description']}, threads: {plan.threads}", highlight=False)
    console.print(variants.table(groups))
    wrong = [line for lines in groups for line in lines if line.wrong]
    for line in wrong:
        console.print(f"wrong: {line.case.name} {line.mode} {line.name}: {line.wrong}", markup=False, highlight=False)
    for line in (line for lines in groups for line in lines if line.refused):
        console.print(f"{line.case.name} {line.mode} {line.name}: {line.refused}", markup=False, highlight=False)
    if json_path:
        figures = {"machine": facts, "threads": plan.threads, "lines": variants.figures(groups)}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    return not wrong
