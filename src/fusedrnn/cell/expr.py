"""Expressions of elementwise operations.

The operations are in the table of :mod:`fusedrnn.cell.primitives`.
Expressions are immutable and compare by structure: equal subexpressions count as one node, which
:func:`fusedrnn.cell.traversal.evaluate` computes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, NoReturn, SupportsIndex

from fusedrnn.cell.infix import operation_text, relation_text
from fusedrnn.lazy import cached_property

_SHOWN_LEVELS = 3
"""How many levels of nested operations the text of an operation shows."""
_ONE_UNIT = "a cell is written for all units at once: an expression is one number of each unit"

NO_ARRAY = "an expression is no array: use the functions of fusedrnn.cell, not {}"


class Expr:
    """A node: a :class:`Leaf`, a :class:`Constant`, or an :class:`Operation` on other nodes.

    Python's operators build operations; ``<``, ``<=``, ``>`` and ``>=`` build a :class:`Condition`.
    """

    args: tuple[Expr, ...] = ()
    __array_ufunc__ = None  # NumPy's numbers leave operators to this class

    def __add__(self, other: Expr | float) -> Expr:
        return Operation("add", (self, as_expr(other)))

    def __radd__(self, other: float) -> Expr:
        return as_expr(other) + self

    def __sub__(self, other: Expr | float) -> Expr:
        return Operation("sub", (self, as_expr(other)))

    def __rsub__(self, other: float) -> Expr:
        return as_expr(other) - self

    def __mul__(self, other: Expr | float) -> Expr:
        return Operation("mul", (self, as_expr(other)))

    def __rmul__(self, other: float) -> Expr:
        return as_expr(other) * self

    def __truediv__(self, other: Expr | float) -> Expr:
        return Operation("div", (self, as_expr(other)))

    def __rtruediv__(self, other: float) -> Expr:
        return as_expr(other) / self

    def __neg__(self) -> Expr:
        return 0.0 - self

    def __abs__(self) -> Expr:
        return Operation("abs", (self,))

    def __pow__(self, exponent: SupportsIndex) -> Expr:
        if isinstance(exponent, bool) or not isinstance(exponent, Integral) or exponent < 1:
            raise TypeError(f"an exponent must be an integer of at least 1; got {exponent!r}: write sqrt(x), 1 / x")
        exponent = int(exponent)
        # By squaring: the depth of an expression is limited by Python's recursion limit.
        half = self ** (exponent // 2) if exponent > 1 else None
        even = self if half is None else half * half
        return even if half is None or exponent % 2 == 0 else even * self

    def __rpow__(self, base: object) -> NoReturn:
        raise TypeError(f"a cell has no power of {base!r} by an expression: write exp(a * log({base!r}))")

    def __floordiv__(self, other: object) -> NoReturn:
        raise TypeError("a cell has no //, % or @: its arithmetic is + - * / and ** with an integer")

    __mod__ = __matmul__ = __rfloordiv__ = __rmod__ = __rmatmul__ = __floordiv__

    def __lt__(self, other: Expr | float) -> Condition:
        return Condition("less", self, as_expr(other))

    def __le__(self, other: Expr | float) -> Condition:
        return Condition("less_equal", self, as_expr(other))

    def __gt__(self, other: Expr | float) -> Condition:
        return Condition("less", as_expr(other), self)

    def __ge__(self, other: Expr | float) -> Condition:
        return Condition("less_equal", as_expr(other), self)

    def __bool__(self) -> NoReturn:
        raise TypeError("a cell cannot branch on an expression: write where(a < b, value, other)")

    def __iter__(self) -> NoReturn:
        raise TypeError(f"{_ONE_UNIT}, and cannot be iterated over")

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError(f"{_ONE_UNIT}, and has no index")

    def __len__(self) -> NoReturn:
        raise TypeError(f"{_ONE_UNIT}, and has no length")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refused."""
        raise TypeError(f"{self!r} is an expression, which cannot be called")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"{self!r} is an expression, which has no attribute {name!r}")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(NO_ARRAY.format("NumPy's"))

    def __jax_array__(self) -> NoReturn:
        raise TypeError(NO_ARRAY.format("JAX's"))

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(NO_ARRAY.format("PyTorch's"))

    def __float__(self) -> NoReturn:
        raise TypeError("an expression is no number: use the functions of fusedrnn.cell, not those of math")

    __int__ = __index__ = __round__ = __float__


