"""Structs of 64-bit integers that Python writes and machine code reads, or the reverse."""

from __future__ import annotations

from collections.abc import Mapping

from fusedrnn.jit.builder import Function, Value


class Struct:
    """Named fields, each a 64-bit integer.

    Attributes:
        names: The fields in the order of memory.
        index: The number of each field.
        size: Bytes of the struct.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.index = {name: number for number, name in enumerate(names)}
        self.size = 8 * len(names)

    def __len__(self) -> int:
        return len(self.names)

    def offset(self, name: str) -> int:
        """Bytes from the beginning of the struct to a field."""
        return 8 * self.index[name]

    def values(self, fields: Mapping[str, int]) -> list[int]:
        """The values of the fields in the order of memory; other entries of the mapping are left out.

        Raises:
            KeyError: If a field has no value.
        """
        return [fields[name] for name in self.names]

    def read(self, function: Function, address: Value) -> Fields:
        """Access to the fields of the struct at an address."""
        return Fields(self, function, address)


class Fields:
    """The fields of a struct in memory. Each mention of a field emits a load."""

    def __init__(self, struct: Struct, function: Function, address: Value) -> None:
        self._struct, self._function, self._address = struct, function, address

    def __getattr__(self, name: str) -> Value:
        try:
            offset = self._struct.offset(name)
        except KeyError:
            raise AttributeError(f"the struct has no field {name!r}") from None
        return self._function.load(self._address + offset)
