"""Random masks inside a step, in the language of cells: dropout and zoneout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from fusedrnn.cell.expr import Constant, Expr, Operation, as_expr
from fusedrnn.cell.leaves import Mask
from fusedrnn.cell.number_arithmetic import NUMBERS
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.traversal import evaluate, substitute, walk
from fusedrnn.scalars import as_number, check_choice

_PER = "step", "sequence"
_OTHER_RATES: ContextVar[Mapping[str, float] | None] = ContextVar("other_rates", default=None)
"""The rates that replace those written in the equations that run, by the names of masks."""
_ARITHMETIC = "add", "sub", "mul", "div"


def mask(name: str, keep: float, per: str = "step") -> Expr:
    """1 with probability ``keep``, else 0, for each unit of each sequence; in inference ``keep``, its expectation.

    ``per="step"`` draws anew at each step, ``per="sequence"`` once for a whole sequence. Masks with the same name are
    the same mask. Masks with different names are independent, and so are masks of different layers and directions.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"a mask needs a name, such as 'h'; got {name!r}")
    keep = as_number("keep", keep)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a probability above 0; got {keep!r}")
    check_choice("per", per, _PER)
    keep = _keep_of(name, keep)
    return Mask(name, keep, per == "sequence")


def dropout(name: str, value: Expr, rate: float, per: str = "step") -> Expr:
    """0 with probability ``rate``, else ``value`` divided by 1 - rate; in inference ``value``."""
    keep = _kept(rate)
    return as_expr(value) * (mask(name, keep, per) / _keep_of(name, keep))


def zoneout(name: str, old: Expr, new: Expr, rate: float) -> Expr:
    """``old`` with probability ``rate``, else ``new``, drawn at each step; in inference the expectation.

    Krueger et al., Zoneout (2017), https://arxiv.org/abs/1606.01305.
    """
    updated = mask(name, _kept(rate))
    return updated * new + (1.0 - updated) * old


def expected(equations: Callable[..., Any]) -> Callable[..., Any]:
    """A cell's equations with the expectation of each mask in its place."""

    def replace_masks(*values: Any) -> list[Any]:
        return substitute(values, _expected_number)

    @wraps(equations)
    def of_expectations(x: Any, recurrent: Any, s: Any, *p: Any) -> Any:
        result = equations(x, lambda operand: recurrent(*replace_masks(operand)), s, *p)
        return tuple(replace_masks(*result)) if isinstance(result, tuple) else replace_masks(result)[0]

    return of_expectations


def _expected_number(node: Expr) -> Constant | None:
    """The expectation of a mask, or of a function of masks alone: no primitive takes numbers alone."""
    if isinstance(node, Mask):
        return Constant(node.keep)
    if not isinstance(node, Operation) or node.op in _ARITHMETIC or not all(map(_is_of_masks, walk([node]))):
        return None
    (value,) = evaluate([node], lambda mask: mask.keep if isinstance(mask, Mask) else math.nan, NUMBERS)
    return Constant(float(value))


def _is_of_masks(node: Expr) -> bool:
    return isinstance(node, (Mask, Constant)) or (isinstance(node, Operation) and node.op in PRIMITIVES)


def with_other_rates(equations: Callable[..., Any], rates: Mapping[str, float]) -> Callable[..., Any]:
    """A cell's equations with other rates of the named masks; a rate is 1 minus the probability of a 1."""

    @wraps(equations)
    def at_rates(*arguments: Any) -> Any:
        token = _OTHER_RATES.set(rates)
        try:
            return equations(*arguments)
        finally:
            _OTHER_RATES.reset(token)

    return at_rates


def checked_rate(name: str, rate: float) -> float:
    """A rate as a float, after a check.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is no probability below 1.
    """
    rate = as_number(name, rate)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1); got {rate!r}")
    return rate


def _kept(rate: float) -> float:
    return 1.0 - checked_rate("rate", rate)


def _keep_of(name: str, keep: float) -> float:
    """The probability of a 1: that of the equations, or the one that replaces it."""
    rates = _OTHER_RATES.get() or {}
    return 1.0 - rates[name] if name in rates else keep
