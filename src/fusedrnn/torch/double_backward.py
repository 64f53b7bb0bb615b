"""The operator's decomposition into torch's own operations: slow, but differentiable any number of times.

The equations come from the same definition of the cell as the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.leaves import PreH, PreX, Projected, RawInput, State
from fusedrnn.cell.primitives import ArrayArithmetic
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.trace import traced_cell
from fusedrnn.cell.traversal import evaluate
from fusedrnn.cell.weights import gate_rows
from fusedrnn.dropout import input_stream, mask, scale
from fusedrnn.engines.reference.masks import StepMasks, random_masks
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.network import CallShape, Tensors

Weights = Mapping[Kind, Tensor | None]


def _clip_nan(x: Tensor, low: float, high: float) -> Tensor:
    return torch.where(torch.isnan(x), low, torch.clamp(x, low, high))


def _softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=40)  # above, exp(-x) has no effect, even in float64


_TENSORS = ArrayArithmetic(
    torch, {"sigmoid": torch.sigmoid, "relu": torch.relu, "softplus": _softplus, "clip_nan": _clip_nan}
)
"""Evaluates expressions on tensors."""


class Extent(NamedTuple):
    """The sequence lengths of a call.

    Attributes:
        steps: T.
        batch: N.
        valid: Which steps of each sequence are valid, (T, N); None for all.
        packed: Whether input and output hold only valid steps, ordered by time.
        resets: Where sequences begin anew, (T, N); None for nowhere.
        all_states: Whether the other states of every step are results too, after the final states.
    """

    steps: int
    batch: int
    valid: Tensor | None = None
    packed: bool = False
    resets: Tensor | None = None
    all_states: bool = False

    @classmethod
    def of(cls, shape: CallShape) -> Extent:
        """The extent of a call of the kernels."""
        varlen = shape.varlen
        resets = None if shape.resets is None else torch.from_numpy(shape.resets)
        if varlen is None:
            return cls(shape.steps, shape.batch, resets=resets, all_states=shape.all_states)
        valid = torch.arange(shape.steps, device="cpu")[:, None] < torch.from_numpy(varlen.lengths)
        return cls(shape.steps, shape.batch, valid, varlen.row_offsets is not None, resets, shape.all_states)

    @classmethod
    def of_tensors(
        cls, x: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None, resets: Tensor | None = None,
        all_states: bool = False,
    ) -> Extent:  # fmt: skip
        """The extent of a call with this input, and lengths or the batch sizes of a packed sequence on the CPU."""
        resets = None if resets is None else resets.to(x.device)
        valid: Tensor | None
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
            valid = torch.arange(batch, device="cpu") < batch_sizes[:, None]
            return cls(len(batch_sizes), batch, valid.to(x.device), True, resets, all_states)
        steps, batch = x.shape[:2]
        valid = None if lengths is None else (torch.arange(steps, device="cpu")[:, None] < lengths).to(x.device)
        return cls(steps, batch, valid, resets=resets, all_states=all_states)


def vjp(
    spec: RNNSpec, extent: Extent, seed: int, operands: Tensors, cotangents: Tensors, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of those operands (x, states, weights) that need one; differentiable if grad mode is on.

    ``cotangents`` are those of the output and the final states, None for zeros. For a step of a cell, tensors may lack
    the axes of steps and of sequences.
    """
    create_graph = torch.is_grad_enabled()
    num_states = len(operands) - 1 - len(spec.layout.by_layer_direction)
    with torch.enable_grad():
        # Views separate this call's gradients from other uses, since an operand may be computed from another, or passed
        # twice.
        x, *others = (operand if operand is None else operand.view_as(operand) for operand in operands)
        assert x is not None
        sources = [t for t, needed in zip((x, *others), needs_grad, strict=True) if needed and t is not None]
        for source in sources:
            if not source.requires_grad:
                source.requires_grad_()
        sequence = x if extent.packed else _with_all_axes(x, (extent.steps, extent.batch, spec.input_size))
        shapes = itertools.cycle(spec.state_shape(extent.batch))  # of initial states, then of states after resets
        states = list(map(_with_all_axes, others[:num_states], shapes))
        results = forward(spec, extent, seed, sequence, states, others[num_states:])
    all_pairs = zip(results, cotangents, strict=True)
    pairs = [(result, _with_all_axes(d, result.shape)) for result, d in all_pairs if d is not None]
    outputs, doutputs = zip(*pairs, strict=True)
    options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    grads = iter(torch.autograd.grad(outputs, sources, doutputs, **options))
    return [
        next(grads) if needed and operand is not None else None
        for operand, needed in zip((x, *others), needs_grad, strict=True)
    ]


