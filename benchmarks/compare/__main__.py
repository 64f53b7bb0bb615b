"""``python -m benchmarks.compare``: the options, the table, the file, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.compare.runner import Comparison, comparison_report, run
from benchmarks.compare.table import compared_table, formats_table, summary
from benchmarks.peers.environments import ALL_FORMATS, PEERS, in_formats
from benchmarks.peers.revision import find
from fusedrnn.bench.formats import format_fields
from fusedrnn.cli import options
from fusedrnn.cli.bench import make_config, run_and_print
from fusedrnn.cli.console import check_writable, fail, write_json
from fusedrnn.cli.program import Program
from fusedrnn.runtime.bandwidth import measure_bandwidth

app = Program()


@app.command()
def main(
    peers: Annotated[str, typer.Option(help=f"Libraries, separated by commas: all, or of {', '.join(PEERS)}.")] = "",
    against: Annotated[
        str, typer.Option(help="Git revisions of fusedrnn, separated by commas, for example HEAD~1.")
    ] = "",
    cases: options.Cases = "ds2,ds2-5bi",
    modes: options.Modes = options.ALL_MODES,
    phases: options.Phases = options.ALL_PHASES,
    threads: options.Threads = None,
    dtype: options.Dtype = "float32",
    data: options.Data = None,
    steps: options.Steps = "",
    batch: options.Batch = "",
    hidden: options.Hidden = "",
    compute: Annotated[
        str, typer.Option(help=f"Compare formats of GEMM operands, separated by commas: {', '.join(ALL_FORMATS)}.")
    ] = "float32",
    seconds: options.Seconds = 5.0,
    json: options.Json = None,
) -> None:
    """Time the operator against other libraries, each in its fastest mode, and against earlier revisions of itself.

    Each contender runs in its own process, with the same number of threads, and takes turns with the operator. Its
    results are compared with the operator's before it is timed. `make peers` builds the environments of the libraries.

    With --compute, the operator and the libraries take turns in each of these formats of GEMM operands, each library in
    its best way. If a library lacks a format, or lacks it on this processor, the table says so.
    """
    try:
        formats = options.parse_names(compute, "format", ALL_FORMATS)
        fields = {"budget": seconds, **format_fields(formats)}
        config = Comparison(
            make_config(cases, modes, phases, dtype, threads, data, steps, batch, hidden, **fields),
            in_formats(choose_peers(peers), formats) if peers else (),
            tuple(dict.fromkeys(find(name.strip()) for name in against.split(",") if name.strip())),
        )
        if not (config.peers or config.revisions):
            raise ValueError("nothing to compare with: use --peers or --against")
        check_writable("--json", json)
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(0 if compare(config, json) else 1)


def choose_peers(text: str) -> tuple[str, ...]:
    """The peers in a list of names, or every peer for ``all``, where peers that are not built fail in each row.

    Raises:
        ValueError: If a name is unknown, a named peer is not built, or no peer is built.
    """
    every = text.strip() == "all"
    chosen = tuple(PEERS) if every else tuple(options.parse_names(text, "peer", ("all", *PEERS)))
    if "all" in chosen:
        raise ValueError("--peers takes all, or names, not both")
    missing = [name for name in chosen if not PEERS[name].environment.is_built()]
    if missing and (not every or len(missing) == len(chosen)):
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"--peers: {', '.join(missing)} {verb} not built: run `make peers`")
    return chosen


def compare(config: Comparison, json_path: Path | None) -> bool:
    """Run the comparison, print its table, write its file. Returns whether every result of the operator was right."""
    table = formats_table if config.bench.formats else compared_table
    rows = run_and_print(config.bench, lambda progress: run(config, progress), summary, lambda rows: [table(rows)])
    if json_path:
        write_json(json_path, comparison_report(config, rows, measure_bandwidth(config.bench.threads)))
    return not any(row.wrong for row in rows)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.compare")
