"""``fusedrnn info``: what fusedrnn found, and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from fusedrnn import RNNSpec
from fusedrnn.bench.facts import machine
from fusedrnn.cli.console import output
from fusedrnn.engines import registry
from fusedrnn.runtime.peak import measure_peak
from fusedrnn.spec import DTYPES


def run() -> None:
    """Print the facts and the measured peaks."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts():
        table.add_row(name, escape(value))
    output().print(table, highlight=False)


def _facts() -> Iterator[tuple[str, str]]:
    facts = machine()
    yield "processor", facts["processor"]
    yield "system", facts["system"]
    yield "target", f"{facts['target']}: {facts['target_description']}, compiled for {facts['target_cpu']}"
    yield "vector width", f"{facts['vector_bits']} bits"
    yield "threads", str(facts["threads"])
    yield "caches", ", ".join(f"{level} {_size(size)}" for level, size in facts["caches"].items()) or "unknown"
    for engine in registry.engines():
        asked = "" if engine.automatic else f", with backend={engine.name!r}"
        yield f"engine {engine.name}", f"{engine.description}{asked}: {engine.capabilities}{_declines(engine.name)}"
    for dtype in DTYPES:
        yield f"FMA peak {dtype}", _peaks(dtype, facts["threads"])
    yield "BLAS of non-fused", ", ".join(facts["blas"]) or "unknown"
    yield "kernels kept in", facts["cache_directory"] or "memory only"
    yield "versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def _declines(name: str) -> str:
    """Why an engine declines a small network that it says it has, such as for want of a library."""
    supports = registry.find(name).capabilities
    try:
        registry.EngineSelector(RNNSpec(supports.modes[0], 1, 1, dtype=supports.dtypes[0]), name).select()
    except NotImplementedError as error:
        return f"; declines here: {error}"
    return ""


def _peaks(dtype: str, threads: int) -> str:
    one = f"{measure_peak(dtype, 1):.1f} GFLOP/s on 1 thread"
    return one if threads == 1 else f"{one}, {measure_peak(dtype, threads):.1f} on {threads}"


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"