def _with_all_axes(tensor: Any, shape: tuple[int, ...]) -> Any:
    """A tensor of a cell's step with the axes of sequences added; other tensors and None as they are."""
    return tensor if tensor is None or tensor.dim() == len(shape) else tensor.reshape(shape)


def forward(
    spec: RNNSpec, extent: Extent, seed: int, x: Tensor, states: Tensors, weights: Tensors
) -> tuple[Tensor, ...]:
    """The output, the final states, and the other states of every step if the extent says so; None stands for zeros.

    ``states`` are the initial states, and then the states after resets unless these are zeros. ``x`` and the results
    with an axis of time are packed if the extent is.
    """
    steps, batch, valid, packed, resets, all_states = extent
    if resets is not None and valid is not None:
        resets = resets & valid
    packed_indices = None
    if valid is not None and packed:
        packed_indices = valid.nonzero(as_tuple=True)
        x = x.new_zeros(steps, batch, spec.input_size).index_put(packed_indices, x)
    elif valid is not None:
        # NaN in the padding would turn the padding's zero derivative into NaN.
        x = torch.where(valid[:, :, None], x, 0)
    num_states = len(spec.state_names)
    initial = [
        x.new_zeros(shape) if state is None else state
        for shape, state in zip(spec.state_shape(batch), states[:num_states], strict=True)
    ]
    zeros: list[Any] = [None] * num_states
    reset_states = list(states[num_states:]) or zeros
    final: list[tuple[Tensor, ...]] = []
    per_direction = len(weights) // (spec.num_layers * spec.num_directions)
    for layer in range(spec.num_layers):
        if p := spec.dropout_of(layer):
            keeps = mask(seed, p, input_stream(layer), steps, batch, spec.layer_input_size(layer))
            x = torch.where(torch.from_numpy(keeps).to(x.device), x * scale(p), 0)
        columns = []
        kept = len(spec.other_states) if all_states and layer == spec.num_layers - 1 else 0
        for direction in range(spec.num_directions):
            row = len(final)
            named = dict(zip(spec.layout.kinds, weights[row * per_direction :], strict=False))
            before, reverse = [state[row] for state in initial], spec.reverses(direction)
            shape = batch, spec.hidden_size
            masks = random_masks(traced_cell(spec.variant), seed, row, steps, shape, np.float32, reverse)
            begins = [0 if state is None else state[row] for state in reset_states]
            every, last = _unrolled(spec, x, before, named, valid, reverse, resets, begins, kept, masks)
            columns.append(every)
            final.append(last)
        y, *others = (torch.cat(column, dim=2) for column in zip(*columns, strict=True))
        x = y + x if spec.adds_input(layer) else y
    y, *others = (array if packed_indices is None else array[packed_indices] for array in (x, *others))
    return y, *(torch.stack(rows) for rows in zip(*final, strict=True)), *others


def _unrolled(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor], weights: Weights, valid: Tensor | None, reverse: bool,
    resets: Tensor | None, begins: Sequence[Any], kept: int, masks: Iterator[StepMasks],
) -> tuple[list[Tensor], tuple[Tensor, ...]]:  # fmt: skip
    """One direction of one layer: the output and the last ``kept`` states of every step, then the final states.

    ``begins`` are the states after a reset.
    """
    rounded = _rounding(spec)
    weights = {kind: w if w is None or w.dim() == 1 else rounded(w) for kind, w in weights.items()}
    x_weight, h_weight = weights["i2h_weight"], weights.get("h2h_weight")
    assert x_weight is not None
    if h_weight is not None and spec.heads > 1:
        weights["h2h_weight"] = _full(h_weight, spec.heads)
    x_gates = torch.nn.functional.linear(rounded(x), x_weight, weights.get("i2h_bias"))
    steps = len(x)
    every: list[Sequence[Tensor]] = [()] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        own = {mask: torch.from_numpy(values).to(x) for mask, values in next(masks).items()}
        first = t + reverse  # the first step of the step's piece, if it has a mark
        if resets is not None and first < steps:
            marked = resets[first, :, None]
            states = [torch.where(marked, begin, state) for begin, state in zip(begins, states, strict=True)]
        if valid is None:
            output, states = _step(spec, x[t], x_gates[t], states, weights, own)
            every[t] = [output, *states[len(states) - kept :]]
            continue
        is_valid = valid[t, :, None]
        # The results of padding are unused, but they are differentiated, so states that may be infinite must not enter
        # them.
        before = [torch.where(is_valid, state, 0) for state in states]
        output, after = _step(spec, x[t], x_gates[t], before, weights, own)
        every[t] = [torch.where(is_valid, new, 0) for new in (output, *after[len(after) - kept :])]
        states = [torch.where(is_valid, new, old) for new, old in zip(after, states, strict=True)]
    return [torch.stack(column) for column in zip(*every, strict=True)], tuple(states)


