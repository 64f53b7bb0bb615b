"""Vectors of float32 or float64 in registers: loads and stores, lanes, and the arithmetic of their elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, Value
from fusedrnn.jit.elementwise import DOUBLE, Elementwise
from fusedrnn.jit.int_vector import shuffle


class Vectors(Elementwise):
    """Operations on vectors of one format in a function under construction; also the emitters of cells' operations."""

    def load(self, address: Value, align: int | None = None) -> Value:
        """Load a vector; by default aligned to its own size."""
        return self.function.load(address, self.type, align or self.bytes)

    def store(self, value: Value, address: Value, align: int | None = None) -> None:
        """Store a vector; by default aligned to its own size."""
        self.function.store(value, address, align or self.bytes)

    def store_masked(self, value: Value, address: Value, count: Value) -> None:
        """Store the first ``count`` lanes at any alignment; nothing else is written."""
        f = self.function
        arguments = [value, f.pointer(address), ir.Constant(I32, self.item), self._mask(count)]
        f.intrinsic(f"llvm.masked.store.{self._suffix}.p0", ir.VoidType(), arguments)

    def load_masked(self, address: Value, count: Value) -> Value:
        """Load the first ``count`` lanes at any alignment, with zeros in the others; nothing else is read."""
        f = self.function
        arguments = [f.pointer(address), ir.Constant(I32, self.item), self._mask(count), self.const(0.0)]
        return f.intrinsic(f"llvm.masked.load.{self._suffix}.p0", self.type, arguments)

    def zero_tail(self, value: Value, count: Value) -> Value:
        """The first ``count`` lanes of a vector, with zeros in the others."""
        return self._mask(count).select(value, 0.0)

    def _mask(self, count: Value) -> Value:
        lane = Value(self.function, ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes))))
        return lane < self._splat(count, I64)

    def broadcast(self, address: Value) -> Value:
        """Load a number into every lane."""
        return self.splat(self.function.load(address, self.format.scalar, self.item))

    def gather(self, addresses: Sequence[Value]) -> Value:
        """Load a number from each address into a lane."""
        f = self.function
        vector = ir.Constant(self.type, ir.Undefined)
        for lane, address in enumerate(addresses):
            scalar = f.load(address, self.format.scalar, self.item)
            vector = f.builder.insert_element(vector, scalar.ir, ir.Constant(I32, lane))
        return Value(f, vector)

    def transpose_square(self, addresses: Sequence[Value]) -> list[Value]:
        """Load a square at any alignment and transpose it: lane i of vector j is number j at address i.

        A transpose exchanges each bit of a lane's number with the same bit of its row's number. To exchange the highest
        bit, halves of two rows are loaded into one vector, which takes no shuffle on most processors. The other bits
        are exchanged by shuffles.
        """
        half = self.lanes // 2
        rows = [
            self._load_halves(low + offset, high + offset)
            for offset in (0, half * self.item)
            for low, high in zip(addresses[:half], addresses[half:], strict=True)
        ]
        distance = 1
        while distance < half:
            lanes = range(self.lanes)
            first = [lane if not lane & distance else self.lanes + lane - distance for lane in lanes]
            second = [lane + distance if not lane & distance else self.lanes + lane for lane in lanes]
            for row in lanes:
                if not row & distance:
                    pair = rows[row], rows[row + distance]
                    rows[row], rows[row + distance] = shuffle(*pair, first), shuffle(*pair, second)
            distance *= 2
        return rows

    def _load_halves(self, low: Value, high: Value) -> Value:
        """A vector of two halves, one from each address."""
        kind = ir.VectorType(self.format.scalar, self.lanes // 2)
        first, second = (self.function.load(address, kind, self.item) for address in (low, high))
        return shuffle(first, second, range(self.lanes))

    def splat(self, scalar: Value) -> Value:
        """The number in every lane."""
        return self._splat(scalar, self.format.scalar)

    def reduce(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Combine all lanes; every lane holds the result."""
        distance = self.lanes // 2
        while distance:
            swapped = shuffle(vector, vector, [lane ^ distance for lane in range(self.lanes)])
            vector, distance = combine(vector, swapped), distance // 2
        return vector

    def store_first(self, vector: Value, address: Value) -> None:
        """Store the first lane."""
        builder = self.function.builder
        element = Value(self.function, builder.extract_element(vector.ir, ir.Constant(I32, 0)))
        self.function.store(element, address, self.item)

    def splat_word(self, address: Value) -> Value:
        """Load a 32-bit integer into every lane."""
        return self._splat(self.function.load(address, I32, 4), I32)

    def splat_float64(self, bits: Value) -> Value:
        """A float64, given by its bits, rounded to this format, in every lane."""
        number = bits.bitcast(DOUBLE)
        if self.format.scalar is not DOUBLE:
            number = Value(self.function, self.function.builder.fptrunc(number.ir, self.format.scalar))
        return self.splat(number)

    def _splat(self, scalar: Value, kind: ir.Type) -> Value:
        builder, wide = self.function.builder, ir.VectorType(kind, self.lanes)
        first = builder.insert_element(ir.Constant(wide, ir.Undefined), scalar.ir, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return Value(self.function, builder.shuffle_vector(first, ir.Constant(wide, ir.Undefined), zeros))
