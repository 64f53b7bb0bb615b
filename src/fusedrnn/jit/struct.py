"""What Python and machine code tell each other: blocks of integers with named places."""

from __future__ import annotations

from fusedrnn.jit.builder import Function, Value


class Struct:
    """A block of 64-bit integers with named places, shared between Python and machine code."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.index = {name: place for place, name in enumerate(names)}

    def read(self, function: Function, address: Value) -> Fields:
        """Access to the fields of the record at an address."""
        return Fields(self, function, address)


class Fields:
    """The fields of a record in memory, loaded where they are mentioned."""

    def __init__(self, record: Struct, function: Function, address: Value) -> None:
        self._record, self._function, self._address = record, function, address

    def __getattr__(self, name: str) -> Value:
        try:
            place = self._record.index[name]
        except KeyError:
            raise AttributeError(f"the record has no field {name!r}") from None
        return self._function.load(self._address + 8 * place)
