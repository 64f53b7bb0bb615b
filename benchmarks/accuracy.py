"""``python -m benchmarks.accuracy``: how the formats of GEMM operands change the loss of a character model.

The model of ``examples.char_lm`` is trained with its layers in float32 and in bfloat16, for several seeds. The model
that was trained in float32 also runs in the formats of inference. All losses are on the held-out text, in bits per
character.

Training amplifies any difference, so a third model shows how much of the result is chance. It is trained in float32
from parameters that differ in their last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fusedrnn
from examples.char_lm.model import TORCH, CharacterModel, build
from examples.char_lm.results import Run
from examples.char_lm.settings import CELLS, Settings
from examples.char_lm.text import Corpus, load
from examples.char_lm.training import train, validate
from fusedrnn.cli.console import check_writable, fail, output, write_json
from fusedrnn.cli.program import Program
from fusedrnn.spec import COMPUTE
from fusedrnn.torch import accelerate

PERTURBED = "float32, last bit changed"
TRAINED = ("float32", PERTURBED, "bfloat16")
"""The models by the formats of their layers, and the model that shows the effect of chance."""
SCHEDULE = ((0.6, 1.0), (0.2, 0.25), (0.2, 0.0625))
"""Shares of the steps, and shares of the learning rate. With a constant rate, losses differ more by chance."""

AfterStep = Callable[[Run], None]

app = Program()


@dataclass(frozen=True)
class Losses:
    """The held-out losses of one model, in bits per character.

    Attributes:
        cell: ``"gru"`` or ``"lstm"``.
        seed: The seed of the initial parameters.
        trained: The loss of each of :data:`TRAINED`, computed in the format of the training.
        inferred: The loss of the model trained in float32, computed in each of the other formats.
    """

    cell: str
    seed: int
    trained: dict[str, float]
    inferred: dict[str, float]


def build_as(name: str, corpus: Corpus, settings: Settings) -> CharacterModel:
    """The example's model with its initial parameters, as one of :data:`TRAINED`."""
    model = build(TORCH, len(corpus.alphabet), settings)
    if name == PERTURBED:
        with torch.no_grad():
            for parameter in model.rnn.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
    accelerate(model, compute=None if name == PERTURBED else name)
    return model


def train_with_decay(
    model: CharacterModel, corpus: Corpus, settings: Settings, run: Run, after_step: AfterStep
) -> None:
    """Train with the learning rates of :data:`SCHEDULE`. With each rate, the text starts again."""
    for share_of_steps, share_of_rate in SCHEDULE:
        steps = max(1, round(share_of_steps * settings.steps))
        train(model, corpus, replace(settings, steps=steps, lr=share_of_rate * settings.lr), run, after_step)


def measure(corpus: Corpus, settings: Settings, after_step: AfterStep = lambda run: None) -> Losses:
    """Train the models of these settings, and compute their losses."""
    trained, inferred = {}, {}
    for name in TRAINED:
        model = build_as(name, corpus, settings)
        train_with_decay(model, corpus, settings, Run(name), after_step)
        trained[name] = validate(model, corpus, settings)
        if name != "float32":
            continue
        for format_name in COMPUTE:
            accelerate(model, compute=format_name)
            inferred[format_name] = validate(model, corpus, settings)
    return Losses(settings.cell, settings.seed, trained, inferred)


def rows(losses: Sequence[Losses]) -> Iterator[list[str]]:
    """The lines of the table: each model, and the mean of the models of each cell."""
    for cell in dict.fromkeys(entry.cell for entry in losses):
        differences = []
        for entry in (entry for entry in losses if entry.cell == cell):
            base = entry.trained["float32"]
            changes = [entry.trained[name] - base for name in TRAINED[1:]]
            changes += [entry.inferred[name] - base for name in COMPUTE]
            differences.append(changes)
            yield [cell, str(entry.seed), f"{base:.4f}", *(f"{change:+.4f}" for change in changes)]
        yield [cell, "mean", "", *(f"{mean(column):+.4f}" for column in zip(*differences, strict=True))]


@app.command()
def main(
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each layer.")] = Settings.hidden,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the parameters.")] = Settings.steps,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    seeds: Annotated[int, typer.Option(min=1, help="Models of each cell.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the losses to this file.")] = None,
) -> None:
    """Train the character model in float32 and bfloat16, run it in every format, and print the held-out losses.

    A column holds the difference to float32 in bits per character: first for models that were trained differently, then
    for the model that was trained in float32 and runs in another format.
    """
    try:
        check_writable("--json", json_path)
        all_settings = [
            Settings(cell=cell, hidden=hidden, steps=steps, lr=lr, seed=seed, threads=threads)
            for cell in CELLS
            for seed in range(seeds)
        ]
        corpus = load(None)
    except ValueError as error:
        fail(str(error))
    losses = _measure_all(corpus, all_settings)
    names = [*(f"trained: {name}" for name in TRAINED[1:]), *(f"run: {name}" for name in COMPUTE)]
    table = Table(*("cell", "seed", "float32", *names), box=None)
    for row in rows(losses):
        table.add_row(*row)
    output().print(table)
    if json_path:
        write_json(json_path, [vars(entry) for entry in losses])


def _measure_all(corpus: Corpus, all_settings: Sequence[Settings]) -> list[Losses]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    losses = []
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(all_settings[0].threads)
        with fusedrnn.thread_limits(all_settings[0].threads), Progress(*columns) as progress:
            task = progress.add_task("", total=len(all_settings) * len(TRAINED) * all_settings[0].steps)

            def show(run: Run) -> None:
                progress.update(task, advance=1, description=f"{settings.cell}, seed {settings.seed}, {run.name}")

            for settings in all_settings:
                losses.append(measure(corpus, settings, show))
                progress.console.print(f"{settings.cell}, seed {settings.seed}: {losses[-1]}")
    finally:
        torch.set_num_threads(threads_before)
    return losses


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.accuracy")
