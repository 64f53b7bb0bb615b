"""The class of user cells: what a cell computes, its identity, its text, and cells derived from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import quote

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.explain import explain
from fusedrnn.cell.expr import Expr, Operation
from fusedrnn.cell.latex import latex
from fusedrnn.cell.masks import checked_rate, expected, with_other_rates
from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.cell.trace import Recording, TracedCell, fuse_gate_sums, place, record
from fusedrnn.cell.traversal import walk
from fusedrnn.lazy import cached_property
from fusedrnn.scalars import positive_int


@dataclass(frozen=True, eq=False, repr=False)
class UserCell(Cell):
    """A cell that a user has written; see :func:`fusedrnn.cell.cell`.

    Cells with the same name and the same equations are equal.
    """

    @cached_property
    def _recording(self) -> Recording:
        return record(self)

    @property
    def recorded_equations(self) -> Callable[..., Any]:
        """The run of the equations at the definition: names that they read may have other values by now."""
        return self._recording.equations

    @cached_property
    def traced(self) -> TracedCell:
        """The cell as expressions."""
        return place(self, self._recording)

    @property
    def digest(self) -> str:
        """A hash of the equations, of all names and of the number of heads."""
        return self._equations_digest if self.heads == 1 else f"{self._equations_digest}_{self.heads}"

    @cached_property
    def _equations_digest(self) -> str:
        traced, numbers = self.traced, dict[Expr, int]()
        lines = [repr((self.name, self.gates, self.states, self.vectors, self.scalars))]
        lines += [] if self.output is None else [f"output {self.output}"]
        roots = [*traced.outputs, *(value for stage in traced.stages for value in stage.values)]
        for number, node in enumerate(walk(roots)):
            numbers[node] = number
            args = [numbers[arg] for arg in node.args]
            lines.append(f"{node.op} {args}" if isinstance(node, Operation) else _identity(node))
        lines.append(repr([numbers[root] for root in roots]))
        lines += [repr(stage.gates) for stage in traced.stages]
        sizes = [len(reduction.values) for stage in traced.stages for reduction in stage.reductions]
        # The rest tells how many reductions each stage has, and how many values all of them have: equal sizes follow.
        lines += [f"reductions {sizes}"] if len({*sizes}) > 1 else []
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def slug(self) -> str:
        """Its name and a hash of its equations, without the number of heads: kernels read that number as data."""
        return f"{self.name}_{self._equations_digest[:16]}{'_heads' * (self.heads > 1)}"

    @cached_property
    def reference(self) -> str:
        """Where the cell is defined, a hash of its equations, and in what it differs from its definition.

        The form is ``module:name:hash``, followed by ``:mask=rate`` for each rate of :meth:`with_rates`, by ``:heads``
        if the number of heads differs from the definition, and by ``:expectation`` for an expectation.
        """
        if self._source is not None:
            return f"{self._source.reference}:expectation"
        changes = [f":{quote(name, safe='')}={rate!r}" for name, rate in self._rates.items()]
        changes += [f":{self.heads}"] if self.heads != self._base.heads else []
        return f"{self.__module__}:{self._qualname}:{self._equations_digest[:16]}{''.join(changes)}"

    @property
    def _qualname(self) -> str:
        """The name by which its module knows the cell; a callable that is no function has none."""
        return getattr(self._base.equations, "__qualname__", self.name)

    def with_heads(self, heads: int) -> UserCell:
        """The same cell with block-diagonal recurrent weights (rows, H / heads).

        A unit then depends only on units of its own head.

        Raises:
            TypeError: If ``heads`` is no integer.
            ValueError: If it is below 1, or the cell has no recurrent products.
        """
        heads = positive_int("heads", heads)
        if not self.traced.products:
            raise ValueError(f"cell {self.name} has no recurrent products, and so no heads")
        if self._source is not None:
            return self._source.with_heads(heads).expectation
        return _derived(self._base, heads, self._rates)

    def with_rates(self, **rates: float) -> UserCell:
        """The same cell with other rates of its random masks, by their names: ``zoneout_lstm.with_rates(c=0.3)``.

        A rate is what :func:`fusedrnn.cell.dropout` and :func:`fusedrnn.cell.zoneout` take, and 1 minus the ``keep`` of
        :func:`fusedrnn.cell.mask`. Masks that are not named keep their rates.

        Raises:
            TypeError: If a rate is no number.
            ValueError: If it is no probability below 1, or the cell has no mask of that name; or if the equations,
                which run again, are no longer those of the definition.
        """
        names = [mask.name for mask in self._drawn.traced.masks]
        for name, rate in rates.items():
            if name not in names:
                known = f"its masks are {', '.join(names)}" if names else "it draws none"
                raise ValueError(f"cell {self.name} has no mask {name!r}: {known}")
            rates[name] = checked_rate(name, rate)
        if self._source is not None:
            return self._source.with_rates(**rates).expectation
        return _derived(self._base, self.heads, {**self._rates, **rates})

    @cached_property
    def expectation(self) -> UserCell:
        """The cell in inference, with the expectation of each random mask in its place; itself if it draws none."""
        if not self.traced.masks:
            return self
        return _changed(self, {"source": self}, equations=expected(self.recorded_equations))

    @property
    def _base(self) -> UserCell:
        """The cell as defined: itself, unless its heads or rates were changed."""
        base: UserCell = self.__dict__.get("base", self)
        return base

    @property
    def _rates(self) -> Mapping[str, float]:
        """The rates that differ from the definition, by mask, in the order of their names."""
        rates: Mapping[str, float] = self.__dict__.get("rates", {})
        return rates

    @property
    def _drawn(self) -> UserCell:
        """The cell that draws masks: itself, unless it is an expectation."""
        return self if self._source is None else self._source

    @property
    def changes(self) -> str:
        """The calls that make the cell from its definition: ``.with_rates(c=0.3).with_heads(4)``; mostly none."""
        rates = ", ".join(f"{name}={rate!r}" for name, rate in self._drawn._rates.items())
        heads = f".with_heads({self.heads})" * (self.heads > 1)
        return f".with_rates({rates})" * bool(rates) + heads + ".expectation" * (self._source is not None)

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
        return f"<cell {self.name}{self.changes}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By reference, as functions are pickled, because equations cannot be pickled.
        if self._source is not None:
            return getattr, (self._source, "expectation")
        base = self._base
        return self._qualname if base is self else (_derived, (base, self.heads, dict(self._rates)))


def _identity(node: Any) -> str:
    """A number or a leaf as text that distinguishes it from any other. It is part of the keys of compiled kernels."""
    values = (f"{field.name}={getattr(node, field.name)!r}" for field in fields(node))
    return f"{type(node).__qualname__}({', '.join(values)})"


def _derived(base: UserCell, heads: int, rates: Mapping[str, float]) -> UserCell:
    """A cell with that number of heads, and with other rates of its masks."""
    if heads == base.heads and not rates:
        return base
    rates, equations = dict(sorted(rates.items())), base.recorded_equations
    if rates:
        if record(base) != base._recording:
            raise ValueError(
                f"the equations of cell {base.name} are no longer those of its definition, since a name that they read "
                "has another value: define the cell again"
            )
        equations = with_other_rates(base.equations, rates)
    cell = _changed(base, {"base": base, "rates": rates}, heads=heads, equations=equations)
    _ = cell.traced  # runs the equations now
    return cell


def _changed(cell: UserCell, attributes: Mapping[str, Any], **changes: Any) -> UserCell:
    """A copy with some fields changed; ``attributes`` record the cell that it comes from."""
    copy = replace(cell, **changes)
    for name in ("__module__", "__doc__"):
        object.__setattr__(copy, name, getattr(cell, name))
    copy.__dict__.update(attributes)
    return copy
