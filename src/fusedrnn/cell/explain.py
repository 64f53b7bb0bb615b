"""A cell as text: its equations, its derivative, and what backward saves and recomputes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fusedrnn.cell.derivative import Derivative, differentiate
from fusedrnn.cell.expr import Constant, Expr, Leaf, Operation
from fusedrnn.cell.infix import operation_text
from fusedrnn.cell.leaves import (
    Mask,
    MeanCotangent,
    NewState,
    OperandCotangent,
    OutputCotangent,
    ParamScalar,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    Projected,
    RawInput,
    RowMean,
    RowVariance,
    Saved,
    State,
    StateCotangent,
    VarianceCotangent,
)
from fusedrnn.cell.stage import Stage
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import walk


def explain(name: str, cell: TracedCell) -> str:
    """A traced cell as text. Values that are used more than once are named ``v1``, ``v2`` and so on."""
    derivative = differentiate(cell)
    lines = [f"cell {name}: gates {', '.join(cell.gates)}; states {', '.join(cell.states)}"]
    if cell.output is not None:
        lines.append(f"the output is {cell.output}")
    if cell.is_block_diagonal:
        lines.append("recurrent weights are block-diagonal")
    if cell.parameters:
        lines.append(f"parameters: {', '.join(leaf.name for leaf in cell.parameters)}")
    lines += ["", "forward"]
    products = [index for index, stage in enumerate(cell.stages) if stage.multiplies]
    operands = {f"operand {index + 1}": cell.stages[index].operand for index in products if index}
    reduced = {
        f"row {index + 1}.{number}": value
        for index, stage in enumerate(cell.stages) if stage.reductions for number, value in enumerate(stage.values, 1)
    }  # fmt: skip
    outputs = {f"new {state}": node for state, node in zip(cell.states, cell.new_states, strict=True)}
    if cell.output is not None:
        outputs[cell.output] = cell.outputs[-1]
    lines += _definitions({**operands, **reduced, **outputs}, {})
    for number, stage in enumerate(cell.stages, 1):
        if stage.reductions:
            lines += _reductions(number, stage)
        if not stage.multiplies:
            continue
        of = cell.first_state if number == 1 else f"operand {number}"
        form = "a.{0} = x.{0} + h.{0}" if stage.accumulates_in_place else "h.{0}"
        gates = ", ".join(form.format(gate) for gate in stage.gates)
        lines.append(f"  product {number} of {of}: {gates}")
    saved: dict[Leaf, str] = {Saved(number): f"saved {number}" for number in range(len(derivative.saved))}
    lines += ["", "forward saves" if derivative.saved else "forward saves no more than the states"]
    lines += _definitions({saved[Saved(number)]: node for number, node in enumerate(derivative.saved)}, {})
    lines += ["", "backward"]
    lines += _definitions(_gradients(cell, derivative), saved)
    if derivative.recomputed:
        lines += ["", "backward recomputes"]
        lines += [f"  {_Text({}, saved).of(node)}" for node in derivative.recomputed]
    return "\n".join(lines)


def _reductions(number: int, stage: Stage) -> list[str]:
    """A line for each of the reductions of a stage."""
    lines, first = [], 1
    for index, reduction in enumerate(stage.reductions, 1):
        rows = ", ".join(f"row {number}.{row}" for row in range(first, first + len(reduction.values)))
        what = "mean" if reduction.variance is None else "mean and variance"
        lines.append(f"  {what} {number}.{index} over all units of {rows}")
        first += len(reduction.values)
    return lines


def _gradients(cell: TracedCell, derivative: Derivative) -> dict[str, Expr]:
    """The gradients that backward computes, by name, in its order."""
    grads: dict[str, Expr] = {}
    for stage, derived in reversed([*zip(cell.stages, derivative.stages, strict=True)]):
        for number, (gate, h_grad) in enumerate(zip(stage.gates, derived.h_grads, strict=False)):
            x_grad = derived.x_grads[number] if derived.x_grads else None
            names = {f"d{gate}": h_grad} if x_grad == h_grad else {f"d x.{gate}": x_grad, f"d h.{gate}": h_grad}
            grads |= {name: derived.distinct_grads[index] for name, index in names.items() if index is not None}
        grads.update({f"d{leaf.name}": derived.distinct_grads[i] for leaf, i in derived.param_grads.items()})
        leaves = [leaf for reduction in stage.reductions for leaf in reduction.leaves]
        grads.update({f"d {_moment(leaf)}, of a unit": g for leaf, g in zip(leaves, derived.moment_grads, strict=True)})
    for gates, group in derivative.inputs.items():
        names_of = ((f"d x.{gate}" if gate in cell.h_gates else f"d{gate}") for gate in gates)
        grads |= {name: group.distinct_grads[index] for name, index in zip(names_of, group.x_grads, strict=True)}
        grads |= {f"d{leaf.name}": group.distinct_grads[index] for leaf, index in group.param_grads.items()}
    if derivative.raw_input is not None:
        grads["d x.raw, beside products"] = derivative.raw_input
    return grads | {f"d{state}, beside products": grad for state, grad in derivative.state_grads.items()}


def _moment(leaf: RowMean | RowVariance | MeanCotangent | VarianceCotangent) -> str:
    """The name of a mean or a variance: the number of its stage, and its number within the stage."""
    name = "mean" if isinstance(leaf, (RowMean, MeanCotangent)) else "variance"
    return f"{name} {leaf.stage + 1}.{leaf.index + 1}"


def _definitions(roots: Mapping[str, Expr], leaves: Mapping[Leaf, str]) -> list[str]:
    """A line for each value that is used more than once, and then for each root."""
    nodes = list(walk([*roots.values()]))
    uses = Counter(arg for node in nodes for arg in node.args)
    shared = [node for node in nodes if isinstance(node, Operation) and uses[node] > 1]
    names: dict[Expr, str] = {node: f"v{number}" for number, node in enumerate(shared, 1)}
    text = _Text(names, leaves)
    lines = [f"  {names[node]} = {text.operation(node)}" for node in shared]
    return lines + [f"  {name} = {text.of(node)}" for name, node in roots.items()]


class _Text:
    """Expressions as text.

    Args:
        names: Nodes that have a name.
        leaves: Names of leaves that ``names`` lacks.
    """

    def __init__(self, names: Mapping[Expr, str], leaves: Mapping[Leaf, str]) -> None:
        self._names, self._leaves = names, leaves

    def of(self, node: Expr) -> str:
        """The name of a node, or else how it is computed."""
        if node in self._names:
            return self._names[node]
        return self.operation(node) if isinstance(node, Operation) else self._leaf(node)

    def operation(self, node: Operation) -> str:
        """How a node is computed."""
        return operation_text(node, self.of, self._names.__contains__)

    def _leaf(self, node: Expr) -> str:
        match node:
            case Constant(value):
                return f"{value:g}"
            case PreX(gate):
                return f"x.{gate}"
            case PreH(gate):
                return f"h.{gate}"
            case PreSum(gate):
                return f"a.{gate}"
            case NewState(name):
                return f"new {name}"
            case OutputCotangent():
                return "dy"
            case StateCotangent(name):
                return f"d new {name}"
            case OperandCotangent(stage):
                return f"d operand {stage + 1}"
            case State(name) | ParamVector(name) | ParamScalar(name):
                return name
            case RawInput():
                return "x.raw"
            case Projected():
                return "projected"
            case RowMean() | RowVariance():
                return _moment(node)
            case MeanCotangent() | VarianceCotangent():
                return f"d {_moment(node)}"
            case Mask(name):
                return f"mask {name}"
        assert isinstance(node, Leaf)
        return self._leaves[node]
