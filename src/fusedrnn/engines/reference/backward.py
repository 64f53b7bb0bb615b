"""Backward in NumPy, step by step, in any float type: all gradients, from the tape of a training call.

Every step of every cell does its own GEMMs, also for the weights' gradients, which are added step by step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import repeat

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.expr import Expr, Leaf
from fusedrnn.cell.leaves import (
    NewState,
    OperandCotangent,
    OutputCotangent,
    ParamVector,
    PreH,
    PreX,
    Projected,
    RawInput,
    Saved,
    State,
    StateCotangent,
)
from fusedrnn.cell.trace import TracedCell, traced_cell
from fusedrnn.cell.traversal import evaluate
from fusedrnn.cell.weights import gate_rows, parameter_leaves
from fusedrnn.engines.reference import heads
from fusedrnn.engines.reference.forward import NUMPY, drop, in_rows, layer_weights
from fusedrnn.engines.reference.reductions import moment_cotangents
from fusedrnn.engines.reference.resets import Resets
from fusedrnn.engines.reference.rounding import Rounding, row_rounding
from fusedrnn.engines.reference.step_vjp import step_vjp
from fusedrnn.engines.reference.tape import DirectionTape, Tape
from fusedrnn.spec import RNNSpec

Rows = slice | Array
Step = tuple[int, int, Rows]
"""A step of backward: its index in the tape, its time, and the rows of the sequences active at that time."""


def backward(
    spec: RNNSpec,
    tape: Tape,
    dy: Array | None,
    dstates: Sequence[Array | None] | None = None,
    dall_states: Sequence[Array | None] = (),
    dresets: Sequence[Array] = (),
) -> tuple[Array, Array, tuple[Array, ...]]:
    """All gradients of a training call.

    Args:
        spec: The network.
        tape: The tape of the call.
        dy: The gradient of the output, (T, N, D·S), not read after the end of a sequence; None for zeros.
        dstates: The gradients of the final states, (L·D, N, size) each; None for zeros.
        dall_states: The gradients of the states of every step of the last layer that the output does not show,
            (T, N, D·size) each; None for zeros.
        dresets: Arrays like the initial states; the gradients of what replaced states at resets are added to them.

    Returns:
        The gradients of the input (T, N, I), of the flat parameters, and of each initial state (L·D, N, size).
    """
    cell = traced_cell(spec.variant)
    dparams = np.zeros_like(tape.params)
    shapes = spec.state_shape(tape.inputs[0].shape[1])
    dinitial = tuple(np.empty(shape, dparams.dtype) for shape in shapes)
    dfinal = [
        np.zeros(shape, dparams.dtype) if gradient is None else gradient
        for shape, gradient in zip(shapes, [None] * len(shapes) if dstates is None else dstates, strict=True)
    ]
    size = spec.state_size
    for layer in reversed(range(spec.num_layers)):
        dx = np.zeros_like(tape.inputs[layer])
        for direction in range(spec.num_directions):
            index = layer * spec.num_directions + direction
            weights = layer_weights(spec, tape.params, layer, direction)
            dweights = layer_weights(spec, dparams, layer, direction)
            own_dweights = dweights
            if spec.heads > 1:
                weights["h2h_weight"] = heads.to_full(weights["h2h_weight"], spec.hidden_size)
                own_dweights = dweights | {"h2h_weight": np.zeros_like(weights["h2h_weight"])}
            run = _DirectionBackward(cell, weights, own_dweights, tape.directions[index], row_rounding(spec.compute))
            reverse = spec.reverses(direction)
            steps = _steps(len(dx), tape.lengths, reverse)
            own_dy = None if dy is None else dy[:, :, direction * size : (direction + 1) * size]
            if layer == spec.num_layers - 1:
                run.dall_states = {
                    name: np.split(array, spec.num_directions, axis=2)[direction]
                    for name, array in zip(spec.other_states, dall_states, strict=False) if array is not None
                }  # fmt: skip
            if tape.resets is not None:
                own_dresets = [array[index] for array in dresets]
                run.cut = partial(_cut, Resets(tape.resets, None), reverse, own_dresets)
            before = run.unroll(steps, tape.inputs[layer], own_dy, [array[index] for array in dfinal], dx)
            if spec.heads > 1:
                dweights["h2h_weight"] += heads.to_blocks(own_dweights["h2h_weight"], spec.heads)
            for array, gradient in zip(dinitial, before, strict=True):
                array[index] = gradient
        if dy is not None and spec.adds_input(layer):
            for _, t, rows in _steps(len(dx), tape.lengths, False):
                dx[t, rows] += dy[t, rows]
        dx = drop(dx, tape.masks[layer], spec.dropout_of(layer)) if layer in tape.masks else dx
        dy = dx
    return dx, dparams, dinitial


def _steps(steps: int, lengths: Array | None, reverse: bool) -> Iterator[Step]:
    """The steps in backward's order."""
    for index in reversed(range(steps)):
        t = steps - 1 - index if reverse else index
        active = None if lengths is None else t < lengths
        if active is None or active.all():
            yield index, t, slice(None)
        elif active.any():
            yield index, t, np.flatnonzero(active)


