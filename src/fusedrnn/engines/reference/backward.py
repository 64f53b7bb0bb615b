"""Training on the reference: forward that keeps what backward needs, and backward, unfused, in any float type.

Every cell of every step makes its own GEMMs, also for the gradients of its weights, which are added up step by step,
and keeps every intermediate that a gradient uses, as MXNet's cells do when they are unrolled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn import dropout
from fusedrnn.cell.autodiff import vjp
from fusedrnn.cell.expr import Constant, Expr, Leaf, evaluate, substitute, walk
from fusedrnn.cell.leaves import (
    NewState,
    OperandCotangent,
    Peephole,
    PreH,
    PreX,
    Projected,
    Saved,
    State,
    StateCotangent,
)
from fusedrnn.cell.trace import TracedCell, traced_cell
from fusedrnn.engines.reference.forward import (
    NUMPY,
    gate_rows,
    initial_states,
    input_gates,
    join,
    layer_weights,
    step_leaves,
    unroll,
    vector_leaves,
)
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Rows = slice | Array
Step = tuple[int, int, Rows]


@dataclass(frozen=True)
class Flows:
    """How gradients run through a step of a cell.

    Attributes:
        kept: What forward keeps of each step besides the states: all that the others use of it.
        operands: What each stage's GEMM multiplies, first stage first.
        from_outputs: What each leaf of the cell gets from the new states.
        from_operands: What each leaf gets from the gradient of each stage's operand, first stage first.
    """

    kept: tuple[Expr, ...]
    operands: tuple[Expr, ...]
    from_outputs: Mapping[Leaf, Expr]
    from_operands: tuple[Mapping[Leaf, Expr], ...]


@lru_cache(maxsize=64)
def flows(cell: TracedCell) -> Flows:
    """Differentiate a cell of any number of stages."""
    operands = [stage.operand for stage in cell.stages]
    routes = [vjp(cell.outputs, [StateCotangent(name) for name in cell.states])]
    routes += [vjp([operand], [OperandCotangent(number)]) for number, operand in enumerate(operands)]
    forward = dict.fromkeys(walk([*cell.outputs, *operands]))
    wanted = [gradient for route in routes for gradient in route.values()]
    used = {arg for node in walk(wanted) if node not in forward for arg in node.args}.union(operands)
    places: dict[Expr, Expr] = {new: NewState(name) for name, new in zip(cell.states, cell.outputs, strict=True)}
    given = [*map(State, cell.states), *map(Peephole, cell.peepholes)]
    places.update({leaf: leaf for leaf in given})
    kept = [node for node in forward if node in used and node not in places and not isinstance(node, Constant)]
    places.update({node: Saved(index) for index, node in enumerate(kept)})

    def at_hand(route: Mapping[Leaf, Expr]) -> dict[Leaf, Expr]:
        return dict(zip(route, substitute(list(route.values()), places.get), strict=True))

    return Flows(
        kept=tuple(kept),
        operands=tuple(substitute(operands, places.get)),
        from_outputs=at_hand(routes[0]),
        from_operands=tuple(at_hand(route) for route in routes[1:]),
    )


@dataclass
class Trail:
    """What one direction of one layer leaves for backward, step by step in the order in which it went.

    Attributes:
        states: The states (N, size) before each step, and those after the last.
        kept: The values (N, H) of :attr:`Flows.kept` in each step.
    """

    states: list[tuple[Array, ...]] = field(default_factory=list)
    kept: list[tuple[Array, ...]] = field(default_factory=list)


@dataclass
class Tape:
    """What :func:`train` leaves for :func:`backward`, which may run on it more than once.

    It refers to the input, the parameters, the initial states and the lengths: leave them as they are until then.

    Attributes:
        params: The flat parameters.
        lengths: The lengths, or None.
        inputs: What each layer read, (T, N, in): that of the first layer is ``x``.
        masks: What dropout kept of the output of each layer but the last, (T, N, D·S); empty without dropout.
        trails: One for each layer and direction, at layer·D + direction.
    """

    params: Array
    lengths: Array | None
    inputs: list[Array] = field(default_factory=list)
    masks: list[Array] = field(default_factory=list)
    trails: list[Trail] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that training keeps: without what the caller gave."""
        arrays = [*self.inputs[1:], *self.masks]
        for trail in self.trails:
            arrays += [array for step in (*trail.states[1:], *trail.kept) for array in step]
        return sum(array.nbytes for array in arrays)


