"""A cell that a user has written, as an object: what it computes, its identity, its text, and forms of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.explain import explain
from fusedrnn.cell.expr import Expr, Operation, walk
from fusedrnn.cell.latex import latex
from fusedrnn.cell.masks import expected
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.trace import TracedCell, fuse_gate_sums, run_equations
from fusedrnn.scalars import positive_int


@dataclass(frozen=True, eq=False, repr=False)
class UserCell(Cell):
    """A cell that a user has written; see :func:`fusedrnn.cell.cell`.

    Cells with the same name and the same equations are equal.
    """

    @cached_property
    def traced(self) -> TracedCell:
        """The cell as expressions."""
        return run_equations(self)

    @property
    def digest(self) -> str:
        """A hash of the equations, of all names and of the number of heads."""
        return self._equations_digest if self.heads == 1 else f"{self._equations_digest}_{self.heads}"

    @cached_property
    def _equations_digest(self) -> str:
        traced, numbers = self.traced, dict[Expr, int]()
        lines = [repr((self.name, self.gates, self.states, self.vectors, self.scalars))]
        roots = [*traced.outputs, *(value for stage in traced.stages for value in stage.values)]
        for number, node in enumerate(walk(roots)):
            numbers[node] = number
            args = [numbers[arg] for arg in node.args]
            lines.append(f"{node.op} {args}" if isinstance(node, Operation) else repr(node))
        lines.append(repr([numbers[root] for root in roots]))
        lines += [repr(stage.gates) for stage in traced.stages]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def slug(self) -> str:
        """Its name and a hash of its equations: heads are kernels of their own, their number is data."""
        return f"{self.name}_{self._equations_digest[:16]}{'_heads' * (self.heads > 1)}"

    @cached_property
    def reference(self) -> str:
        """Where the cell is defined, a hash of its equations, and the heads if :meth:`with_heads` was given them.

        The form is ``module:name:hash`` or ``module:name:hash:heads``; an expectation's ends in ``:expectation``.
        """
        if self._source is not None:
            return f"{self._source.reference}:expectation"
        heads = "" if self._base is None else f":{self.heads}"
        return f"{self.__module__}:{self.equations.__qualname__}:{self._equations_digest[:16]}{heads}"

    def with_heads(self, heads: int) -> UserCell:
        """The same cell with block-diagonal recurrent weights: (rows, H / heads), each unit seeing those of its head.

        Raises:
            TypeError: If ``heads`` is no integer.
            ValueError: If it is below 1, or the cell has no recurrent products.
        """
        heads = positive_int("heads", heads)
        if not self.traced.products:
            raise ValueError(f"cell {self.name} has no recurrent products, and so no heads")
        base = self if self._base is None else self._base
        if self._source is not None:
            return self._source.with_heads(heads).expectation
        return base if heads == base.heads else _changed(base, "base", heads=heads)

    @cached_property
    def expectation(self) -> UserCell:
        """The cell in inference: with the expectations of its random masks instead; itself if it draws none."""
        return _changed(self, "source", equations=expected(self.equations)) if self.traced.masks else self

    @property
    def _base(self) -> UserCell | None:
        """The cell as it is defined, if this one has other heads."""
        return self.__dict__.get("base")

    @property
    def _source(self) -> UserCell | None:
        """The cell whose expectation this one is."""
        return self.__dict__.get("source")

    @cached_property
    def has_kinks(self) -> bool:
        """Whether the derivative jumps somewhere."""
        nodes = walk([*self.traced.outputs, *self.traced.operands])
        return any(isinstance(node, Operation) and PRIMITIVES[node.op].has_kink for node in nodes)

    def explain(self) -> str:
        """Its equations, its derivative, and what backward saves and recomputes, as text to print."""
        return explain(self.name, fuse_gate_sums(self.traced))

    def latex(self) -> str:
        """Its equations as an ``align`` environment of LaTeX, for a paper."""
        return latex(fuse_gate_sums(self.traced))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserCell) and (self.name, self.digest) == (other.name, other.digest)

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    def __repr__(self) -> str:
        return f"<cell {self.name}>" if self.heads == 1 else f"<cell {self.name} with {self.heads} heads>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By reference, as a function: equations cannot be pickled.
        if self._source is not None:
            return getattr, (self._source, "expectation")
        return self.equations.__qualname__ if self._base is None else (_with_heads, (self._base, self.heads))


def _with_heads(cell: UserCell, heads: int) -> UserCell:
    return cell.with_heads(heads)


def _changed(cell: UserCell, attribute: str, **fields: Any) -> UserCell:
    """A copy with other fields, which has the cell that it is of in an attribute."""
    copy = replace(cell, **fields)
    for name in ("__module__", "__doc__"):
        object.__setattr__(copy, name, getattr(cell, name))
    copy.__dict__[attribute] = cell
    return copy
