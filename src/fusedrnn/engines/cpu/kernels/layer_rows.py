"""How a layer reads the rows of its input and stores rows of its units: dropout, residual connections, row ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fusedrnn.cell.leaves import NewState, Output
from fusedrnn.engines.cpu.kernels.dropout import DROP_ROW
from fusedrnn.engines.cpu.kernels.lowered_cell import STATE_LETTERS, Result
from fusedrnn.engines.cpu.kernels.thread_share import ThreadShare
from fusedrnn.jit.builder import Declared, Value

INPUT_FIELDS = "threshold", "scale", "stream", "residual"
"""Fields of a layer-direction: the dropout of its input, and whether the output is the sum of h and this input.

``scale`` is the bits of a float64, ``stream`` a word of the mask's counter; a threshold of 0 means no dropout.
"""


class LayerRows(ThreadShare):
    """A function of a thread's share of one layer-direction, which reads and stores rows of features."""

    def dropout_counter(self, sequence: Value, time: Value) -> tuple[Value, ...]:
        """What determines the dropout mask of the features that this layer reads."""
        p = self.p
        return sequence, time, p.stream, p.threshold, p.scale, self.c.seed

    def masked_input_row(self, source: Value, into: Value, sequence: Value, time: Value) -> Value:
        """Where to read a row of this layer's input: at ``source``, or ``into``, a copy after dropout."""
        f, size = self.f, self.p.k
        address = f.var(source)
        with f.if_(self.p.threshold > 0):
            address.set(into)
            drop_row = Declared(f.module, DROP_ROW)
            f.copy(into, source, size * self.v.item)
            f.call(drop_row, into, size, *self.dropout_counter(sequence, time))
        return address.get()

    def load_tail(self, address: Value, lanes_left: Value) -> Value:
        """Load a vector at any alignment; at the end of a row only the lanes that are left."""
        v, value = self.v, self.f.var(self.v.const(0.0))
        with self.f.if_else(lanes_left >= v.lanes) as (whole, tail):
            with whole:
                value.set(v.load(address, v.item))
            with tail:
                value.set(v.load_masked(address, lanes_left))
        return value.get()

    def store_tail(self, value: Value, unit_vec: Value, address: Value, size: Value) -> None:
        """Store a vector of units at any alignment; at the end of a row only the units that exist."""
        left = size - unit_vec * self.v.lanes
        with self.f.if_else(left >= self.v.lanes) as (whole, tail):
            with whole:
                self.v.store(value, address, align=self.v.item)
            with tail:
                self.v.store_masked(value, address, left)

    @property
    def output_result(self) -> Result:
        """The result that is the output."""
        return NewState(self.cell.first_state) if self.cell.output is None else Output()

    def state_fields(self, form: str, first: int = 0) -> Iterator[tuple[str, Value]]:
        """For each state its name and the field of a form, such as ``"{}0"`` for h0 and c0; from state ``first`` on."""
        for letter, name in islice(zip(STATE_LETTERS, self.cell.states, strict=False), first, None):
            yield name, getattr(self.p, form.format(letter))

    @property
    def first_other_state(self) -> int:
        """The number of the first state that the output does not show."""
        return 0 if self.is_residual or self.cell.output is not None else 1

    def residual_row(self, table: Value, index: Value) -> dict[Any, Value]:
        """The row of the input that is added to this direction's output, as "x"; from a table of such rows."""
        if not self.is_residual:
            return {}
        return {"x": self.f.load(table + index * 8) + self.direction * self.c.out * self.v.item}