def train(
    spec: RNNSpec,
    x: Array,
    params: Array,
    states: Sequence[Array] | None = None,
    lengths: Array | None = None,
    seed: int = 0,
) -> tuple[Array, tuple[Array, ...], Tape]:
    """As :func:`fusedrnn.engines.reference.forward.forward`, with dropout between layers and a tape for backward.

    ``seed`` says what is dropped, by :func:`fusedrnn.dropout.mask`. Returns the output, the final states, the tape.
    """
    states = initial_states(spec, x, states)
    cell = traced_cell(spec.variant)
    tape = Tape(params, lengths)
    for layer in range(spec.num_layers):
        tape.inputs.append(x)
        outputs = []
        for direction in range(spec.num_directions):
            advance = _Recorder(cell, layer_weights(spec, params, layer, direction))
            start = [state[len(tape.trails)] for state in states]
            y, after = unroll(x, start, lengths, spec.reverses(direction), advance)
            advance.trail.states.append(after)
            tape.trails.append(advance.trail)
            outputs.append(y)
        x = join(outputs)
        if spec.dropout and layer < spec.num_layers - 1:
            tape.masks.append(dropout.mask(seed, spec.dropout, layer, *x.shape))
            x = _drop(spec, x, tape.masks[-1])
    last = zip(*(trail.states[-1] for trail in tape.trails), strict=True)
    return x, tuple(np.stack(column) for column in last), tape


