"""Trains both models with a progress display, and prints a comparison."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fusedrnn
from examples.char_lm import plots
from examples.char_lm.results import Results, Run, report
from examples.char_lm.settings import Settings
from examples.char_lm.text import Corpus, load
from fusedrnn.bench.report import environment_report
from fusedrnn.cli.console import output, write_json
from fusedrnn.extras import needs

_REDRAWS_PER_SECOND = 4
"""A low rate, since drawing takes time from the training."""

_LINES_PER_RUN = 10
"""The number of progress lines of a run if the output is not a terminal."""

_RATE_WINDOW = 20
"""The number of latest steps from which the progress bar computes its rate."""


def prepare(settings: Settings, text: Path | None) -> Corpus:
    """Load the text.

    Raises:
        ModuleNotFoundError: If PyTorch is missing.
        ValueError: If the text cannot be read or is too short.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(needs("examples.char_lm", "torch"))
    corpus = load(text)
    corpus.check(settings.batch, settings.length)
    return corpus


def run(settings: Settings, corpus: Corpus, json_path: Path | None, plot_path: Path | None) -> Results:
    """Train both models, print the comparison, and write the files. After Ctrl-C, show what was measured so far.

    Raises:
        ValueError: If a loss is not finite.
    """
    import torch

    results, threads_before = Results(settings), torch.get_num_threads()
    console = output()
    machine = environment_report()
    console.print(
        f"{machine['processor']}, {machine['target_description']}, threads: {settings.threads}", highlight=False
    )
    console.print(_describe(settings, corpus), markup=False, highlight=False)
    try:
        torch.set_num_threads(settings.threads)
        with fusedrnn.thread_limits(settings.threads):
            _train_all(results, corpus)
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        torch.set_num_threads(threads_before)
    _show(console, results)
    if json_path:
        write_json(json_path, report(results, corpus))
    if plot_path:
        plots.plot(results.measured, plot_path)
    return results


def _train_all(results: Results, corpus: Corpus) -> None:
    from examples.char_lm.model import CONTENDERS, FUSED, build
    from examples.char_lm.training import sample, train, validate

    settings = results.settings
    results.runs = [Run(name) for name in CONTENDERS]
    with _progress(results) as show_step:
        for run in results.runs:
            model = build(run.name, len(corpus.alphabet), settings)
            train(model, corpus, settings, run, show_step)
            run.held_out = validate(model, corpus, settings)
            if run.name == FUSED:
                results.sample = sample(model, corpus, settings)


def _describe(settings: Settings, corpus: Corpus) -> str:
    layers = "one layer" if settings.layers == 1 else f"{settings.layers} layers"
    return (
        f"{corpus.name}: {len(corpus.train):,} characters to learn from, {len(corpus.alphabet)} different ones\n"
        f"{settings.cell.upper()}, {layers} of {settings.hidden}\n"
        f"{settings.steps} steps of {settings.batch} by {settings.length} characters"
    )


@contextmanager
def _progress(results: Results) -> Iterator[Callable[[Run], None]]:
    """Show progress on standard error: a bar per run on a terminal, else lines. Yields a function for each step."""
    console, settings = Console(stderr=True), results.settings
    if not console.is_terminal:
        interval = max(1, settings.steps // _LINES_PER_RUN)

        def print_line(run: Run) -> None:
            if len(run.steps) % interval == 0 or len(run.steps) == settings.steps:
                typer.echo(f"{run.name}: step {len(run.steps)}/{settings.steps}, {_status(run, settings)}", err=True)

        yield print_line
        return
    columns = (
        *(TextColumn("{task.description:8}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn(compact=True)),
    )
    with Progress(*columns, console=console, refresh_per_second=_REDRAWS_PER_SECOND) as progress:
        tasks = {
            run.name: progress.add_task(run.name, total=settings.steps, start=False, status="") for run in results.runs
        }

        def update_bar(run: Run) -> None:
            if len(run.steps) == 1:
                progress.start_task(tasks[run.name])
            progress.update(tasks[run.name], completed=len(run.steps), status=_status(run, settings))

        yield update_bar


def _status(run: Run, settings: Settings) -> str:
    rate = settings.tokens / median(step.seconds for step in run.steps[-_RATE_WINDOW:])
    return f"loss {run.steps[-1].bits:.3f}, {rate:,.0f} tokens/s"


def _show(console: Console, results: Results) -> None:
    """Print the comparison and the sample."""
    measured = results.measured
    if results.interrupted:
        console.print("interrupted; this was measured so far" if measured else "interrupted")
    if measured:
        console.print()
        console.print(_table(results))
    if differences := results.differences:
        largest, typical = f"{max(differences):.1g}", f"{median(differences):.1g}"
        console.print()
        console.print(f"Bits per character between the loss curves: {largest} at most, {typical} in the median.\n")
    if results.sample:
        console.rule(f"sample of the fused model at temperature {results.settings.temperature:g}")
        console.print(results.sample, markup=False, highlight=False, soft_wrap=True)
        console.rule()


def _table(results: Results) -> Table:
    measured, ratios = results.measured, results.ratios
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for run in measured:
        table.add_column(run.name, justify="right")
    if ratios:
        table.add_column("fused / torch.nn", justify="right")

    def row(name: str, cells: list[str], ratio: float | None = None) -> None:
        table.add_row(name, *cells, *([f"{ratio:.2f}" if ratio else ""] if ratios else []))

    row("tokens/s, median step", [f"{results.rate(run):,.0f}" for run in measured], ratios.get("median_step"))
    row("seconds, end to end", [f"{run.total:.1f}" for run in measured], ratios.get("end_to_end"))
    row("seconds, first step", [f"{run.steps[0].seconds:.2f}" for run in measured])
    row("steps", [str(len(run.steps)) for run in measured])
    row("final loss, bits per character", [f"{run.steps[-1].bits:.3f}" for run in measured])
    row("held-out loss", ["" if run.held_out is None else f"{run.held_out:.3f}" for run in measured])
    return table
