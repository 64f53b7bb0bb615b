"""``python -m examples.char_lm``: the options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fusedrnn
from examples.char_lm import plots, run
from examples.char_lm.settings import CELLS, Settings
from fusedrnn.cli.console import check_writable, fail
from fusedrnn.cli.program import Program
from fusedrnn.env import MAX_THREADS

app = Program()


@app.command()
def main(
    cell: Annotated[str, typer.Option(help=f"{' or '.join(CELLS)}.")] = Settings.cell,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each layer.")] = Settings.hidden,
    layers: Annotated[int, typer.Option(min=1, help="Recurrent layers.")] = Settings.layers,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the parameters.")] = Settings.steps,
    batch: Annotated[int, typer.Option(min=1, help="Text streams in a batch.")] = Settings.batch,
    length: Annotated[int, typer.Option(min=1, help="Characters of each stream in a step.")] = Settings.length,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    dropout: Annotated[float, typer.Option(help="Between layers; the two curves then differ.")] = Settings.dropout,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of the initial parameters and of the sample.")
    ] = Settings.seed,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="For both models.", show_default="fusedrnn's own default")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to learn from.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Characters to generate at the end.")] = Settings.sample,
    temperature: Annotated[float, typer.Option(help="Of the sample; 0 is greedy.")] = Settings.temperature,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss curves into this file, such as loss.png.")] = None,
) -> None:
    """Train a character language model on English text, first with torch.nn, then with the fused layers.

    The model has an embedding, recurrent layers, a linear layer and softmax; the optimizer is Adam. Both runs start
    from the same parameters and read the same text, so their loss curves coincide. Times are of whole steps, including
    the work that is not recurrent. The last twentieth of the text is held out.

    The defaults take one to two minutes on two cores. Ctrl-C stops the training and shows what was measured so far.
    """
    try:
        settings = Settings(
            *(cell, hidden, layers, steps, batch, length, lr, dropout, seed),
            *(threads or fusedrnn.get_num_threads(), sample, temperature),
        )
        check_writable("--json", json)
        check_writable("--plot", plot)
        if plot and plot.suffix[1:].lower() not in plots.formats():
            raise ValueError(f"--plot {plot}: its ending must be one of {', '.join(plots.formats())}")
        results = run.run(settings, run.prepare(settings, text), json, plot)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    if results.interrupted:
        raise typer.Exit(130)


if __name__ == "__main__":
    app(prog_name="python -m examples.char_lm")
