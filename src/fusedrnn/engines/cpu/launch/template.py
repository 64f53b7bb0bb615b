"""KernelArgs that are the same at every call, but for a few addresses and sizes: worked out once, filled in at each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.launch.args_kernel import CONSTANT, load_fill
from fusedrnn.jit.struct import Struct

Array = NDArray[Any]


class At(NamedTuple):
    """A field that is known at the call only: what goes by that name, and how far behind it."""

    name: str
    offset: int = 0


Fields = Mapping[str, int | At]


class Template:
    """Some records, one behind the other.

    Args:
        names: What the call knows, in the order in which it will say so.
        rows: Each record, and what its fields are.
        count: How many fields there are, those of 0 behind the rows included.

    Attributes:
        address: Where the fields are told, as :data:`fusedrnn.engines.cpu.launch.args_kernel.FIELD` has them.
        count: How many there are.
    """

    def __init__(self, names: Sequence[str], rows: Iterable[tuple[Struct, Fields]], count: int) -> None:
        places = {name: place for place, name in enumerate(names)}
        self.count = count
        self._fields: Array = np.zeros((self.count, 2), np.int64)
        self.address, self._fill = self._fields.ctypes.data, load_fill()
        self._fields[:, 0] = CONSTANT
        number = 0
        for record, row in rows:
            for name in record.names:
                field = row[name]
                value, offset = (places[field.name], field.offset) if isinstance(field, At) else (CONSTANT, field)
                self._fields[number] = value, offset
                number += 1

    def fill(self, values: int, into: int) -> None:
        """Write the records to an address; the values, 64-bit integers, lie at another."""
        self._fill(self.address, self.count, values, into)
