"""The options of the commands that describe the network and its streams."""

from __future__ import annotations

from typing import Annotated

import typer

from examples.stream_server.settings import CELLS, Settings
from fusedrnn.spec import RESIDUALS
from fusedrnn.spec_sizes import MAX_LAYERS

Cell = Annotated[str, typer.Option(help=f"{', '.join(CELLS)}, or a cell of your own: path.py:name or module:name.")]
Features = Annotated[int, typer.Option(min=1, help="Features of a frame.")]
Hidden = Annotated[
    str, typer.Option(help="Hidden units: a number for all layers, or one for each layer, separated by commas.")
]
Layers = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_LAYERS, help="Recurrent layers, if --hidden is a single number.", show_default="2"),
]
Residual = Annotated[
    str | None,
    typer.Option(help=f"What layers add to their output: {' or '.join(RESIDUALS)}.", show_default="nothing"),
]
HIDDEN = str(Settings.hidden[0])
"""The default of :data:`Hidden`."""
Capacity = Annotated[int, typer.Option("--capacity", "--streams", min=1, help="Streams at a time.")]
