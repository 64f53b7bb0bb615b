"""The same network out of torch's own operations: slow, but differentiable any number of times.

The maths of a cell comes from the one definition that the kernels are made from.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from fusedrnn.cell.cells import traced
from fusedrnn.cell.expr import Leaf, evaluate
from fusedrnn.cell.leaves import PreH, PreX, Projected, State
from fusedrnn.dropout import mask, scale
from fusedrnn.engines.reference.forward import gate_rows
from fusedrnn.layout import Kind
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.tensor_calls import Problem
from torch import Tensor


class TorchArithmetic:
    """The operations of a cell on tensors."""

    const = staticmethod(float)
    add = staticmethod(operator.add)
    sub = staticmethod(operator.sub)
    mul = staticmethod(operator.mul)
    tanh = staticmethod(torch.tanh)
    sigmoid = staticmethod(torch.sigmoid)
    relu = staticmethod(torch.relu)

    @staticmethod
    def pass_positive(gate: Tensor, value: Tensor) -> Tensor:
        """``value`` where the gate is positive or NaN, else zero."""
        return torch.where(gate <= 0, 0, value)

    div = staticmethod(operator.truediv)
    absolute = staticmethod(torch.abs)
    expm1 = staticmethod(torch.expm1)
    softplus = staticmethod(torch.nn.functional.softplus)
    clip = staticmethod(torch.clamp)

    @staticmethod
    def signed_by(x: Tensor, value: Tensor) -> Tensor:
        """``value``, its sign changed where x is negative."""
        return torch.where(x < 0, -value, value)

    @staticmethod
    def clip_nan(x: Tensor, low: float, high: float) -> Tensor:
        """The number, or the limit that it is beyond; the lower limit for NaN."""
        return torch.where(torch.isnan(x), low, torch.clamp(x, low, high))

    @staticmethod
    def pass_between(x: Tensor, low: float, high: float, value: Tensor) -> Tensor:
        """``value`` where x is within the limits, else zero."""
        return torch.where((low <= x) & (x <= high), value, 0)


class Extent(NamedTuple):
    """How far the sequences of a call reach.

    Attributes:
        steps: T.
        batch: N.
        alive: Which steps of each sequence count, (T, N); None for all.
        packed: Whether input and output hold these steps only, time by time.
    """

    steps: int
    batch: int
    alive: Tensor | None = None
    packed: bool = False

    @classmethod
    def of(cls, problem: Problem) -> Extent:
        """That of a call of the kernels."""
        ragged = problem.ragged
        if ragged is None:
            return cls(problem.steps, problem.batch)
        alive = torch.arange(problem.steps)[:, None] < torch.from_numpy(ragged.lengths)
        return cls(problem.steps, problem.batch, alive, ragged.firsts is not None)


def gradients(
    spec: RNNSpec,
    extent: Extent,
    seed: int,
    operands: Sequence[Tensor | None],
    dresults: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of each operand (x, initial states, weights) as far as wanted, themselves in the graph if recorded.

    ``dresults`` are those of the output and the final states, None for zeros.
    """
    record = torch.is_grad_enabled()
    count = len(spec.state_names)
    with torch.enable_grad():
        # Each operand by a view of its own: one may be made from another, or be given twice, and what lies beyond it is
        # not this call's to count.
        x, *others = (one if one is None else one.view_as(one) for one in operands)
        assert x is not None
        sources = [s for s, want in zip((x, *others), wanted, strict=True) if want and s is not None]
        for source in sources:
            if not source.requires_grad:
                source.requires_grad_()
        results = run(spec, extent, seed, x, others[:count], others[count:])
    pairs = [(result, d) for result, d in zip(results, dresults, strict=True) if d is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    options = {"create_graph": record, "allow_unused": True, "materialize_grads": True}
    computed = iter(torch.autograd.grad(outputs, sources, cotangents, **options))
    return [
        next(computed) if want and operand is not None else None
        for operand, want in zip((x, *others), wanted, strict=True)
    ]


def run(
    spec: RNNSpec,
    extent: Extent,
    seed: int,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The output, then the final states; ``x`` and the output packed if the extent is; None for states of zeros."""
    steps, batch, alive, packed = extent
    place = None
    if alive is not None and packed:
        place = alive.nonzero(as_tuple=True)
        x = x.new_zeros(steps, batch, spec.input_size).index_put(place, x)
    elif alive is not None:
        # A derivative that is zero here, times NaN in the padding, would be NaN.
        x = torch.where(alive[:, :, None], x, 0)
    initial = [
        x.new_zeros(shape) if one is None else one for shape, one in zip(spec.state_shape(batch), states, strict=True)
    ]
    last: list[tuple[Tensor, ...]] = []
    per_pass = len(weights) // (spec.num_layers * spec.num_directions)
    for layer in range(spec.num_layers):
        if layer and spec.drops:
            kept = mask(seed, spec.dropout, layer - 1, steps, batch, spec.output_size)
            x = torch.where(torch.from_numpy(kept), x * scale(spec.dropout), 0)
        outputs = []
        for direction in range(spec.num_directions):
            number = len(last)
            own = weights[number * per_pass : (number + 1) * per_pass]
            y, after = _unrolled(spec, x, [state[number] for state in initial], own, alive, spec.reverses(direction))
            outputs.append(y)
            last.append(after)
        x = torch.cat(outputs, dim=2)
    y = x if place is None else x[place]
    return y, *(torch.stack(column) for column in zip(*last, strict=True))


def _unrolled(
    spec: RNNSpec,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    alive: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one layer: the outputs (T, N, H) and the last states."""
    named = dict(zip(spec.layout.kinds, weights, strict=True))
    x_weight = named["i2h_weight"]
    assert x_weight is not None
    x_gates = torch.nn.functional.linear(x, x_weight, named.get("i2h_bias"))
    steps = len(x)
    outputs: list[Tensor] = [x] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        if alive is None:
            states = _step(spec, x_gates[t], states, named)
            outputs[t] = states[0]
            continue
        counts = alive[t, :, None]
        # What a step makes of states that may be infinite is not used in padding, but is differentiated.
        new = _step(spec, x_gates[t], [torch.where(counts, state, 0) for state in states], named)
        outputs[t] = torch.where(counts, new[0], 0)
        states = [torch.where(counts, after, before) for after, before in zip(new, states, strict=True)]
    return torch.stack(outputs), tuple(states)


def _step(
    spec: RNNSpec, x_gates: Tensor, states: Sequence[Tensor], weights: Mapping[Kind, Tensor | None]
) -> list[Tensor]:
    cell = traced(spec.variant)
    h_weight, h_bias, projection = weights["h2h_weight"], weights.get("h2h_bias"), weights.get("h2r_weight")
    assert h_weight is not None
    rows = gate_rows(cell, len(h_weight))
    values: dict[Leaf, Tensor] = {State(name): state for name, state in zip(cell.states, states, strict=True)}
    values.update({PreX(gate): x_gates[:, rows[gate]] for gate in cell.gates})
    for stage in cell.stages:
        operand = evaluate([stage.operand], values, TorchArithmetic())[0]
        if stage.projects:
            assert projection is not None
            values[Projected()] = torch.nn.functional.linear(operand, projection)
        for gate in stage.gates:
            bias = None if h_bias is None else h_bias[rows[gate]]
            values[PreH(gate)] = torch.nn.functional.linear(operand, h_weight[rows[gate]], bias)
    return evaluate(cell.outputs, values, TorchArithmetic())
