"""The initial values of a cell's parameters, as the cell declares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusedrnn.scalars import as_number, positive_int

_LARGEST = 1e38
BIAS = ".bias"
"""The suffix that turns the name of a gate into that of its bias."""


@dataclass(frozen=True)
class Initial:
    """Independent random numbers.

    Attributes:
        low: The lower bound of a uniform distribution.
        high: Its upper bound; equal to ``low`` for a constant.
        is_log: Whether to take the logarithm of the numbers drawn.
        negated: A gate whose bias begins with the negative of the same numbers; None for none.
    """

    low: float
    high: float
    is_log: bool = False
    negated: str | None = None


InitialValue = float | tuple[float, float] | Initial
"""A constant, the two bounds of a uniform distribution, or what :func:`chrono` returns."""


def chrono(max_steps: int, negated: str | None = None) -> Initial:
    """The initial bias of a forget gate, for dependencies of up to ``max_steps`` steps.

    It is the logarithm of a number between 1 and max_steps - 1.

    Tallec and Ollivier, Can recurrent neural networks warp time? (2018), https://arxiv.org/abs/1804.11188.

    Args:
        max_steps: At least 3.
        negated: A gate whose bias begins with the negative of the same numbers, such as the input gate; None for none.

    Raises:
        TypeError: If ``max_steps`` is no integer.
        ValueError: If it is less than 3.
    """
    if positive_int("max_steps", max_steps) < 3:
        raise ValueError(f"max_steps must be at least 3; got {max_steps!r}")
    return Initial(1.0, max_steps - 1.0, is_log=True, negated=negated)


def checked_initial(
    initial: Mapping[str, InitialValue] | None, gates: Sequence[str], parameters: Sequence[str]
) -> dict[str, Initial]:
    """The initial values by name: of a cell's own parameter, or of the bias of a gate as ``f.bias``.

    Raises:
        TypeError: If they are no mapping of names to values.
        ValueError: If a name is unknown, or bounds are in the wrong order.
    """
    if not isinstance(initial, Mapping | None):
        raise TypeError(f"initial must be a mapping such as {{'f.bias': 1.0}}; got {initial!r}")
    names = [*parameters, *(f"{gate}{BIAS}" for gate in gates)]
    checked = {}
    for name, value in (initial or {}).items():
        if name not in names:
            raise ValueError(f"initial must name one of {', '.join(names)}; got {name!r}")
        checked[name] = _checked(name, value)
        negated = checked[name].negated
        if negated is not None and (negated not in gates or not name.endswith(BIAS)):
            raise ValueError(f"initial of {name!r} negates the bias of {negated!r}: both must be gates")
    return checked


def _checked(name: str, value: InitialValue) -> Initial:
    if isinstance(value, Initial):
        return value
    bounds = value if isinstance(value, tuple) else (value, value)
    if len(bounds) != 2:
        raise TypeError(f"initial of {name!r} must be a number, or two as (low, high); got {value!r}")
    low, high = (as_number(f"initial of {name!r}", bound) for bound in bounds)
    if low > high:
        raise ValueError(f"initial of {name!r} must be (low, high), low first; got {value!r}")
    if max(abs(low), abs(high)) > _LARGEST:
        raise ValueError(f"initial of {name!r} must be at most {_LARGEST:g}, which float32 can hold; got {value!r}")
    return Initial(low, high)