@dataclass(frozen=True, repr=False)
class Condition:
    """A comparison of two expressions, the first argument of ``where``.

    Attributes:
        relation: ``"less"`` or ``"less_equal"``.
        a: The left side.
        b: The right side.
    """

    relation: str
    a: Expr
    b: Expr

    def __repr__(self) -> str:
        return relation_text(self.relation, repr(self.a), repr(self.b))

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a cell cannot branch on a comparison, which may differ from unit to unit: write where(a < b, value, "
            "other), maximum(a, b) or minimum(a, b)"
        )

    def __neg__(self, *_: object) -> NoReturn:
        raise TypeError(f"{self!r} is a comparison, no number: write where({self!r}, 1.0, 0.0)")

    __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __abs__ = __float__ = __neg__
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __neg__

    def __and__(self, other: object) -> NoReturn:
        raise TypeError("comparisons cannot be combined: write where(a < b, where(c < d, value, other), other)")

    __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = __and__

    def __invert__(self) -> NoReturn:
        raise TypeError("a comparison cannot be negated: write the opposite one, or exchange the values of where")


def _refuse_number(other: object) -> None:
    """Raise an error if equations compare an expression with a number: every expression would differ from it."""
    if isinstance(other, Number):
        raise TypeError(f"a cell cannot compare by == or !=; got {other!r}: write where(a <= b, value, other)")


class Leaf(Expr):
    """An input of an expression; the subclasses are in :mod:`fusedrnn.cell.leaves`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __eq__(self, other: object) -> bool:
        _refuse_number(other)
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


@dataclass(frozen=True, repr=False, eq=False)
class Constant(Expr):
    """A number. Zeros of different sign are different constants."""

    value: float

    def __repr__(self) -> str:
        return f"{self.value:g}"

    def __eq__(self, other: object) -> bool:
        _refuse_number(other)
        return isinstance(other, Constant) and self.value.hex() == other.value.hex()

    def __hash__(self) -> int:
        return hash(self.value.hex())


@dataclass(frozen=True, repr=False)
class Operation(Expr):
    """An operation on other nodes."""

    op: str
    args: tuple[Expr, ...]

    def __repr__(self) -> str:
        """As equations write it. Deeper operations are left out: repeated parts make a text grow without bounds."""
        nodes: Sequence[Expr] = [self]
        for _ in range(_SHOWN_LEVELS):
            nodes = [arg for node in nodes for arg in node.args]
        hidden = {node for node in nodes if isinstance(node, Operation)}

        def text_of(node: Expr) -> str:
            if node in hidden:
                return "(...)"
            return shown(node) if isinstance(node, Operation) else repr(node)

        def shown(node: Operation) -> str:
            return operation_text(node, text_of, hidden.__contains__).removeprefix("row_")

        return shown(self)

    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args))

    # The generated methods would visit a shared node once for each path to it.
    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        _refuse_number(other)
        pairs: list[tuple[object, object]] = [(self, other)]
        seen: set[tuple[int, int]] = set()
        while pairs:
            a, b = pairs.pop()
            if a is b or (ids := (id(a), id(b))) in seen:
                continue
            seen.add(ids)
            if isinstance(a, Operation) and isinstance(b, Operation):
                if (a._hash, a.op, len(a.args)) != (b._hash, b.op, len(b.args)):
                    return False
                pairs += zip(a.args, b.args, strict=True)
            elif isinstance(a, Operation) or isinstance(b, Operation) or a != b:
                return False
        return True


def as_expr(value: Any) -> Expr:
    """A number as a :class:`Constant`; an expression unchanged.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, Expr):
        return value
    if isinstance(value, Condition):
        _ = -value  # raises the error
    try:
        _ = value + 0  # a string is no number, whatever it says
        return Constant(float(value))
    except (TypeError, ValueError):
        raise TypeError(f"expected an expression or a number; got {value!r}") from None
