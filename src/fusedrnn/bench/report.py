"""A benchmark as data for JSON: the machine, the configuration, and every figure of every row."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from typing import Any

from threadpoolctl import threadpool_info

import fusedrnn
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_TORCH, OURS, TORCH, UNPACKED
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.tables import published_percent
from fusedrnn.bench.timing import Timing
from fusedrnn.cell.cells import Cell
from fusedrnn.env import cache_directory
from fusedrnn.jit.host import cache_sizes, current_target, processor_name
from fusedrnn.spec import RNNSpec

_PACKAGES = ("fusedrnn", "numpy", "llvmlite", "torch", "onednn", "onednn-cpu-gomp", "onednn-cpu-iomp", "onednn-cpu-tbb")


def report(config: BenchConfig, rows: Sequence[Row], bandwidth: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The whole benchmark.

    Times are seconds per call, and peaks are in GFLOP/s. ``bandwidth`` is in GB/s and comes from
    :func:`fusedrnn.runtime.bandwidth.measure_bandwidth`.
    """
    return {
        "machine": environment_report(),
        "plan": {
            "cases": [case.name for case in config.cases],
            "modes": [mode.name if isinstance(mode, Cell) else mode for mode in config.modes],
            "phases": [phase.name for phase in config.phases],
            "dtype": config.dtype,
            "threads": config.threads,
            "seconds_a_row": config.budget,
            "full": config.full,
            "contenders": list(config.contenders),
            "backends": list(config.contenders) if config.engines else [],
            "compute": list(config.formats.values()),
            "packed": UNPACKED in config.contenders,
            "input": "text" if config.data is None else "user",
        },
        "bandwidth": dict(bandwidth or {}),
        "rows": [row_report(row) for row in rows],
    }


def row_report(row: Row) -> dict[str, Any]:
    """Every figure of a row. The figures of a wrong row are None, or missing in their table."""
    others = [name for name in row.timings if name not in OURS]
    return {
        "case": asdict(row.case),
        "mode": row.mode,
        "phase": row.phase,
        "dtype": row.dtype,
        "threads": row.threads,
        "wrong": row.wrong,
        "flops": row.flops,
        "least_bytes": least_bytes(row),
        "lengths": None if row.lengths is None else list(row.lengths),
        "seconds": {
            name: _timing_report(timing, row.steps_run.get(name, row.case.T)) for name, timing in row.timings.items()
        },
        "samples_per_second": {name: row.rate(name) for name in row.timings},
        "gflops": {name: row.gflops(name) for name in row.timings},
        "fused_over": {name: row.ratio(name, FUSED) for name in others if FUSED in row.timings},
        "fused_in_torch_over": {TORCH: row.ratio(TORCH, IN_TORCH)} if {TORCH, IN_TORCH} <= row.timings.keys() else {},
        "failures": dict(row.failures),
        "versions": {name: dict(versions) for name, versions in row.versions.items()},
        "packed_over_unpacked": row.packed_over_unpacked() if UNPACKED in row.timings else None,
        "mxnet_percent": published_percent(row),
        "formats": {name: row.formats[name] for name in row.timings if name in row.formats},
        "over_float32": {name: row.over_float32(name) for name in row.timings if name in row.formats},
        "peak": row.peak,
        "peaks": {row.dtype: row.peak, **row.peaks} if row.formats else {},
        "share_of_peak": row.share() if row.timings else None,
        "shares_of_peak": {name: row.share(name) for name in row.timings},
        "shares_refused": row.rejected_shares,
    }


def _timing_report(timing: Timing, steps: int) -> dict[str, Any]:
    figures = {name: getattr(timing, name) for name in ("median", "spread", "deviation", "p50", "p99")}
    return {**figures, "steps": steps, "samples": list(timing.seconds)}


def environment_report() -> dict[str, Any]:
    """Everything about this machine and process that a figure depends on."""
    target = current_target()
    directory = cache_directory()
    blas = {
        f"{library['internal_api']} {library['version']}"
        for library in threadpool_info()
        if library["user_api"] == "blas"
    }
    return {
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "target": target.name,
        "target_description": target.description,
        "target_cpu": target.cpu,
        "vector_bits": target.vector_bits,
        "threads": fusedrnn.get_num_threads(),
        "caches": cache_sizes(),
        "cache_directory": str(directory) if directory else None,
        "blas": sorted(blas),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Versions of Python and of the relevant packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def least_bytes(row: Row) -> int:
    """A lower bound of the bytes that a call moves between cores and caches, to compute its arithmetic intensity.

    Forward reads the recurrent weights of each layer and direction at every step, since a step depends on the previous
    one and no register file holds them. It moves all other data once: the other parameters, the input and output of
    each layer, and its states before and after. Backward moves all this again; in addition, it moves the gradients of
    parameters, inputs, outputs and states once. Residuals are not counted, since backward could recompute them. Padding
    of packed sequences is not counted.
    """
    spec = row.case.spec(row.cell or row.mode, row.dtype)
    rows, steps = (sum(row.lengths), max(row.lengths)) if row.lengths else (row.case.T * row.case.N, row.case.T)
    once = spec.layout.size + _data_size(spec, rows, row.case.N)
    recurrent = sum(entry.size for entry in spec.layout if entry.kind in ("h2h_weight", "h2r_weight"))
    forward = once + (steps - 1) * recurrent
    return (2 * forward + once if PHASES[row.phase].training else forward) * (8 if row.dtype == "float64" else 4)


def _data_size(spec: RNNSpec, rows: int, batch: int) -> int:
    """The elements of every layer's inputs, outputs and states; ``rows`` is the number of steps of all sequences."""
    states = 2 * sum(math.prod(shape) for shape in spec.state_shape(batch))
    return states + rows * sum(spec.layer_input_size(layer) + spec.output_size for layer in range(spec.num_layers))
