"""Operations as text, such as ``a - b * c`` and ``tanh(a)``, for any nodes that have ``op`` and ``args``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_RELATION = {"select_less": "<", "select_less_equal": "<="}


def relation_text(relation: str, a: str, b: str) -> str:
    """A comparison."""
    return f"{a} {_RELATION[f'select_{relation}']} {b}"


def operation_text(node: Any, text_of: Callable[[Any], str], is_atom: Callable[[Any], bool]) -> str:
    """The text of an operation: its arguments by ``text_of``, in parentheses where needed.

    ``is_atom`` tells whether an argument, such as a name, never needs parentheses.
    """

    def is_weaker(arg: Any, is_right: bool) -> bool:
        """Whether an argument needs parentheses."""
        op = getattr(arg, "op", None)
        if op not in _INFIX or is_atom(arg):
            return False
        if node.op in ("mul", "div"):
            return op in ("add", "sub") or is_right
        return is_right and op in ("add", "sub") and node.op == "sub"

    texts = [text_of(arg) for arg in node.args]
    if node.op in _RELATION:
        a, b, value, other = texts
        return f"where({a} {_RELATION[node.op]} {b}, {value}, {other})"
    if node.op == "sub" and getattr(node.args[0], "value", None) == 0.0:
        needs_parentheses = getattr(node.args[1], "op", None) in ("add", "sub") and not is_atom(node.args[1])
        return f"-({texts[1]})" if needs_parentheses else f"-{texts[1]}"
    if node.op not in _INFIX:
        return f"{node.op}({', '.join(texts)})"
    pairs = zip(node.args, texts, (False, True), strict=True)
    left, right = (f"({text})" if is_weaker(arg, is_right) else text for arg, text, is_right in pairs)
    if node.op == "add" and right.startswith("-"):
        return f"{left} - {right[1:]}"
    return f"{left} {_INFIX[node.op]} {right}"
