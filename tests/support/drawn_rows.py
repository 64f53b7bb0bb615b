"""Rows with given speeds, in the form of a benchmark's JSON, from which figures and pages are drawn."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

from benchmarks.records import Benchmark, parse
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED
from fusedrnn.bench.report import report
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import Timing
from fusedrnn.spec import MODES
from fusedrnn.testing.cases import CASES, Case

BANDWIDTH = {"L2": 200.0, "L3": 150.0, "memory": 30.0}


def measured(case: Case, mode: str, gflops: dict[str, float], phase: str = "inference", **fields) -> Row:
    """A row in which each contender has a speed in GFLOP/s."""
    flops = case.spec(mode).flops(case.T, case.N, training=PHASES[phase].training)
    timings = {name: Timing((flops / (1e9 * speed),)) for name, speed in gflops.items()}
    return replace(Row(case, mode, phase, "float32", 2, flops, timings=timings, peak=200.0), **fields)


def many_rows(cases, modes=MODES, others=(NON_FUSED, "openvino")) -> list[Row]:
    """Rows whose points in a roofline are close to each other; fused is 2.5 times as fast as the best other."""
    return [
        measured(CASES[case], mode, {**dict.fromkeys(others, 60.0), FUSED: 150.0 + index % 3, IN_TORCH: 140.0}, phase)
        for index, (case, mode, phase) in enumerate(itertools.product(cases, modes, PHASES))
    ]


def benchmark_of(rows: list[Row], revisions=()) -> Benchmark:
    """The rows as they are read from a file."""
    cases = list(dict.fromkeys(row.case for row in rows))
    config = BenchConfig(cases, list(dict.fromkeys(row.mode for row in rows)), list(PHASES.values()), threads=2)
    data = report(config, rows, BANDWIDTH)
    data["plan"]["revisions"] = dict.fromkeys(revisions, "commit")
    return parse(json.loads(json.dumps(data)))