def _full(blocks: Tensor, heads: int) -> Tensor:
    """Block-diagonal weights (rows, H / heads) as a full matrix (rows, H)."""
    size = blocks.shape[1]
    diagonal = torch.eye(heads, dtype=blocks.dtype, device=blocks.device).reshape(heads, 1, heads, 1)
    return (blocks.reshape(-1, heads, size, 1, size) * diagonal).reshape(-1, heads * size)


def _rounding(spec: RNNSpec) -> Callable[[Tensor], Tensor]:
    """The rounding of GEMM operands, whose derivative is 1."""
    return _to_bfloat16 if spec.compute == "bfloat16" else _unchanged


def _to_bfloat16(operand: Tensor) -> Tensor:
    # Both the difference and the sum are exact. With an infinity, they would be NaN.
    change = operand.detach().to(torch.bfloat16).to(operand.dtype) - operand.detach()
    return torch.where(torch.isfinite(change), operand + change, operand)


def _unchanged(operand: Tensor) -> Tensor:
    return operand


def _in_rows(value: Tensor | float, like: Tensor) -> Tensor:
    """A value in the shape (N, H) of ``like``; it may be a number, a mean, or depend on parameters alone."""
    return torch.full_like(like, value) if isinstance(value, float) else value.expand(like.shape)


def _moments(stage: Stage, values: Mapping[Leaf, Tensor], like: Tensor) -> dict[Leaf, Tensor]:
    """The means and variances (N, 1) of a stage of reductions."""
    moments: dict[Leaf, Tensor] = {}
    for reduction in stage.reductions:
        parts = evaluate(reduction.values, values, _TENSORS)
        row = torch.cat([_in_rows(part, like) for part in parts], dim=1)
        moments[reduction.mean] = row.mean(dim=1, keepdim=True)
        if reduction.variance is not None:
            moments[reduction.variance] = row.var(dim=1, correction=0, keepdim=True)
    return moments


def _step(
    spec: RNNSpec, x: Tensor, x_gates: Tensor, states: Sequence[Tensor], weights: Weights, masks: Mapping[Leaf, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The output of a step, and the states after it."""
    cell = traced_cell(spec.variant)
    h_weight, h_bias, projection = map(weights.get, ("h2h_weight", "h2h_bias", "h2r_weight"))
    rounded = _rounding(spec)
    x_rows, h_rows = gate_rows(cell, x_gates.shape[1], 0 if h_weight is None else len(h_weight))
    values: dict[Leaf, Tensor] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update(masks)
    values.update({PreX(gate): x_gates[:, own] for gate, own in x_rows.items()})
    if cell.reads_raw_input:
        values[RawInput()] = x
    values.update({leaf: weight for leaf in cell.parameters if (weight := weights[leaf.name]) is not None})
    for stage in cell.stages:
        if stage.reductions:
            values.update(_moments(stage, values, states[0]))
        if not stage.multiplies:
            continue
        operand = evaluate([stage.operand], values, _TENSORS)[0]
        if spec.projection_size is None:  # with a projection, an operand may be wider than h
            operand = _in_rows(operand, states[0])
        if stage.projects:
            assert projection is not None
            values[Projected()] = torch.nn.functional.linear(rounded(operand), projection)
        if stage.gates:
            assert h_weight is not None
            stacked = slice(h_rows[stage.gates[0]].start, h_rows[stage.gates[-1]].stop)
            bias = None if h_bias is None else h_bias[stacked]
            product = torch.nn.functional.linear(rounded(operand), h_weight[stacked], bias)
            values.update(zip(map(PreH, stage.gates), product.chunk(len(stage.gates), 1), strict=True))
    new = evaluate(cell.outputs, values, _TENSORS)
    after = [_in_rows(value, state) for value, state in zip(new, states, strict=False)]
    return after[0] if cell.output is None else _in_rows(new[-1], states[0]), after
