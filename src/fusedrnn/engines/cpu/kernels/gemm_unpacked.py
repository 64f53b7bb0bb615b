"""GEMMs on unpacked weights, for calls that read them so rarely that packing them first would take longer.

The products of every element are added in the order of the packed kernels, so that the bits are the same. As in packed
weights, columns are ordered by vector of units, gate and lane. A few rows are multiplied by the weights where they are.
For more rows, a part of a panel at a time is packed into scratch, which stays in cache, and is multiplied there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusedrnn.engines.cpu.kernels.gemm import GEMM, OUTPUT_ARGUMENTS, row_tiles
from fusedrnn.engines.cpu.kernels.panel_packing import emit_pack_columns, store_row_slots
from fusedrnn.engines.cpu.kernels.products import STORAGE, products_of
from fusedrnn.engines.cpu.kernels.workspace import PACKED_K
from fusedrnn.jit.builder import Declared, Function, Module, Signature, Value
from fusedrnn.jit.sync import CACHE_LINE
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

# Rows of a tile: the registers must hold a square of weights besides the sums.
_MAX_ROWS = 4

_ROWS = "num_rows", "num_col_vecs", "a_rows"
_COLUMNS = "col_vec", "hidden", "gates", "scratch"
UNPACKED_GEMM_NT = Signature("unpacked_gemm_nt", (*_ROWS, "weights", "k", *OUTPUT_ARGUMENTS, *_COLUMNS))
UNPACKED_GEMM_NN = Signature("unpacked_gemm_nn", (*_ROWS, "weights", "num_cols", *OUTPUT_ARGUMENTS, *_COLUMNS))


def emit_unpacked_gemm_nt(module: Module, target: Target, compute: str) -> Function:
    """The function ``UNPACKED_GEMM_NT``: A·Wᵀ for weights W (gates·hidden, k), from column vector ``col_vec`` on."""
    by_rows = [_emit_transposing_tile(module, target, compute, rows) for rows in range(1, _MAX_ROWS + 1)]
    pack_columns = emit_pack_columns(module, target, compute)
    f = Function.of(module, UNPACKED_GEMM_NT)
    num_rows, num_col_vecs, a_rows, weights, k, c_in, c_in_stride, c, c_stride, col_vec, *sizes = f.arguments
    hidden, gates, scratch = sizes
    v = Vectors(f, target, STORAGE[compute])
    slot_bytes = products_of(compute, v).b_bytes

    @contextmanager
    def columns() -> Iterator[tuple[Value, Value, Value, Value]]:
        """Loop over vectors of columns; yields the number, the rows of weights, how many they are, the next rows."""
        # Step through gates and units, to save two divisions for each vector of columns.
        gate, unit = f.var(col_vec % gates), f.var(col_vec // gates * v.lanes)
        with f.loop(0, num_col_vecs) as number:
            num_units = (hidden - unit.get()).at_most(v.lanes)
            source = weights + (gate.get() * hidden + unit.get()) * k * v.item
            is_last_gate = gate.get().equals(gates - 1)
            unit.set(is_last_gate.select(unit.get() + v.lanes, unit.get()))
            gate.set(is_last_gate.select(0, gate.get() + 1))
            yield number, source, num_units, weights + (gate.get() * hidden + unit.get()) * k * v.item

    def pack(first_k: Value, size: Value) -> None:
        with columns() as (number, source, num_units, _):
            dest = _packed_part(scratch, num_rows) + number * slot_bytes
            f.call(pack_columns, source + first_k * v.item, k * v.item, size, dest, num_units)

    with f.if_else(num_rows > _MAX_ROWS) as (many, few):
        with many:
            _multiply_parts(f, v, compute, (k, f.constant(PACKED_K)), pack)
        with few, columns() as (number, source, num_units, next_source):
            offset = number * v.bytes
            with row_tiles(f, by_rows, num_rows) as (_, row, call):
                c_in_row, c_row = c_in + row * c_in_stride + offset, c + row * c_stride + offset
                call(a_rows + row * 8, source, k, c_in_row, c_in_stride, c_row, c_stride, num_units, next_source)
    f.ret()
    return f


def _multiply_parts(
    f: Function, v: Vectors, compute: str, k_parts: tuple[Value, Value], pack: Callable[[Value, Value], None]
) -> None:
    """Pack a part of a panel at a time by ``pack(first k, number)``, and multiply it by all rows.

    ``k_parts`` are K, and the K of a part.
    """
    num_rows, num_col_vecs, a_rows, _, _, c_in, c_in_stride, c, c_stride, *_ = f.arguments
    table, gemm, group = f.arguments[-1], Declared(f.module, GEMM), products_of(compute, v).group
    panel = _packed_part(table, num_rows)
    k, part_k = k_parts
    with f.loop(0, k, part_k) as first_k:
        size = (k - first_k).at_most(part_k)
        pack(first_k, size)
        with f.loop(0, num_rows) as row:
            f.store(f.load(a_rows + row * 8) + first_k * v.item, table + row * 8)
        is_first = first_k.is_zero
        start = is_first.select(c_in, c), is_first.select(c_in_stride, c_stride)
        groups = (size + (group - 1)) // group
        f.call(gemm, num_rows, num_col_vecs, table, panel, groups, *start, c, c_stride, panel)


def _packed_part(scratch: Value, num_rows: Value) -> Value:
    """Where a part of a panel is packed: after a table of addresses."""
    return scratch + (num_rows * 8 + (CACHE_LINE - 1)) // CACHE_LINE * CACHE_LINE


def _emit_transposing_tile(module: Module, target: Target, compute: str, rows: int) -> Function:
    """A function for some rows of A and one vector of columns, that is ``num_units`` rows of the weights.

    It transposes squares of weights in registers, and prefetches those of the next vector of columns.
    """
    f = Function(module, f"transposing{rows}", ["a", "weights", "k", *OUTPUT_ARGUMENTS, "num_units", "prefetch"])
    a_table, weights, k, c_in, c_in_stride, c, c_stride, num_units, prefetch = f.arguments
    v = Vectors(f, target, STORAGE[compute])
    products = products_of(compute, v)
    a_rows = [f.load(a_table + 8 * i) for i in range(rows)]
    sums = [f.var(v.load(c_in + c_in_stride * i)) for i in range(rows)]
    # A lane without a unit repeats the last unit; its result is not used.
    offsets = [f.constant(lane).at_most(num_units - 1) * k * v.item for lane in range(v.lanes)]
    weight_rows = [weights + offset for offset in offsets]

    def multiply(index: Value, b_vec: Value) -> None:
        for a_row, total in zip(a_rows, sums, strict=True):
            total.set(v.fma(products.unpacked_a(a_row, index), b_vec, total.get()))

    even = k - k % v.lanes
    with f.loop(0, even, v.lanes) as index:
        for offset in offsets:
            f.prefetch(prefetch + offset + index * v.item)
        for step, b_vec in enumerate(v.transpose_square([row + index * v.item for row in weight_rows])):
            multiply(index + step, products.unpacked_b(b_vec))
    with f.loop(even, k) as index:
        multiply(index, products.unpacked_b(v.gather([row + index * v.item for row in weight_rows])))
    for i, total in enumerate(sums):
        v.store(total.get(), c + c_stride * i)
    f.ret()
    return f


def emit_unpacked_gemm_nn(module: Module, target: Target, compute: str) -> Function:
    """The function ``UNPACKED_GEMM_NN``: A·W for weights W (gates·hidden, num_cols), from vector ``col_vec`` on.

    A row of A holds all gates of all units, in the order in which backward stores gate gradients.
    """
    width = target.tile[1]
    # Whole panels have functions without a mask, which would take a register.
    whole, *narrow = [
        [_emit_direct_tile(module, target, compute, rows, *shape) for rows in range(1, _MAX_ROWS + 1)]
        for shape in ((width, False), *((col_vecs, True) for col_vecs in range(1, width + 1)))
    ]
    f = Function.of(module, UNPACKED_GEMM_NN)
    num_rows, num_col_vecs, a_rows, weights, num_cols, c_in, c_in_stride, c, c_stride, col_vec, *sizes = f.arguments
    hidden, gates, scratch = sizes
    v = Vectors(f, target, STORAGE[compute])
    products = products_of(compute, v)
    first_col, group = col_vec * v.lanes, products.group
    source, cols_left = weights + first_col * v.item, num_cols - first_col

    def multiply(by_rows: list[Function]) -> None:
        with row_tiles(f, by_rows, num_rows) as (_, row, call):
            output = c_in + row * c_in_stride, c_in_stride, c + row * c_stride, c_stride
            call(a_rows + row * 8, source, num_cols * v.item, *output, cols_left, hidden, gates)

    def pack(first_k: Value, size: Value) -> None:
        """Pack rows of weights: those of whole unit vectors, all gates of each."""
        first_unit = first_k // gates
        with f.loop(0, size // (gates * v.lanes)) as unit_vec, f.loop(0, gates) as gate:
            unit = first_unit + unit_vec * v.lanes
            first_row = source + (gate * hidden + unit) * num_cols * v.item
            groups = (unit_vec * gates + gate) * (v.lanes // group)
            into = _packed_part(scratch, num_rows) + groups * (width * products.b_bytes)
            with f.loop(0, v.lanes, group) as lane:
                rows = [first_row + (lane + number) * num_cols * v.item for number in range(group)]
                units_left = hidden - unit - lane
                dest = into + lane // group * (width * products.b_bytes)
                with f.if_else((units_left >= group) & (cols_left >= width * v.lanes)) as (all_exist, some):
                    with all_exist:
                        store_row_slots(v, products, rows, dest, width)
                    with some:
                        lefts = [(units_left > number).select(cols_left, 0) for number in range(group)]
                        store_row_slots(v, products, rows, dest, width, lefts)

    unit_vecs, gate_lanes = (hidden + (v.lanes - 1)) // v.lanes, gates * v.lanes
    part_unit_vecs = f.constant(PACKED_K) // gate_lanes
    part_unit_vecs = (part_unit_vecs > 0).select(part_unit_vecs, 1)
    with f.if_else(num_rows > _MAX_ROWS) as (many, few):
        with many:
            _multiply_parts(f, v, compute, (unit_vecs * gate_lanes, part_unit_vecs * gate_lanes), pack)
        with few, f.if_else(num_col_vecs.equals(width) & (cols_left >= width * v.lanes)) as (whole_panel, other):
            with whole_panel:
                multiply(whole)
            with other:
                for by_rows in f.switch(num_col_vecs, dict(enumerate(narrow, 1))):
                    multiply(by_rows)
    f.ret()
    return f


def _emit_direct_tile(
    module: Module, target: Target, compute: str, rows: int, col_vecs: int, masked: bool
) -> Function:
    """A function for some rows of A and some vectors of columns; if masked, the last vector may reach past the end."""
    names = ["a", "weights", "stride", *OUTPUT_ARGUMENTS, "cols_left", "hidden", "gates"]
    f = Function(module, f"{'masked' if masked else 'direct'}{rows}x{col_vecs}", names)
    a_table, weights, stride, c_in, c_in_stride, c, c_stride, cols_left, hidden, gates = f.arguments
    v = Vectors(f, target, STORAGE[compute])
    products, in_last = products_of(compute, v), cols_left - (col_vecs - 1) * v.lanes
    a_rows = [f.load(a_table + 8 * i) for i in range(rows)]
    sums = [[f.var(v.load(c_in + c_in_stride * i + j * v.bytes)) for j in range(col_vecs)] for i in range(rows)]

    with f.loop(0, hidden, v.lanes) as unit, f.loop(0, gates) as gate:
        num_units = (hidden - unit).at_most(v.lanes)
        source = weights + (gate * hidden + unit) * stride
        a_index = unit * gates + gate * v.lanes
        with f.loop(0, num_units) as lane:
            b_row = [source + lane * stride + j * v.bytes for j in range(col_vecs)]
            b_vecs = [v.load(address, v.item) for address in (b_row[:-1] if masked else b_row)]
            if masked:
                b_vecs.append(v.load_masked(b_row[-1], in_last))
            b_vecs = [products.unpacked_b(b_vec) for b_vec in b_vecs]
            for a_row, row_sums in zip(a_rows, sums, strict=True):
                a_element = products.unpacked_a(a_row, a_index + lane)
                for b_vec, total in zip(b_vecs, row_sums, strict=True):
                    total.set(v.fma(a_element, b_vec, total.get()))
    for i, row_sums in enumerate(sums):
        for j, total in enumerate(row_sums):
            v.store(total.get(), c + c_stride * i + j * v.bytes)
    f.ret()
    return f
