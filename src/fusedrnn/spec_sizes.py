"""The shapes of a spec's parameters, and checks of sizes that depend on one another."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn.cell.cells import RESIDUAL_GATE, Cell
from fusedrnn.cell.trace import traced_cell
from fusedrnn.number_formats import INT8_MAX_PRODUCTS
from fusedrnn.scalars import MAX_BYTES

MAX_LAYERS = 4096
"""A limit, since each layer of any size takes time and memory before the first call."""


def parameter_shapes(spec: Any, layer: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of each direction of a layer of a spec, the weights before the biases."""
    hidden = spec.hidden_size
    rows, h_rows = spec.num_input_gates * hidden, spec.num_recurrent_gates * hidden
    shapes: dict[str, tuple[int, ...]] = {"i2h_weight": (rows, spec.layer_input_size(layer))}
    if h_rows:
        shapes["h2h_weight"] = (h_rows, spec.state_size // spec.heads)
    if spec.projection_size is not None:
        shapes["h2r_weight"] = (spec.state_size, hidden)
    if spec.peepholes:
        shapes["peephole_weight"] = ((2 if spec.coupled_gates else 3) * hidden,)
    else:
        shapes.update({kind: (hidden,) for kind in spec.vector_kinds})
    shapes.update({kind: (1,) for kind in spec.scalar_kinds})
    if spec.bias != "none":
        shapes["i2h_bias"] = (rows,)
    if spec.bias == "double" and h_rows:
        shapes["h2h_bias"] = (h_rows,)
    return shapes


def num_weights(spec: Any) -> int:
    """The number of elements of all matrices that a step of a spec multiplies."""
    inputs = sum(spec.num_input_gates * spec.layer_input_size(layer) for layer in range(spec.num_layers))
    recurrent = spec.num_recurrent_gates * spec.state_size // spec.heads + (spec.projection_size or 0)
    elements: int = spec.num_directions * spec.hidden_size * (inputs + spec.num_layers * recurrent)
    return elements


def check_sizes(spec: Any) -> None:
    """Check the sizes of an :class:`fusedrnn.spec.RNNSpec`, each of which is valid by itself.

    Raises:
        ValueError: If they do not fit together, or are too large.
    """
    if spec.projection_size is not None and spec.projection_size >= spec.hidden_size:
        raise ValueError(
            f"projection_size must be smaller than hidden_size ({spec.hidden_size}); got {spec.projection_size}"
        )
    longest = max(spec.input_size, spec.hidden_size, spec.output_size)
    if spec.compute == "int8" and longest > INT8_MAX_PRODUCTS:
        raise ValueError(f"compute='int8' needs at most {INT8_MAX_PRODUCTS} features of a layer; got {longest}")
    if spec.num_layers > MAX_LAYERS:
        raise ValueError(f"num_layers must be at most {MAX_LAYERS}; got {spec.num_layers}")
    features = spec.input_size + (spec.num_layers - 1) * spec.output_size + spec.num_layers * (spec.state_size + 2)
    elements = spec.num_directions * spec.num_gates * spec.hidden_size * features
    if elements * np.dtype(spec.dtype).itemsize >= MAX_BYTES:
        raise ValueError(
            f"input_size, hidden_size and num_layers must make parameters of fewer than {MAX_BYTES} bytes; got "
            f"{spec.input_size}, {spec.hidden_size} and {spec.num_layers}"
        )
    if spec.heads > 1 and spec.hidden_size % spec.heads:
        raise ValueError(f"hidden_size must be a multiple of the heads of {spec.mode!r}; got {spec.hidden_size}")
    if spec.heads > 1 and spec.compute in ("int8", "int8_weights"):
        raise ValueError(f"compute={spec.compute!r} needs a cell of one head; got {spec.mode!r}")
    if spec.residual == "projection" and spec.projection_size is not None:
        raise ValueError(f"residual='projection' needs projection_size=None; got {spec.projection_size}")
    if spec.residual == "projection" and spec.gates.count(RESIDUAL_GATE) > 1:
        raise ValueError(f"residual='projection' needs a cell without a gate {RESIDUAL_GATE!r}; got {spec.mode!r}")
    if spec.residual == "identity" and not any(map(spec.adds_input, range(spec.num_layers))):
        raise ValueError(
            "residual='identity' needs a layer whose input has the size of its output: two layers or more, or an "
            f"input_size of {spec.output_size}; got {spec.num_layers} layer of {spec.input_size} inputs"
        )
    if isinstance(spec.mode, Cell) and traced_cell(spec.variant).reads_raw_input:
        for layer in range(min(2, spec.num_layers)):
            _check_raw_input(spec, layer)


def _check_raw_input(spec: Any, layer: int) -> None:
    """Raise a ValueError unless a layer has as many features as units, for a cell that reads the input itself."""
    size = spec.layer_input_size(layer)
    if size != spec.hidden_size:
        name = "the output of a layer" if layer else "input_size"
        raise ValueError(
            f"{name} must have the size of hidden_size ({spec.hidden_size}), as {spec.mode!r} reads x.raw; got {size}: "
            "for other sizes write x.k of one more gate k, a projection of the input, in place of x.raw"
        )
