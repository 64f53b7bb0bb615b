"""A cell as equations for a paper, in LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fusedrnn.cell.expr import Constant, Expr, Operation
from fusedrnn.cell.leaves import (
    Mask,
    ParamScalar,
    ParamVector,
    PreH,
    PreSum,
    PreX,
    RawInput,
    RowMean,
    RowVariance,
    State,
)
from fusedrnn.cell.trace import TracedCell
from fusedrnn.cell.traversal import walk

_SUM, _PRODUCT, _ATOM = range(3)
"""The precedence of a formula. In a formula of higher precedence, one of lower precedence needs parentheses."""
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega",
}  # fmt: skip
_FUNCTIONS = {
    "sigmoid": r"\sigma", "tanh": r"\tanh", "exp": r"\exp", "log": r"\log", "maximum": r"\max", "minimum": r"\min",
}  # fmt: skip
_ESCAPED = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{} "} | {"\\": r"\backslash ", "^": r"\wedge ", "~": r"\sim "}
)
_RELATIONS = {"select_less": "<", "select_less_equal": r"\le"}

Formula = tuple[str, int]
"""Its text, and its precedence."""


def latex(cell: TracedCell) -> str:
    """The equations of a traced cell as an ``align`` environment.

    W and U are the weights of the input and of recurrent products, b and d their biases, ⊙ is the product of elements.
    A gate's letter stands for its activation, or for its pre-activation if that is used in another way.
    """
    lines = _Equations(cell).lines()
    return "\n".join([r"\begin{align}", " \\\\\n".join(f"{left} &= {right}" for left, right in lines), r"\end{align}"])


def _symbol(name: str) -> str:
    """A name in a formula: a letter, a Greek letter by its name, or roman text; what follows ``_`` is an index."""
    if not all(name.split("_")):
        return f"\\mathrm{{{name.translate(_ESCAPED)}}}"
    base, _, index = name.partition("_")
    text = base if len(base) == 1 else f"\\{base}" if base in _GREEK else f"\\mathrm{{{base.translate(_ESCAPED)}}}"
    return f"{text}_{{{_symbol(index)}}}" if index else text


def _with_index(symbol: str, index: str) -> str:
    """A symbol with a further index, after the one that it may have."""
    if symbol.endswith("}") and "_{" in symbol:
        return f"{symbol[:-1]}, {index}}}"
    return f"{symbol}_{index}" if len(index) == 1 else f"{symbol}_{{{index}}}"


class _Equations:
    """The equations of a cell: values that have a name, and the formulas of all others."""

    def __init__(self, cell: TracedCell) -> None:
        self._cell = cell
        self._names: dict[Expr, str] = {}
        self._stage_of = {gate: index for index, stage in enumerate(cell.stages) for gate in stage.gates}
        for state, node in zip(cell.output_names, cell.outputs, strict=True):
            if not isinstance(node, State):
                self._add_name(node, _symbol(state), "t")
        nodes = list(walk([*cell.outputs, *cell.operands]))
        users = {node: [user for user in nodes if node in user.args] for node in nodes}
        uses = Counter(arg for node in nodes for arg in node.args)
        uses.update({stage.operand: len(stage.gates) for stage in cell.products})
        uses.update(value for stage in cell.stages if stage.reductions for value in stage.values)
        for gate in cell.gates:
            self._name_gate(gate, users, uses)
        shared = [node for node in nodes if uses[node] > 1 and node not in self._names and self._is_worth_a_name(node)]
        for number, node in enumerate(shared, 1):
            self._add_name(node, "v", f"{number}, t")

    def _add_name(self, node: Expr, symbol: str, index: str) -> None:
        """Name a node, unless it has a name; with a prime if another node has that one."""
        while (name := _with_index(symbol, index)) in self._names.values():
            symbol += "'"
        self._names.setdefault(node, name)

    def _name_gate(self, gate: str, users: dict[Expr, list[Expr]], uses: Counter[Expr]) -> None:
        symbol = f"\\tilde{{{_symbol(gate)}}}" if gate in self._cell.output_names else _symbol(gate)
        is_separate = {PreX(gate), PreH(gate)} <= users.keys()
        for leaf in (PreSum(gate), PreX(gate)):
            if leaf in users and not is_separate:
                only = users[leaf][0] if uses[leaf] == 1 and users[leaf] else leaf
                node = only if len(only.args) == 1 else leaf
                self._add_name(node, symbol, "t")

    def _is_worth_a_name(self, node: Expr) -> bool:
        """Whether a node is more than a sum or difference of two simple values."""
        simple = all(arg in self._names or not isinstance(arg, Operation) for arg in node.args)
        return isinstance(node, Operation) and not (simple and node.op in ("add", "sub"))

    def lines(self) -> list[tuple[str, str]]:
        """The left and the right side of each equation; values are defined before the equations that use them."""
        lines: dict[str, str] = {}
        for state, node in zip(self._cell.output_names, self._cell.outputs, strict=True):
            self._define(node, lines)
            name = _with_index(_symbol(state), "t")
            lines.setdefault(name, self._text(node))  # if a state does not change, or equals another
        return list(lines.items())

    def _define(self, node: Expr, lines: dict[str, str]) -> None:
        if self._names.get(node) in lines:
            return
        for part in self._parts(node):
            self._define(part, lines)
        if node in self._names:
            lines[self._names[node]] = self._formula(node)[0]

    def _parts(self, node: Expr) -> Iterable[Expr]:
        """What a node is computed from; a recurrent product is computed from its operand."""
        if isinstance(node, (PreSum, PreH)):
            return (self._cell.stages[self._stage_of[node.gate]].operand,)
        if isinstance(node, (RowMean, RowVariance)):
            return self._reduced(node)
        return node.args

    def _text(self, node: Expr, at_least: int = _SUM) -> str:
        """The name of a node or its formula, in parentheses if its precedence is below ``at_least``."""
        text, level = (self._names[node], _ATOM) if node in self._names else self._formula(node)
        return text if level >= at_least else f"({text})"

    def _formula(self, node: Expr) -> Formula:
        """How a node is computed."""
        match node:
            case Constant(value):
                return f"{value:g}", _ATOM if value >= 0 else _SUM
            case PreX(gate):
                return f"{_with_index('W', _symbol(gate))} x_t + {_with_index('b', _symbol(gate))}", _SUM
            case RawInput():
                return "x_t", _ATOM
            case PreH(gate):
                return f"{self._product(gate)} + {_with_index('d', _symbol(gate))}", _SUM
            case PreSum(gate):
                index = _symbol(gate)
                return f"{_with_index('W', index)} x_t + {self._product(gate)} + {_with_index('b', index)}", _SUM
            case RowMean() | RowVariance():
                function = r"\operatorname{" + ("E" if isinstance(node, RowMean) else "Var") + "}"
                return f"{function}({', '.join(map(self._text, self._reduced(node)))})", _ATOM
            case Mask(name, _, per_sequence):
                return _with_index("m", _symbol(name) if per_sequence else f"{_symbol(name)}, t"), _ATOM
            case State(name):
                return _with_index(_symbol(name), "t-1"), _ATOM
            case ParamVector(name) | ParamScalar(name):
                return _symbol(name), _ATOM
        assert isinstance(node, Operation)
        return self._operation(node)

    def _reduced(self, leaf: RowMean | RowVariance) -> tuple[Expr, ...]:
        return self._cell.stages[leaf.stage].reductions[leaf.index].values

    def _product(self, gate: str) -> str:
        operand = self._cell.stages[self._stage_of[gate]].operand
        return f"{_with_index('U', _symbol(gate))} {self._text(operand, _ATOM)}"

    def _operation(self, node: Operation) -> Formula:
        op, args = node.op, node.args
        if op in ("add", "sub"):
            return self._sum(op, *args)
        if op == "mul":
            return self._times(*args)
        if op == "div":
            return f"\\frac{{{self._text(args[0])}}}{{{self._text(args[1])}}}", _ATOM
        texts = [self._text(arg) for arg in args]
        if op in _RELATIONS:
            a, b, value, other = texts
            cases = f"{value} & {a} {_RELATIONS[op]} {b} \\\\ {other} & \\text{{otherwise}}"
            return f"\\begin{{cases}} {cases} \\end{{cases}}", _ATOM
        if op == "sqrt":
            return f"\\sqrt{{{texts[0]}}}", _ATOM
        if op == "abs":
            return f"\\lvert {texts[0]} \\rvert", _ATOM
        function = _FUNCTIONS.get(op, f"\\mathrm{{{op}}}")
        return f"{function}({', '.join(texts)})", _ATOM

    def _sum(self, op: str, left: Expr, right: Expr) -> Formula:
        if op == "sub":
            text = self._text(right, _PRODUCT)
            return (f"-{text}" if left == Constant(0.0) else f"{self._text(left)} - {text}"), _SUM
        text = self._text(right)
        text = f"- {text[1:]}" if text.startswith("-") else f"+ {text}"
        return f"{self._text(left)} {text}", _SUM

    def _times(self, left: Expr, right: Expr) -> Formula:
        if left == right:
            return f"{self._text(left, _ATOM)}^2", _PRODUCT
        of_scalar = any(isinstance(arg, (Constant, ParamScalar)) for arg in (left, right))
        sign = r"\," if of_scalar else r"\odot"
        return f"{self._text(left, _PRODUCT)} {sign} {self._text(right, _PRODUCT)}", _PRODUCT
