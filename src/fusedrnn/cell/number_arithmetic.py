"""Evaluates expressions on Python's numbers, with infinities and NaN where Python's own functions raise an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

from fusedrnn.cell.primitives import ArrayArithmetic


def _or_infinite(function: Callable[[float], float]) -> Callable[[float], float]:
    """The function, with infinity where its result is too large for a float."""

    def guarded(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf

    return guarded


def _above(bound: float, at_bound: float, function: Callable[[float], float]) -> Callable[[float], float]:
    """The function, with ``at_bound`` at the lower bound of its domain and NaN below."""

    def guarded(x: float) -> float:
        return function(x) if not x <= bound else at_bound if x == bound else math.nan

    return guarded


def _quotient(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if math.isnan(a) or not a else math.copysign(math.inf, a) * math.copysign(1.0, b)


_sqrt = _above(0.0, 0.0, math.sqrt)
NUMBERS = ArrayArithmetic(
    SimpleNamespace(
        abs=abs, clip=lambda x, low, high: min(max(x, low), high), exp=_or_infinite(math.exp),
        expm1=_or_infinite(math.expm1), full_like=lambda like, value: value, log=_above(0.0, -math.inf, math.log),
        log1p=_above(-1.0, -math.inf, math.log1p), maximum=max, sqrt=_sqrt, tanh=math.tanh,
        where=lambda condition, value, other: value if condition else other,
    ),
    {"div": _quotient, "rsqrt": lambda x: _quotient(1.0, _sqrt(x))},
)  # fmt: skip
"""For :func:`fusedrnn.cell.traversal.evaluate`."""
