"""How parts of a panel of weights are packed, both by the packing job and by GEMMs on unpacked weights."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.engines.cpu.kernels.products import STORAGE, Products, products_of
from fusedrnn.jit.builder import Function, Module, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors


def store_slot(v: Vectors, products: Products, elements: Sequence[Value], address: Value) -> Value:
    """Store a group of a vector of columns, and return it as it is stored."""
    slot = products.slot(elements)
    v.function.store(slot, address, products.b_bytes)
    return slot


def store_row_slots(
    v: Vectors, products: Products, rows: Sequence[Value], into: Value, panel_vectors: int,
    sizes: Sequence[Value] | None = None,
) -> None:  # fmt: skip
    """Store a group of rows of a panel: whole vectors of each row, or as many elements of it as ``sizes`` says."""
    for vector in range(panel_vectors):
        addresses = [row + vector * v.bytes for row in rows]
        if sizes is None:
            elements = [v.load(address, v.item) for address in addresses]
        else:
            lefts = [size - vector * v.lanes for size in sizes]
            elements = [v.load_masked(address, left) for address, left in zip(addresses, lefts, strict=True)]
        store_slot(v, products, elements, into + vector * products.b_bytes)


def emit_pack_columns(module: Module, target: Target, compute: str) -> Function:
    """A function of (source, row_bytes, k, dest, count): transpose ``count`` rows into a vector of columns of a panel.

    The rows are ``row_bytes`` apart, and k elements of each are packed; columns without a row are zeros.
    """
    f = Function(module, "pack_columns", ["source", "row_bytes", "k", "dest", "count"])
    count, v = f.arguments[4], Vectors(f, target, STORAGE[compute])
    columns = _Columns(f, v, products_of(compute, v), target.tile[1])
    with f.if_else(count.equals(v.lanes)) as (whole, tail):
        with whole:
            columns.transpose()
        with tail, f.if_else(count > 0) as (some, none):
            with some:
                columns.transpose(count)
            with none:
                columns.fill_zero()
    f.ret()
    return f


class _Columns:
    """The columns that ``pack_columns`` packs."""

    def __init__(self, f: Function, v: Vectors, products: Products, panel_vectors: int) -> None:
        self.f, self.v, self.products = f, v, products
        self.source, self.row_bytes, self.k, self.dest = f.arguments[:4]
        self.group_bytes = panel_vectors * products.b_bytes

    def fill_zero(self) -> None:
        """Store zeros in the head and in all groups."""
        f, group = self.f, self.products.group
        with f.loop(0, (self.k + (group - 1)) // group + self.products.head) as index:
            store_slot(self.v, self.products, [self.v.const(0.0)] * group, self.dest + index * self.group_bytes)

    def transpose(self, count: Value | None = None) -> None:
        """Transpose as many rows as a vector has lanes; if ``count`` is given, only so many, and zeros after them."""
        f, v, k, group = self.f, self.v, self.k, self.products.group
        head, first_slot = f.var(f.constant(0, v.itype)), self.dest + self.products.head * self.group_bytes
        lanes = [f.constant(lane) for lane in range(v.lanes)]
        if count is not None:  # the last row takes the place of rows that do not exist
            lanes = [lane.at_most(count - 1) for lane in lanes]
        rows = [self.source + self.row_bytes * lane for lane in lanes]

        def column(vector: Value) -> Value:
            return vector if count is None else v.zero_tail(vector, count)

        def store(elements: Sequence[Value], index: Value) -> None:
            slot = store_slot(v, self.products, elements, first_slot + index // group * self.group_bytes)
            head.set(self.products.head_sum(head.get(), slot))

        whole_squares = k - k % v.lanes
        with f.loop(0, whole_squares, v.lanes) as first:
            square = [column(vector) for vector in v.transpose_square([row + first * v.item for row in rows])]
            for offset in range(0, v.lanes, group):
                store(square[offset : offset + group], first + offset)
        with f.loop(whole_squares, k, group) as first:
            elements = []
            for offset in range(group):
                index = (first + offset).at_most(k - 1) if offset else first
                element = column(v.gather([row + index * v.item for row in rows]))
                elements.append((first + offset < k).select(element, v.const(0.0)) if offset else element)
            store(elements, first)
        if self.products.head:
            f.store(head.get(), self.dest, v.bytes)
