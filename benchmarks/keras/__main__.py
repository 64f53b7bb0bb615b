"""The options of ``python -m benchmarks.keras``, the processes, and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers.environments import Environment
from benchmarks.peers.figures import printed_figures
from fusedrnn.cli import options
from fusedrnn.cli.console import check_writable, fail, finite, write_json
from fusedrnn.cli.program import Program
from fusedrnn.testing.cases import CASES

app = Program()

_MODULE = "benchmarks.keras.models"
_OURS = "keras==3.15.1", "llvmlite>=0.45"
ENVIRONMENTS = {
    "torch": Environment("keras-torch", ("torch==2.13.0", *_OURS)),
    "jax": Environment("keras-jax", ("jax==0.10.2", "jaxlib==0.10.2", *_OURS)),
}
"""The environment in which Keras runs on each backend. It is built at the first use."""
_LAYERS = "LSTM", "GRU", "SimpleRNN"
_CALLS = "model(x)", "predict", "fit"


@app.command()
def main(
    backends: Annotated[str, typer.Option(help="Backends of Keras, separated by commas.")] = "torch,jax",
    cases: Annotated[str, typer.Option(help=f"Workloads, separated by commas, of {', '.join(CASES)}.")] = "",
    layers: Annotated[str, typer.Option(help="Layers, separated by commas.")] = ",".join(_LAYERS),
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Time for each figure.")] = 2.0,
    json: options.Json = None,
) -> None:
    """Compare models of Keras's recurrent layers with the same models after accelerate, in turns, in one process."""
    try:
        check_writable("--json", json)
        chosen = {
            "cases": options.parse_names(cases or ",".join(CASES), "case", CASES),
            "layers": options.parse_names(layers, "layer", _LAYERS),
            "threads": threads,
            "seconds": seconds,
        }
        names = options.parse_names(backends, "backend", ENVIRONMENTS)
    except ValueError as error:
        fail(str(error))
    rows = []
    try:
        for name in names:
            for figure in printed_figures(ENVIRONMENTS[name], _MODULE, chosen, {"KERAS_BACKEND": name}):
                rows.append({"backend": name, **figure})
                label = f"{name} {figure['case']} {figure['layer']} {figure['call']}"
                print(f"{label}: {_ratio(figure):.2f} times", flush=True)
    except RuntimeError as error:
        fail(str(error))
    Console().print(table(rows))
    if json:
        write_json(json, {"threads": threads, "rows": rows})


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """How many times as fast as Keras's own layers each model is, and the geometric means."""
    result = Table("backend", "case", "layer", *_CALLS, title="Times Keras's own layers")
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row["backend"], row["case"], row["layer"]), {})[row["call"]] = _ratio(row)
    for labels, by_call in groups.items():
        result.add_row(*labels, *[f"{by_call[call]:.2f}" if call in by_call else "" for call in _CALLS])
    for backend in dict.fromkeys(row["backend"] for row in rows):
        means = [
            math.exp(sum(logs) / len(logs))
            for call in _CALLS
            if (logs := [math.log(by[call]) for labels, by in groups.items() if labels[0] == backend and call in by])
        ]
        result.add_row(backend, "geometric mean", "", *[f"[bold]{mean:.2f}[/]" for mean in means])
    return result


def _ratio(row: dict[str, Any]) -> float:
    return float(row["keras"] / row["fused"])


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.keras")
