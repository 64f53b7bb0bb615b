"""ONNX: the operator in terms of the standard's own LSTM, GRU and RNN."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from fusedrnn.torch.imports import after_import
from torch import Tensor

# Where PyTorch's exporter makes its table of decompositions, from torch 2.5 on.
_TABLES = "torch.onnx._internal.exporter._decomp"
_NODES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
# Where ONNX has our gates: ours are i f g o, its i o f c; ours r z n, its z r h.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def register(operator: Any) -> None:
    """Make torch.onnx.export (dynamo) write the operator ``fusedrnn::rnn`` as standard nodes.

    The exporter decomposes whatever it has no translation for by a table that it makes for itself; ours is an entry
    of that table alone. In torch's global table it would reach make_fx and run_decompositions as well, which would
    take ONNX nodes, that compute nothing in PyTorch, for arithmetic.
    """
    after_import(_TABLES, lambda: _patch(operator))


def _patch(operator: Any) -> None:
    tables = sys.modules[_TABLES]
    create = getattr(tables, "create_onnx_friendly_decomposition_table", None)
    if create is None:
        return

    @functools.wraps(create)
    def create_with_ours(onnx_registered_ops: Any) -> dict[Any, Any]:
        table: dict[Any, Any] = create(onnx_registered_ops)
        if operator not in onnx_registered_ops:  # the user's own translation comes first
            table[operator] = decompose
        return table

    untyped: Any = tables
    untyped.create_onnx_friendly_decomposition_table = create_with_ours


def decompose(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
    mode: str,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    projection_size: int,
) -> list[Tensor]:
    """The operator ``fusedrnn::rnn`` as one ONNX node for each layer; arguments and results are the operator's.

    Raises:
        NotImplementedError: For a packed sequence, dropout or a projection: ONNX has none of these.
    """
    if batch_sizes is not None:
        raise NotImplementedError("packed sequences: ONNX has no such thing; export the padded model")
    if dropout:
        raise NotImplementedError("dropout between layers: ONNX has none; call model.eval() before exporting")
    if projection_size:
        raise NotImplementedError(f"a projection (proj_size={projection_size}): ONNX's LSTM has none")
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    finals = []
    for layer in range(num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        initial = [None if state is None else state[rows] for state in (h0, c0)]
        operands = _operands(weights[layer * per_layer : (layer + 1) * per_layer], mode, hidden_size)
        x, *final = _node(x, operands, initial, lengths, mode, hidden_size, directions)
        finals.append(final)
    return [x, *(torch.cat(states) for states in zip(*finals, strict=True))]


def _operands(weights: Sequence[Tensor | None], mode: str, hidden_size: int) -> list[Tensor | None]:
    """W (D, G·H, in), R (D, G·H, H) and B (D, 2·G·H) of one layer, gates in ONNX's order."""

    # Slices and concatenations only: these the exporter computes ahead.
    def reordered(weight: Tensor) -> Tensor:
        gates = [weight[gate * hidden_size : (gate + 1) * hidden_size] for gate in _GATES[mode]]
        return torch.cat(gates).unsqueeze(0)

    passes = [weights[start : start + 4] for start in range(0, len(weights), 4)]
    ready = [[reordered(weight) for weight in one if weight is not None] for one in passes]
    w, r = (torch.cat([one[kind] for one in ready]) for kind in (0, 1))
    biases = [torch.cat(one[2:], 1) for one in ready if one[2:]]
    return [w, r, torch.cat(biases) if biases else None]


def _node(
    x: Tensor,
    operands: list[Tensor | None],
    initial: list[Tensor | None],
    lengths: Tensor | None,
    mode: str,
    hidden_size: int,
    directions: int,
) -> list[Tensor]:
    from torch.onnx import ops

    steps, batch = x.shape[:2]
    states = 2 if mode == "lstm" else 1
    attributes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if mode == "gru":
        attributes["linear_before_reset"] = 1
    if mode == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    valid = None if lengths is None else lengths.to(torch.int32)
    shape = (directions, batch, hidden_size)
    y, *final = ops.symbolic_multi_out(
        _NODES[mode],
        (x, *operands, valid, *initial[:states]),
        attributes,
        dtypes=[x.dtype] * (1 + states),
        shapes=[(steps, directions, batch, hidden_size), *[shape] * states],
    )
    # (T, D, N, H), not (T, N, D·H).
    return [y.transpose(1, 2).reshape(steps, batch, directions * hidden_size), *final]
