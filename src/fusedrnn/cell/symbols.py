"""The symbols on which equations run: the arguments ``x``, ``recurrent``, ``s`` and ``p`` of a cell's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.expr import Expr, Leaf, as_expr
from fusedrnn.cell.leaves import ParamScalar, ParamVector, PreH, PreX, Projected, RawInput, State
from fusedrnn.cell.stage import Stage

RAW = "raw"
"""``x.raw`` is the input itself, and so no gate has this name."""


class _ReadOnly:
    """An argument of equations, whose attributes they read but do not assign."""

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"{name!r} cannot be assigned to: return the new states")
        super().__setattr__(name, value)

    def __call__(self, *_: object) -> NoReturn:
        raise TypeError("gates, states and parameters are attributes, such as x.a; recurrent(...) alone is called")

    def __getitem__(self, name: object) -> NoReturn:
        raise TypeError(f"gates, states and parameters are attributes: write .{name} instead of [{name!r}]")


class Symbols(_ReadOnly):
    """``x.i``, ``h.i`` or ``s.c``: a leaf by attribute; ``used`` collects the names that the equations read."""

    def __init__(self, kind: Callable[[str], Leaf], names: Sequence[str], used: set[str]) -> None:
        self._kind, self._names, self._used = kind, names, used

    def __getattr__(self, name: str) -> Expr:
        if name == RAW and self._kind is PreX:
            return RawInput()
        if name not in self._names:
            what = "state" if self._kind is State else "gate"
            raise AttributeError(f"the cell has no {what} {name!r}; its {what}s are {', '.join(self._names)}")
        self._used.add(name)
        return self._kind(name)

    def __repr__(self) -> str:
        name = "x" if self._kind is PreX else "s" if self._kind is State else "recurrent(...)"
        return f"{name}: write {name}.{self._names[0]}"


class ParameterSymbols(_ReadOnly):
    """``p.beta``: a vector or a scalar by attribute."""

    def __init__(self, cell: Cell) -> None:
        self._leaves: dict[str, Leaf] = {name: ParamVector(name) for name in cell.vectors}
        self._leaves |= {name: ParamScalar(name) for name in cell.scalars}

    def __getattr__(self, name: str) -> Expr:
        if name not in self._leaves:
            known = ", ".join(self._leaves)
            raise AttributeError(f"the cell has no parameter {name!r}; its vectors and scalars are {known}")
        return self._leaves[name]

    def __repr__(self) -> str:
        return f"p: write p.{next(iter(self._leaves))}"


class RecurrentProducts:
    """The argument ``recurrent`` of equations: each call with another operand adds a stage."""

    def __init__(self, gates: Sequence[str]) -> None:
        self._gates = gates
        self._stages: list[tuple[Expr, set[str], bool]] = []

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"recurrent is a function: write recurrent(s.h).{name}")

    def __repr__(self) -> str:
        return f"recurrent: write recurrent(s.h).{self._gates[0]}"

    def __call__(self, *operands: Expr, **named: object) -> Symbols:
        """The gates' products of an expression."""
        if named:
            raise TypeError(f"recurrent takes its expression by position; got {', '.join(named)}= by name")
        if len(operands) != 1:
            raise TypeError(f"recurrent takes one expression, such as s.h; got {len(operands)}")
        operand = as_expr(operands[0])
        equal = (used for other, used, projects in self._stages if not projects and other == operand)
        used: set[str] | None = next(equal, None)
        if used is None:
            used = set()
            self._stages.append((operand, used, False))
        return Symbols(PreH, self._gates, used)

    def project(self, operand: Expr) -> Expr:
        """The projection of an expression, which is a stage of its own."""
        self._stages.append((operand, set(), True))
        return Projected()

    def stages(self) -> tuple[Stage, ...]:
        """The stages of all calls so far."""
        return tuple(
            Stage(operand, tuple(gate for gate in self._gates if gate in used), projects)
            for operand, used, projects in self._stages
        )