def _cut(resets: Resets, reverse: bool, dresets: Sequence[Array], t: int, gradients: list[Array]) -> list[Array]:
    """The gradients of the states before the reset at time t; adds those of the replacements to ``dresets``."""
    before, of_replacements = resets.cut(t, reverse, gradients)
    for total, gradient in zip(dresets, of_replacements or (), strict=False):
        total += gradient
    return before


class _DirectionBackward:
    """Backward of one direction of one layer; adds to ``dweights``.

    Attributes:
        dall_states: The gradients (T, N, size) of some states of every step, by their names.
        cut: From the time of a step and the gradients of the states it started from to those of the states before it.
    """

    def __init__(
        self,
        cell: TracedCell,
        weights: Mapping[str, Array],
        dweights: Mapping[str, Array],
        tape: DirectionTape,
        rounded: Rounding,
    ) -> None:
        self._cell, self._vjp, self._tape = cell, step_vjp(cell), tape
        self.dall_states: Mapping[str, Array] = {}
        self.cut: Callable[[int, list[Array]], list[Array]] = lambda t, gradients: gradients
        self._linear = {
            kind: _Linear(weights[f"{kind}_weight"], dweights[f"{kind}_weight"], dweights.get(f"{kind}_bias"), rounded)
            for kind in ("i2h", "h2h", "h2r")
            if f"{kind}_weight" in weights
        }
        self._h_rows = gate_rows(cell, len(weights["i2h_weight"]), len(weights.get("h2h_weight", ())))[1]
        self._parameters, self._dparameters = parameter_leaves(cell, weights), parameter_leaves(cell, dweights)

    def unroll(
        self, steps: Iterable[Step], x: Array, dy: Array | None, dstates: list[Array], dx: Array
    ) -> list[Array]:
        """All steps: from the gradients of the final states to those of the initial states; adds to ``dx``."""
        for index, t, rows in steps:
            values = self._values(index, rows, dstates)
            if self._cell.output is not None:
                values[OutputCotangent()] = np.zeros_like(dstates[0][rows])
            if dy is not None:
                output = StateCotangent(self._cell.states[0]) if self._cell.output is None else OutputCotangent()
                values[output] = values[output] + dy[t, rows]
            for name, gradient in self.dall_states.items():
                values[StateCotangent(name)] = values[StateCotangent(name)] + gradient[t, rows]
            dgates, draw, before = self._step(values)
            dx[t, rows] += self._linear["i2h"].backward(x[t, rows], dgates)
            if draw is not None:
                dx[t, rows] += draw
            dstates = [_replace_rows(array, rows, part) for array, part in zip(dstates, before, strict=True)]
            dstates = self.cut(t, dstates)
        return dstates

    def _values(self, index: int, rows: Rows, dstates: Sequence[Array]) -> dict[Leaf, Array]:
        """The leaves of :class:`StepVjp`'s expressions in a step, for the sequences in ``rows``."""
        tape = self._tape
        by_kind = {StateCotangent: dstates, State: tape.before[index], NewState: tape.states[index + 1]}
        values: dict[Leaf, Array] = {
            kind(name): array[rows]
            for kind, arrays in by_kind.items()
            for name, array in zip(self._cell.states, arrays, strict=True)
        }
        values.update({Saved(number): array[rows] for number, array in enumerate(tape.saved[index])})
        return values | self._parameters

    def _step(self, values: dict[Leaf, Array]) -> tuple[Array, Array | None, list[Array]]:
        """The gradients of the pre-activations from the input (N, G·H), of the input itself, of the states before."""
        cell = self._cell
        # The default is for a gate or a state that the cell does not use.
        grads: dict[Leaf, Array] = defaultdict(lambda: np.zeros_like(values[StateCotangent(cell.states[0])]))
        h_gates = None
        _accumulate(grads, self._vjp.from_outputs, values)
        for index, stage in reversed(list(enumerate(cell.stages))):
            if stage.reductions:
                values.update(moment_cotangents(stage, grads))
                _accumulate(grads, self._vjp.from_operands[index], values)
            if not stage.multiplies:
                continue
            (operand,) = evaluate([self._vjp.operands[index]], values, NUMPY)
            operand = in_rows(operand, values[StateCotangent(cell.states[0])])
            by_gate = [grads[PreH(gate)] for gate in stage.gates]
            recurrent = self._linear["h2h"].backward
            if stage.projects:
                doperand = self._linear["h2r"].backward(operand, grads[Projected()])
            elif stage.gates == cell.gates:
                h_gates = np.concatenate(by_gate, axis=1)
                doperand = recurrent(operand, h_gates)
            else:
                rows = [self._h_rows[gate] for gate in stage.gates]
                doperand = reduce(np.add, map(recurrent, repeat(operand), by_gate, rows))
            values[OperandCotangent(index)] = doperand
            _accumulate(grads, self._vjp.from_operands[index], values)
        for leaf, total in self._dparameters.items():
            total += grads[leaf].sum(axis=0 if isinstance(leaf, ParamVector) else None)
        # Where PreX and PreH of every gate are only added, their gradients are the same arrays.
        are_sums = cell.x_gates == cell.gates and all(grads[PreX(gate)] is grads[PreH(gate)] for gate in cell.gates)
        if h_gates is not None and are_sums:
            x_gates = h_gates
        else:
            none = values[StateCotangent(cell.states[0])][:, :0]  # a cell may have no gates from the input
            x_gates = np.concatenate([none, *(grads[PreX(gate)] for gate in cell.x_gates)], axis=1)
        return x_gates, grads.get(RawInput()), [grads[State(name)] for name in cell.states]


