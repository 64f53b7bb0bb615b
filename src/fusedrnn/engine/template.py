"""Records that are the same at every call but for a few addresses and sizes: worked out once, filled in at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.codegen.build import Record

Array = NDArray[Any]


class At(NamedTuple):
    """A field that is known at the call only: what goes by that name, and how far behind it."""

    name: str
    offset: int = 0


class Template:
    """Some records of one kind.

    Args:
        record: What their fields are.
        rows: For each of them, what every field is.
    """

    def __init__(self, record: Record, rows: Sequence[Mapping[str, int | At]]) -> None:
        fields = [[row[name] for name in record.names] for row in rows]
        self._names = sorted({field.name for row in fields for field in row if isinstance(field, At)})
        self._which: Array = np.array([[self._place(field) for field in row] for row in fields])
        self._offsets: Array = np.array([[f.offset if isinstance(f, At) else f for f in row] for row in fields])
        self._constant: Array = self._which == len(self._names)

    def _place(self, field: int | At) -> int:
        """The place of a field's value among those of all names; the last for a constant."""
        return self._names.index(field.name) if isinstance(field, At) else len(self._names)

    def fill(self, values: Mapping[str, int]) -> Array:
        """The records with these values. What is 0, and so not there, is 0 however far behind it."""
        bases: Array = np.array([*(values[name] for name in self._names), 0], np.int64)
        filled: Array = bases[self._which]
        there = filled != 0
        there |= self._constant
        filled += self._offsets
        filled *= there
        return filled
