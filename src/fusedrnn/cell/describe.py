"""A forward expression as a short text."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.cell.expr import Constant, Expr, Operation
from fusedrnn.cell.leaves import (
    Mask,
    NewState,
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
)


def describe(node: Expr, saved: Sequence[Expr] = ()) -> str:
    """A forward expression as text, such as ``sigmoid(x.r + h.r)`` or ``tanh(new c)``."""
    match node:
        case Saved(index):
            return describe(saved[index], saved)
        case PreX(gate):
            return f"x.{gate}"
        case PreH(gate):
            return f"h.{gate}"
        case PreSum(name) | ParamVector(name) | ParamScalar(name) | State(name):
            return name
        case NewState(name):
            return f"new {name}"
        case Projected():
            return "h"
        case RawInput():
            return "x.raw"
        case RowMean(stage, index):
            return f"mean {stage + 1}.{index + 1}"
        case RowVariance(stage, index):
            return f"variance {stage + 1}.{index + 1}"
        case Mask(name):
            return f"mask {name}"
        case Constant(value):
            return f"{value:g}"
    assert isinstance(node, Operation)
    args = [describe(arg, saved) for arg in node.args]
    infix = {"add": " + ", "sub": " - ", "mul": "·"}.get(node.op)
    if infix is None:
        return f"{node.op}({', '.join(args)})"
    sums = [isinstance(arg, Operation) and arg.op in ("add", "sub") for arg in node.args]
    return infix.join(f"({text})" if is_sum else text for is_sum, text in zip(sums, args, strict=True))