class _Linear:
    """The backward of ``x @ weight.T + bias``; adds to the gradients of the weight and the bias.

    All operands are rounded as in forward. The gradient of the result is rounded, too: its sum is the bias' gradient.
    """

    def __init__(self, weight: Array, dweight: Array, dbias: Array | None, rounded: Rounding) -> None:
        self._weight, self._dweight, self._dbias, self._rounded = rounded(weight), dweight, dbias, rounded
        self._product = np.empty_like(weight)

    def backward(self, x: Array, dy: Array, rows: slice = slice(None)) -> Array:
        """The gradient of ``x`` (N, in), from that of the results (N, rows) of some rows of the weight."""
        dy = self._rounded(dy)
        np.matmul(dy.T, self._rounded(x), out=self._product[rows])
        self._dweight[rows] += self._product[rows]
        if self._dbias is not None:
            self._dbias[rows] += dy.sum(axis=0)
        return dy @ self._weight[rows]


def _accumulate(grads: dict[Leaf, Array], by_leaf: Mapping[Leaf, Expr], values: Mapping[Leaf, Array]) -> None:
    """Evaluate cotangents and add them to ``grads``."""
    for leaf, gradient in zip(by_leaf, evaluate(list(by_leaf.values()), values, NUMPY), strict=True):
        grads[leaf] = grads[leaf] + gradient if leaf in grads else gradient


def _replace_rows(array: Array, rows: Rows, part: Array) -> Array:
    """``array`` with some rows replaced."""
    if isinstance(rows, slice):
        return part
    array = array.copy()
    array[rows] = part
    return array
