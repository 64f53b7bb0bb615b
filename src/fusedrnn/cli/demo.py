"""``fusedrnn demo``: trains one model twice, and shows what was learned and how fast."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fusedrnn
from fusedrnn.bench.facts import machine
from fusedrnn.cli.console import output
from fusedrnn.demo import plots
from fusedrnn.demo.results import Results, Run, report
from fusedrnn.demo.settings import Settings
from fusedrnn.demo.text import Corpus, load

_REDRAWS = 4  # a second: drawing takes time from the training
_LINES = 10  # for each run, where there is no terminal to draw bars on
_RECENT = 20  # steps behind the rate that a bar shows


def prepare(settings: Settings, text: Path | None) -> Corpus:
    """The text to learn from, if all that is needed is there.

    Raises:
        ModuleNotFoundError: If PyTorch is missing.
        ValueError: If the text is missing, no text, or too short.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("the demo needs PyTorch: pip install 'fusedrnn[bench,torch]'")
    corpus = load(text)
    corpus.check(settings.batch, settings.length)
    return corpus


def run(settings: Settings, corpus: Corpus, json_path: Path | None, plot_path: Path | None) -> Results:
    """Train, print, write the files; after Ctrl-C with what there is by then.

    Raises:
        ValueError: If a loss is not finite.
    """
    import torch

    results, before = Results(settings), torch.get_num_threads()
    console = output()
    facts = machine()
    console.print(f"{facts['processor']}, {facts['target_description']}, threads: {settings.threads}", highlight=False)
    console.print(_described(settings, corpus), markup=False, highlight=False)
    try:
        torch.set_num_threads(settings.threads)
        with fusedrnn.thread_limits(settings.threads):
            _train_all(results, corpus)
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        torch.set_num_threads(before)
    _show(console, results)
    if json_path:
        json_path.write_text(json.dumps(report(results, corpus), indent=2) + "\n", encoding="utf-8")
    if plot_path:
        plots.plot(results.measured, plot_path)
    return results


def _train_all(results: Results, corpus: Corpus) -> None:
    # PyTorch takes seconds to import, and the other commands do without it.
    from fusedrnn.demo.model import CONTENDERS, FUSED, build
    from fusedrnn.demo.training import sample, train, validate

    settings = results.settings
    results.runs = [Run(name) for name in CONTENDERS]
    with _progress(results) as show:
        for run in results.runs:
            model = build(run.name, len(corpus.alphabet), settings)
            train(model, corpus, settings, run, show)
            run.held_out = validate(model, corpus, settings)
            if run.name == FUSED:
                results.sample = sample(model, corpus, settings)


def _described(settings: Settings, corpus: Corpus) -> str:
    layers = "one layer" if settings.layers == 1 else f"{settings.layers} layers"
    return (
        f"{corpus.name}: {len(corpus.train):,} characters to learn from, {len(corpus.alphabet)} different ones\n"
        f"{settings.cell.upper()}, {layers} of {settings.hidden}\n"
        f"{settings.steps} steps of {settings.batch} by {settings.length} characters"
    )


@contextmanager
def _progress(results: Results) -> Iterator[Callable[[Run], None]]:
    """Show progress on standard error, a bar for each run; lines where there is no terminal. Yields what to call."""
    console, settings = Console(stderr=True), results.settings
    if not console.is_terminal:
        every = max(1, settings.steps // _LINES)

        def line(run: Run) -> None:
            if len(run.steps) % every == 0 or len(run.steps) == settings.steps:
                typer.echo(f"{run.name}: step {len(run.steps)}/{settings.steps}, {_now(run, settings)}", err=True)

        yield line
        return
    columns = (
        *(TextColumn("{task.description:8}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[now]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn(compact=True)),
    )
    with Progress(*columns, console=console, refresh_per_second=_REDRAWS) as progress:
        names, total = [run.name for run in results.runs], settings.steps
        tasks = {name: progress.add_task(name, total=total, start=False, now="") for name in names}

        def bar(run: Run) -> None:
            if len(run.steps) == 1:
                progress.start_task(tasks[run.name])
            progress.update(tasks[run.name], completed=len(run.steps), now=_now(run, settings))

        yield bar


def _now(run: Run, settings: Settings) -> str:
    rate = settings.tokens / median(step.seconds for step in run.steps[-_RECENT:])
    return f"loss {run.steps[-1].bits:.3f}, {rate:,.0f} tokens/s"


def _show(console: Console, results: Results) -> None:
    """Print the comparison, and the sample."""
    measured = results.measured
    if results.interrupted:
        console.print("interrupted; this is what was measured by then" if measured else "interrupted")
    if measured:
        console.print()
        console.print(_table(results))
    if apart := results.differences:
        furthest, usual = f"{max(apart):.1g}", f"{median(apart):.1g}"
        console.print()
        console.print(f"Bits per character between the loss curves: {furthest} at most, {usual} in the median.\n")
    if results.sample:
        console.rule(f"written by the fused model at temperature {results.settings.temperature:g}")
        # As it is: no markup, and no line broken by rich.
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
    row("of them in the first step", [f"{run.steps[0].seconds:.2f}" for run in measured])
    row("steps", [str(len(run.steps)) for run in measured])
    row("last loss, bits per character", [f"{run.steps[-1].bits:.3f}" for run in measured])
    row("on held-out text", ["" if run.held_out is None else f"{run.held_out:.3f}" for run in measured])
    return table
