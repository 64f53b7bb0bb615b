"""torch.onnx.export: the operator as ONNX's own LSTM, GRU and RNN nodes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.torch.cell_references import cell_of
from fusedrnn.torch.imports import after_import
from fusedrnn.torch.op_call import OpCall

# The module in which PyTorch's exporter creates its decomposition table, from torch 2.5 on.
_TABLES = "torch.onnx._internal.exporter._decomp"
_NODES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
# The index in our order of each of ONNX's gates. Our order is i f g o and r z n; ONNX's is i o f c and z r h.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def register() -> None:
    """Let torch.onnx.export (dynamo) write the operator ``fusedrnn::rnn`` as standard nodes.

    The exporter has its own table to decompose operators for which it has no translation. Our entry is only in that
    table: from torch's global table, make_fx and run_decompositions would also use it, and there ONNX nodes compute
    nothing.
    """
    after_import(_TABLES, _patch)


def _patch(tables: Any) -> None:
    create = getattr(tables, "create_onnx_friendly_decomposition_table", None)
    if create is None:
        return

    @functools.wraps(create)
    def create_with_ours(onnx_registered_ops: Any) -> dict[Any, Any]:
        table: dict[Any, Any] = create(onnx_registered_ops)
        operator: Any = torch.ops.fusedrnn.rnn.default
        if operator not in onnx_registered_ops:  # a translation of the user's takes precedence
            table[operator] = decompose
        return table

    tables.create_onnx_friendly_decomposition_table = create_with_ours


def decompose(*arguments: Any) -> list[Tensor]:
    """The operator ``fusedrnn::rnn`` as one ONNX node for each layer; arguments and results are the operator's.

    The nodes compute in the dtype of the tensors; a ``compute`` of another format gives a warning.

    Raises:
        NotImplementedError: For a packed sequence, dropout, a residual, a projection, resets or a user cell, which
            ONNX's nodes lack.
    """
    call = OpCall(*arguments)
    _check_has_nodes(call)
    if call.compute is not None:
        warnings.warn(
            f"compute={call.compute!r} is not exported: the nodes compute in the dtype of tensors, {call.x.dtype}",
            stacklevel=2,
        )
    directions = 2 if call.bidirectional else 1
    per_layer = len(call.weights) // call.num_layers
    x, finals = call.x, []
    for layer in range(call.num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        initial = [None if state is None else state[rows] for state in call.states]
        weights = call.weights[layer * per_layer : (layer + 1) * per_layer]
        inputs = [*_weight_inputs(weights, call.mode, call.hidden_size), call.lengths, *initial]
        x, *final = _node(x, inputs, call.mode, call.hidden_size, directions)
        finals.append(final)
    return [x, *(torch.cat(states) for states in zip(*finals, strict=True))]


def _check_has_nodes(call: OpCall) -> None:
    """Raise NotImplementedError for a call that ONNX's nodes do not compute."""
    if call.mode not in _NODES:
        raise NotImplementedError(f"{cell_of(call.mode)!r}: ONNX has no node for cells that users write")
    if call.batch_sizes is not None:
        raise NotImplementedError("packed sequences: ONNX has no such thing; export the padded model")
    if call.dropout:
        raise NotImplementedError("dropout between layers: ONNX has none; call model.eval() before exporting")
    if call.input_dropout:
        raise NotImplementedError("dropout of the input: ONNX has none; call model.eval() before exporting")
    if call.residual is not None:
        raise NotImplementedError(f"residual={call.residual!r}: ONNX's nodes have no residual connections")
    if call.projection_size:
        raise NotImplementedError(f"a projection (proj_size={call.projection_size}): ONNX's LSTM has none")
    if call.resets is not None:
        raise NotImplementedError("resets inside a sequence: ONNX has none")
    if call.all_states:
        raise NotImplementedError("all_states: ONNX's nodes return the output and the final states alone")


def _weight_inputs(weights: Sequence[Tensor | None], mode: str, hidden_size: int) -> list[Tensor | None]:
    """W (D, G·H, in), R (D, G·H, H) and B (D, 2·G·H) of one layer, gates in ONNX's order."""

    # Only slices and concatenations, because the exporter folds these.
    def reordered(weight: Tensor) -> Tensor:
        gates = [weight[gate * hidden_size : (gate + 1) * hidden_size] for gate in _GATES[mode]]
        return torch.cat(gates).unsqueeze(0)

    directions = [
        [reordered(weight) for weight in weights[first : first + 4] if weight is not None]
        for first in range(0, len(weights), 4)
    ]
    w, r = (torch.cat([direction[kind] for direction in directions]) for kind in (0, 1))
    biases = [torch.cat(direction[2:], 1) for direction in directions if direction[2:]]
    return [w, r, torch.cat(biases) if biases else None]


def _node(x: Tensor, inputs: Sequence[Tensor | None], mode: str, hidden_size: int, directions: int) -> list[Tensor]:
    """The output and final states of one ONNX node, whose ``inputs`` are W, R, B, lengths and the initial states."""
    from torch.onnx import ops

    steps, batch = x.shape[:2]
    attributes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if mode == "gru":
        attributes["linear_before_reset"] = 1
    if mode == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    w, r, b, lengths, *initial = inputs
    lengths = None if lengths is None else lengths.to(torch.int32)
    y, *final = ops.symbolic_multi_out(
        _NODES[mode],
        (x, w, r, b, lengths, *initial),
        attributes,
        dtypes=[x.dtype] * (1 + len(initial)),
        shapes=[(steps, directions, batch, hidden_size), *[(directions, batch, hidden_size)] * len(initial)],
    )
    # (T, D, N, H) to (T, N, D·H).
    return [y.transpose(1, 2).reshape(steps, batch, directions * hidden_size), *final]
