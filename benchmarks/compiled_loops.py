"""``python -m benchmarks.compiled_loops``: the fused layer, compared with loops in PyTorch, plain and compiled.

torch.compile unrolls a loop over the steps, so compilation takes minutes. All calls of a row take turns in one process.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor

import fusedrnn
from benchmarks.timed_rows import TimedRow, result_difference, take_turns
from fusedrnn import cells
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import Results, Workload, workload
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.bench.report import environment_report
from fusedrnn.bench.tables import duration, new_table
from fusedrnn.bench.torch_contenders import load, torch_nn, train_torch_nn
from fusedrnn.bench.torch_contenders import threads as torch_threads
from fusedrnn.cell.cells import Cell
from fusedrnn.cli import options
from fusedrnn.cli.console import check_writable, fail, output, steps, write_json
from fusedrnn.cli.program import Program
from fusedrnn.testing.cases import CASES, Case

LOOP, COMPILED, LAYER = "loop", "compiled loop", "fused"
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The new state from the inputs of the gates (N, G·H), the state, the recurrent weights and their bias."""

app = Program()


@dataclass(frozen=True)
class Row(TimedRow):
    """The timings of a cell on a workload.

    Attributes:
        compile_seconds: The seconds of the first call of the compiled loop.
    """

    compile_seconds: float


class Loop(torch.nn.Module):
    """A layer as users write it: one product for the inputs of all steps, then a loop over the steps."""

    def __init__(self, work: Workload, step: Step) -> None:
        super().__init__()
        for name, value in work.spec.layout.unpack(work.params, names="torch").items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(value.shape)))
        load(self, work)
        self._step = step

    def forward(self, x: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output (T, N, H) and the last state (1, N, H)."""
        weight, *biases = (self.get_parameter(name) for name in ("weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
        h = x.new_zeros(x.shape[1], weight.shape[1]) if states is None else states[0]
        outputs = []
        for gates in F.linear(x, self.get_parameter("weight_ih_l0"), biases[0]):
            h = self._step(gates, h, weight, biases[1])
            outputs.append(h)
        return torch.stack(outputs), h[None]


def _gru(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x_r, x_z, x_n = gates.chunk(3, 1)
    h_r, h_z, h_n = F.linear(h, weight, bias).chunk(3, 1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)


def _li_gru(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z, n = (gates + F.linear(h, weight, bias)).chunk(2, 1)
    n = torch.relu(n)
    return n + torch.sigmoid(z) * (h - n)


def _minimal_gated_unit(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    (x_f, x_n), (w_f, w_n), (b_f, b_n) = gates.chunk(2, 1), weight.chunk(2), bias.chunk(2)
    f = torch.sigmoid(x_f + F.linear(h, w_f, b_f))
    n = torch.tanh(x_n + F.linear(f * h, w_n, b_n))
    return h + f * (n - h)


CELLS: dict[str, tuple[str | Cell, Step]] = {
    "gru": ("gru", _gru),
    "li_gru": (cells.li_gru, _li_gru),
    "minimal_gated_unit": (cells.minimal_gated_unit, _minimal_gated_unit),
}


def run_row(case: Case, cell: str, phase: str, peak: RunPeak, seconds: float) -> Row:
    """Check and time a cell on a workload.

    Raises:
        RuntimeError: If results differ.
    """
    mode, step = CELLS[cell]
    work = workload(case, mode, "float32")
    make = train_torch_nn if phase == "training" else torch_nn
    torch.compiler.reset()
    compiled = Loop(work, step)
    compiled.compile(fullgraph=True, dynamic=False)
    contenders = {
        LOOP: make(work, module=Loop(work, step)), COMPILED: make(work, module=compiled),
        LAYER: make(work, accelerated=True),
    }  # fmt: skip
    batch = work.batch(case.T)
    start = time.perf_counter()
    contenders[COMPILED](batch)
    compile_seconds = time.perf_counter() - start
    expected = contenders[LOOP](batch)()
    for name in (COMPILED, LAYER):
        check(work, name, expected, contenders[name](batch)())
    calls: dict[str, Callable[[], Any]] = {name: partial(run, batch) for name, run in contenders.items()}
    return Row(case, cell, phase, take_turns(calls, seconds, peak), compile_seconds)


def check(work: Workload, name: str, expected: Results, actual: Results) -> None:
    """Compare the results of two calls.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    for key, array in expected.items():
        if message := result_difference(work.spec, work.case, actual[key], array, is_gradient=key.startswith("d")):
            raise RuntimeError(f"{work.case.name}, {work.spec.mode_name}, {name}: {key} differs{message}")


def table(rows: list[Row]) -> Table:
    """The medians, and how many times as fast the fused layer is."""
    headings = ("", "compiled in", *(LOOP, COMPILED, LAYER), f"{LOOP} / {LAYER}", f"{COMPILED} / {LAYER}")
    result = new_table("Medians, and ratios of them", headings)
    for row in rows:
        times = [duration(row.timings[name].median) for name in (LOOP, COMPILED, LAYER)]
        ratios = [f"{row.ratio(name, LAYER):.2f}" for name in (LOOP, COMPILED)]
        result.add_row(row.name, f"{row.compile_seconds:.0f} s", *times, *ratios)
    return result


def row_report(row: Row) -> dict[str, Any]:
    """A row as data for JSON."""
    return {
        "case": row.case.name, "cell": row.mode, "phase": row.phase, "compile_seconds": row.compile_seconds,
        **row.seconds_report(),
    }  # fmt: skip


@app.command()
def main(
    cell: Annotated[str, typer.Option(help=f"Cells, separated by commas: {', '.join(CELLS)}.")] = ",".join(CELLS),
    cases: Annotated[
        str, typer.Option(help=f"Workloads, separated by commas: {', '.join(CASES)}; each as one layer, one direction.")
    ] = "small,tagger",
    phases: options.Phases = options.ALL_PHASES,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    seconds: options.Seconds = 3.0,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
) -> None:
    """Compare the fused layer with cells as loops of PyTorch's operations, plain and under torch.compile."""
    try:
        check_writable("--json", json)
        chosen = [
            (replace(case, layers=1, bidirectional=False), each, phase)
            for each in options.parse_names(cell, "cell", CELLS)
            for case in options.parse_cases(cases)
            for phase in options.parse_names(phases, "phase", PHASES)
        ]
    except ValueError as error:
        fail(str(error))
    fusedrnn.set_num_threads(threads)
    torch.compiler.config.force_disable_caches = True  # so that the seconds of compiling are those of a first run
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    rows, peak = list[Row](), RunPeak("float32", threads)
    with torch_threads(threads), steps(len(chosen)) as progress:
        for case, each, phase in chosen:
            progress.say(f"{case.name}, {each}, {phase}: compiling takes minutes")
            row = run_row(case, each, phase, peak, seconds)
            rows.append(row)
            ratios = [f"{name} {row.ratio(name, LAYER):.1f}" for name in (LOOP, COMPILED)]
            progress.done(f"{row.name}: {', '.join(ratios)}")
            if json:  # after each row, since all rows together take long
                rows_report = [row_report(each_row) for each_row in rows]
                write_json(json, {"environment": environment_report(), "threads": threads, "rows": rows_report})
    output().print(table(rows))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.compiled_loops")