class _Recorder:
    """Steps of a cell that leave a trail."""

    def __init__(self, cell: TracedCell, weights: Mapping[str, Array]) -> None:
        self.trail = Trail()
        self._cell, self._weights = cell, weights
        self._wanted = (*cell.outputs, *flows(cell).kept)

    def __call__(self, x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        leaves = step_leaves(self._cell, input_gates(x, self._weights), states, self._weights)
        values = evaluate(self._wanted, leaves, NUMPY)
        new, kept = values[: len(states)], values[len(states) :]
        self.trail.states.append(states)
        # A view of one gate would keep the pre-activations of all.
        self.trail.kept.append(tuple(value if value.base is None else value.copy() for value in kept))
        return tuple(new)


def _drop(spec: RNNSpec, values: Array, kept: Array) -> Array:
    """Dropout, or its gradient: what is kept grows by as much as is lost on average."""
    values = values * kept
    values *= values.dtype.type(dropout.scale(spec.dropout))
    return values


def backward(
    spec: RNNSpec, tape: Tape, dy: Array | None, dstates: Sequence[Array | None] | None = None
) -> tuple[Array, Array, tuple[Array, ...]]:
    """The gradients of the input (T, N, I), of the flat parameters, and of each initial state (L·D, N, size).

    ``dy`` (T, N, D·S) is the gradient of the output, ``dstates`` are those of the final states, (L·D, N, size) each;
    None stands for zeros. What ``dy`` holds behind a sequence's length is not looked at.
    """
    cell = traced_cell(spec.variant)
    dparams = np.zeros_like(tape.params)
    shapes = spec.state_shape(tape.inputs[0].shape[1])
    dinitial = tuple(np.empty(shape, dparams.dtype) for shape in shapes)
    size = spec.state_size
    for layer in reversed(range(spec.num_layers)):
        dx = np.zeros_like(tape.inputs[layer])
        for direction in range(spec.num_directions):
            index = layer * spec.num_directions + direction
            weights = layer_weights(spec, tape.params, layer, direction)
            run = _Backward(cell, weights, layer_weights(spec, dparams, layer, direction))
            last = [None if dstates is None else dstates[place] for place in range(len(shapes))]
            reaching = [
                np.zeros(shape[1:], dparams.dtype) if given is None else given[index]
                for shape, given in zip(shapes, last, strict=True)
            ]
            part = None if dy is None else dy[:, :, direction * size : (direction + 1) * size]
            order = _order(len(dx), tape.lengths, spec.reverses(direction))
            first = run.unroll(tape.trails[index], order, tape.inputs[layer], part, reaching, dx)
            for into, gradient in zip(dinitial, first, strict=True):
                into[index] = gradient
        dy = _drop(spec, dx, tape.masks[layer - 1]) if layer and tape.masks else dx
    return dx, dparams, dinitial


def _order(steps: int, lengths: Array | None, reverse: bool) -> Iterator[Step]:
    """The steps backward goes through: place in the trail, time, and the sequences that have not ended by then."""
    for place in reversed(range(steps)):
        t = steps - 1 - place if reverse else place
        alive = None if lengths is None else t < lengths
        if alive is None or alive.all():
            yield place, t, slice(None)
        elif alive.any():
            yield place, t, np.flatnonzero(alive)


def _add(reaching: dict[Leaf, Array], route: Mapping[Leaf, Expr], values: Mapping[Leaf, Array]) -> None:
    """Add what goes along a route to what has reached the leaves so far."""
    for name, gradient in zip(route, evaluate(list(route.values()), values, NUMPY), strict=True):
        reaching[name] = reaching[name] + gradient if name in reaching else gradient


def _replace(whole: Array, rows: Rows, part: Array) -> Array:
    """``whole`` with some rows exchanged."""
    if isinstance(rows, slice):
        return part
    whole = whole.copy()
    whole[rows] = part
    return whole


class _Linear:
    """``x @ weight.T``, plus a bias if there is one, and its backward, which adds to the gradients of these."""

    def __init__(self, weight: Array, dweight: Array, dbias: Array | None) -> None:
        self._weight, self._dweight, self._dbias = weight, dweight, dbias
        self._product = np.empty_like(weight)

    def backward(self, x: Array, gradient: Array, rows: slice = slice(None)) -> Array:
        """The gradient of ``x`` (N, in), from that of the rows' results (N, rows)."""
        np.matmul(gradient.T, x, out=self._product[rows])
        self._dweight[rows] += self._product[rows]
        if self._dbias is not None:
            self._dbias[rows] += gradient.sum(axis=0)
        return gradient @ self._weight[rows]


class _Backward:
    """Backward of one direction of one layer."""

    def __init__(self, cell: TracedCell, weights: Mapping[str, Array], into: Mapping[str, Array]) -> None:
        self._cell, self._flows = cell, flows(cell)
        self._linear = {
            kind: _Linear(weights[f"{kind}_weight"], into[f"{kind}_weight"], into.get(f"{kind}_bias"))
            for kind in ("i2h", "h2h", "h2r")
            if f"{kind}_weight" in weights
        }
        self._rows = gate_rows(cell, len(weights["h2h_weight"]))
        self._vectors, self._dvectors = vector_leaves(cell, weights), vector_leaves(cell, into)

    def unroll(
        self, trail: Trail, order: Iterable[Step], x: Array, dy: Array | None, reaching: list[Array], dx: Array
    ) -> list[Array]:
        """All steps, last first: from the gradients of the last states to those of the first; adds to ``dx``."""
        for place, t, rows in order:
            values = self._values(trail, place, reaching, rows)
            if dy is not None:
                output = StateCotangent(self._cell.states[0])
                values[output] = values[output] + dy[t, rows]
            gates, before = self._step(values)
            dx[t, rows] += self._linear["i2h"].backward(x[t, rows], gates)
            reaching = [_replace(whole, rows, part) for whole, part in zip(reaching, before, strict=True)]
        return reaching

    def _values(self, trail: Trail, place: int, reaching: Sequence[Array], rows: Rows) -> dict[Leaf, Array]:
        """What the expressions of :class:`Flows` are made of, for the sequences in ``rows``."""
        arrays_of = {StateCotangent: reaching, State: trail.states[place], NewState: trail.states[place + 1]}
        values: dict[Leaf, Array] = {
            kind(name): array[rows]
            for kind, arrays in arrays_of.items()
            for name, array in zip(self._cell.states, arrays, strict=True)
        }
        values.update({Saved(index): array[rows] for index, array in enumerate(trail.kept[place])})
        return values | self._vectors

    def _step(self, values: dict[Leaf, Array]) -> tuple[Array, list[Array]]:
        """The gradients of the input's pre-activations (N, G·H), and of the previous states."""
        cell = self._cell
        # A cell may not use a gate or a state at all.
        reaching: dict[Leaf, Array] = defaultdict(lambda: np.zeros_like(values[StateCotangent(cell.states[0])]))
        stacked = None
        _add(reaching, self._flows.from_outputs, values)
        for number, stage in reversed(list(enumerate(cell.stages))):
            operand, route = self._flows.operands[number], self._flows.from_operands[number]
            cotangent = OperandCotangent(number)
            (multiplied,) = evaluate([operand], values, NUMPY)
            parts = [reaching[PreH(gate)] for gate in stage.gates]
            recurrent = self._linear["h2h"].backward
            if stage.projects:
                values[cotangent] = self._linear["h2r"].backward(multiplied, reaching[Projected()])
            elif stage.gates == cell.gates:
                stacked = np.concatenate(parts, axis=1)
                values[cotangent] = recurrent(multiplied, stacked)
            else:
                places = [self._rows[gate] for gate in stage.gates]
                products = map(recurrent, repeat(multiplied), parts, places)
                values[cotangent] = reduce(np.add, products)
            _add(reaching, route, values)
        for peephole, total in self._dvectors.items():
            total += reaching[peephole].sum(axis=0)
        # Most cells only ever add a gate's two parts, whose gradients are then one array.
        if stacked is None or any(reaching[PreX(gate)] is not reaching[PreH(gate)] for gate in cell.gates):
            stacked = np.concatenate([reaching[PreX(gate)] for gate in cell.gates], axis=1)
        return stacked, [reaching[State(name)] for name in cell.states]
