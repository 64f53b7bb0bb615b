"""GEMMs on unpacked weights: for so few rows that packing would take longer than multiplying.

The products of every element are added in the order of the packed kernels, so that the bits are the same. As in packed
weights, columns are ordered by vector of units, gate and lane.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.gemm import OUTPUT_ARGUMENTS, row_tiles
from fusedrnn.engines.cpu.kernels.products import STORAGE, products_of
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

# Rows of a tile: a square of weights must fit the registers beside the sums.
_MAX_ROWS = 4

_ROWS = "num_rows", "num_col_vecs", "a_rows"
_COLUMNS = "col_vec", "hidden", "gates"
UNPACKED_GEMM_NT = Signature("unpacked_gemm_nt", (*_ROWS, "weights", "k", *OUTPUT_ARGUMENTS, *_COLUMNS))
UNPACKED_GEMM_NN = Signature("unpacked_gemm_nn", (*_ROWS, "weights", "num_cols", *OUTPUT_ARGUMENTS, *_COLUMNS))


def emit_unpacked_gemm_nt(module: Module, target: Target, compute: str) -> Function:
    """The function ``UNPACKED_GEMM_NT``: A·Wᵀ for weights W (gates·hidden, k), from column vector ``col_vec`` on."""
    by_rows = [_emit_transposing_tile(module, target, compute, rows) for rows in range(1, _MAX_ROWS + 1)]
    f = Function.of(module, UNPACKED_GEMM_NT)
    num_rows, num_col_vecs, a_rows, weights, k, c_in, c_in_stride, c, c_stride, col_vec, hidden, gates = f.arguments
    v = Vectors(f, target, STORAGE[compute])
    # Step through gates and units, to save two divisions for each vector of columns.
    gate, unit = f.var(col_vec % gates), f.var(col_vec // gates * v.lanes)
    with f.loop(0, num_col_vecs) as number:
        num_units = (hidden - unit.get()).at_most(v.lanes)
        source = weights + (gate.get() * hidden + unit.get()) * k * v.item
        is_last_gate = gate.get().equals(gates - 1)
        unit.set(is_last_gate.select(unit.get() + v.lanes, unit.get()))
        gate.set(is_last_gate.select(0, gate.get() + 1))
        next_weights = weights + (gate.get() * hidden + unit.get()) * k * v.item
        offset = number * v.bytes
        with row_tiles(f, by_rows, num_rows) as (_, row, call):
            c_in_row, c_row = c_in + row * c_in_stride + offset, c + row * c_stride + offset
            call(a_rows + row * 8, source, k, c_in_row, c_in_stride, c_row, c_stride, num_units, next_weights)
    f.ret()
    return f


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
    # A mask would take a register from the panels that need none.
    whole, *narrow = [
        [_emit_direct_tile(module, target, compute, rows, *shape) for rows in range(1, _MAX_ROWS + 1)]
        for shape in ((width, False), *((col_vecs, True) for col_vecs in range(1, width + 1)))
    ]
    f = Function.of(module, UNPACKED_GEMM_NN)
    num_rows, num_col_vecs, a_rows, weights, num_cols, c_in, c_in_stride, c, c_stride, col_vec, *sizes = f.arguments
    v = Vectors(f, target, STORAGE[compute])
    first_col = col_vec * v.lanes
    source, cols_left = weights + first_col * v.item, num_cols - first_col

    def multiply(by_rows: list[Function]) -> None:
        with row_tiles(f, by_rows, num_rows) as (_, row, call):
            output = c_in + row * c_in_stride, c_in_stride, c + row * c_stride, c_stride
            call(a_rows + row * 8, source, num_cols * v.item, *output, cols_left, *sizes)

    with f.if_else(num_col_vecs.equals(width) & (cols_left >= width * v.lanes)) as (whole_panel, other):
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
