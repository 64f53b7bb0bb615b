"""``python -m benchmarks.pytorch_cells``: PyTorch's cells and the fused ones, step by step, in turns in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn import RNNCellBase

import fusedrnn.torch
from benchmarks.timed_rows import TimedRow, take_turns
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.bench.report import environment_report
from fusedrnn.bench.tables import duration, new_table
from fusedrnn.bench.torch_contenders import threads as torch_threads
from fusedrnn.cli import options
from fusedrnn.cli.console import check_writable, fail, output, steps, write_json
from fusedrnn.cli.program import Program
from fusedrnn.testing.cases import Case

TORCH, FUSED = "torch.nn", "fused"
CELLS = "RNNCell", "GRUCell", "LSTMCell"
_SIZES = "16x1,64x16,256x1,512x1,512x16"

app = Program()


def run_row(case: Case, cell: str, phase: str, peak: RunPeak, seconds: float) -> TimedRow:
    """Check and time a cell.

    Raises:
        AssertionError: If results differ.
    """
    torch.manual_seed(0)
    module: RNNCellBase = getattr(torch.nn, cell)(case.I, case.H)
    fused: RNNCellBase = getattr(fusedrnn.torch, cell)(case.I, case.H)
    fused.load_state_dict(module.state_dict())
    is_training = phase == "training"
    tensors = [torch.randn(case.N, size, requires_grad=is_training) for size in (case.I, case.H, case.H)]
    x, states = tensors[0], tensors[1:] if cell == "LSTMCell" else tensors[1:2]
    step = training_step if is_training else inference_step
    calls = {name: step(contender, x, states) for name, contender in ((TORCH, module), (FUSED, fused))}
    torch.testing.assert_close(calls[FUSED](), calls[TORCH]())
    return TimedRow(case, cell, phase, take_turns(calls, seconds, peak))


def inference_step(cell: RNNCellBase, x: Tensor, states: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that returns the next states."""
    hx = tuple(states) if len(states) > 1 else states[0]

    def call() -> list[Tensor]:
        with torch.inference_mode():
            return _as_list(cell(x, hx))

    return call


def training_step(cell: RNNCellBase, x: Tensor, states: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that returns the gradients of the input, the states and the parameters."""
    hx = tuple(states) if len(states) > 1 else states[0]
    operands = [x, *states, *cell.parameters()]

    def call() -> list[Tensor]:
        for operand in operands:
            operand.grad = None
        final = _as_list(cell(x, hx))
        torch.autograd.backward(final, [torch.ones_like(state) for state in final])
        return [operand.grad for operand in operands if operand.grad is not None]

    return call


def _as_list(states: Any) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def table(rows: list[TimedRow]) -> Table:
    """The medians, and how many times as fast the fused cell is."""
    result = new_table("Medians, and ratios of them", ("", TORCH, FUSED, f"{TORCH} / {FUSED}"))
    for row in rows:
        times = [duration(row.timings[name].median) for name in (TORCH, FUSED)]
        result.add_row(row.name, *times, f"{row.ratio(TORCH, FUSED):.2f}")
    return result


def parse_sizes(text: str) -> list[Case]:
    """The cases of ``"HxN,HxN"``: steps of N sequences with H inputs and units.

    Raises:
        ValueError: If the text has another form.
    """
    cases = []
    for each in text.split(","):
        units, _, batch = each.strip().partition("x")
        if not (units.isdecimal() and batch.isdecimal() and int(units) and int(batch)):
            raise ValueError(f"--sizes must be units x sequences, as in {_SIZES}; got {each.strip()!r}")
        cases.append(Case(f"{int(units)}x{int(batch)}", 1, int(batch), int(units), int(units)))
    return cases


@app.command()
def main(
    sizes: Annotated[str, typer.Option(help="Numbers of units and sequences, separated by commas.")] = _SIZES,
    cell: Annotated[str, typer.Option(help=f"Cells, separated by commas: {', '.join(CELLS)}.")] = ",".join(CELLS),
    phases: options.Phases = options.ALL_PHASES,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    seconds: options.Seconds = 1.0,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
) -> None:
    """Compare the fused cells with torch.nn's. Training is a step and the gradients of everything it reads."""
    try:
        check_writable("--json", json)
        chosen = [
            (case, each, phase)
            for case in parse_sizes(sizes)
            for each in options.parse_names(cell, "cell", CELLS)
            for phase in options.parse_names(phases, "phase", PHASES)
        ]
    except ValueError as error:
        fail(str(error))
    rows, peak = list[TimedRow](), RunPeak("float32", threads)
    with torch_threads(threads), steps(len(chosen)) as progress:
        for case, each, phase in chosen:
            progress.say(f"{case.name}, {each}, {phase}")
            rows.append(run_row(case, each, phase, peak, seconds))
            progress.done(f"{rows[-1].name}: {rows[-1].ratio(TORCH, FUSED):.2f}")
    if json:
        report = [{"case": row.case.name, "cell": row.mode, "phase": row.phase, **row.seconds_report()} for row in rows]
        write_json(json, {"environment": environment_report(), "threads": threads, "rows": report})
    output().print(table(rows))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.pytorch_cells")
