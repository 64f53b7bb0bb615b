"""GEMMs on weights as they lie, row by row: for so few rows that packing the weights would take longer.

The products of every element are added in the order in which the packed kernels add them, so that the bits are the
same. Like theirs columns are (vector of units, gate, lane).
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.gemm import tiles
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

# Rows of a tile: beside them a square of weights is in registers.
_MOST_ROWS = 4

_PLACES = "start", "start_stride", "c", "c_stride", "column", "hidden", "gates"
UNPACKED_GEMM_NT = Signature("unpacked", ("count", "vectors", "a_rows", "weights", "k", *_PLACES))
UNPACKED_GEMM_NN = Signature("unpacked_back", ("count", "vectors", "a_rows", "weights", "columns", *_PLACES))


def emit_unpacked_gemm_nt(module: Module, target: Target, dtype: str) -> Function:
    """A function of (count, vectors, A's rows, weights (G·H, k), k, start, its stride, C, its stride, column, H, G).

    Computes as many vectors of columns of A·Wᵀ, for any number of rows, as
    :func:`fusedrnn.engines.cpu.kernels.gemm.emit_gemm`; ``column`` is the number of the first.
    """
    made = [_emit_turned_tile(module, target, dtype, rows) for rows in range(1, _MOST_ROWS + 1)]
    f = Function.of(module, UNPACKED_GEMM_NT)
    count, vectors, a_rows, weights, k, start, start_stride, c, c_stride, column, hidden, gates = f.arguments
    v = Vectors(f, target, dtype)
    # Column by column, without a division for each: the gate, the first unit.
    gate, unit = f.var(column % gates), f.var(column // gates * v.lanes)
    with f.loop(0, vectors) as number:
        real = (hidden - unit.get()).at_most(v.lanes)
        source = weights + (gate.get() * hidden + unit.get()) * k * v.item
        is_last = gate.get().equals(gates - 1)
        unit.set(is_last.select(unit.get() + v.lanes, unit.get()))
        gate.set(is_last.select(0, gate.get() + 1))
        after = weights + (gate.get() * hidden + unit.get()) * k * v.item
        offset = number * v.bytes
        with tiles(f, made, count) as (_, first, tile):
            start_row, c_row = start + first * start_stride + offset, c + first * c_stride + offset
            tile(a_rows + first * 8, source, k, start_row, start_stride, c_row, c_stride, real, after)
    f.ret()
    return f


def _emit_turned_tile(module: Module, target: Target, dtype: str, rows: int) -> Function:
    """Some rows of A times one vector of columns, whose ``real`` weights are rows of k; asks for those needed after."""
    names = ["a", "weights", "k", "start", "start_stride", "c", "c_stride", "real", "after"]
    f = Function(module, f"turned{rows}", names)
    a_rows, weights, k, start, start_stride, c, c_stride, real, after = f.arguments
    v = Vectors(f, target, dtype)
    a = [f.load(a_rows + 8 * i) for i in range(rows)]
    total = [f.var(v.load(start + start_stride * i)) for i in range(rows)]
    # A lane without a unit repeats the last one that has: nobody reads what becomes of it.
    places = [f.constant(lane).at_most(real - 1) * k * v.item for lane in range(v.lanes)]
    columns = [weights + place for place in places]

    def multiply(index: Value, vector: Value) -> None:
        for one, sums in zip(a, total, strict=True):
            sums.set(v.fma(v.broadcast(one + index * v.item), vector, sums.get()))

    even = k - k % v.lanes
    with f.loop(0, even, v.lanes) as index:
        for place in places:
            f.prefetch(after + place + index * v.item)
        for ahead, vector in enumerate(v.transpose_square([column + index * v.item for column in columns])):
            multiply(index + ahead, vector)
    with f.loop(even, k) as index:
        multiply(index, v.gather([column + index * v.item for column in columns]))
    for i, sums in enumerate(total):
        v.store(sums.get(), c + c_stride * i)
    f.ret()
    return f


def emit_unpacked_gemm_nn(module: Module, target: Target, dtype: str) -> Function:
    """A function of (count, vectors, A's rows, weights (G·H, k), k, start, its stride, C, its stride, column, H, G).

    As many vectors of columns of A·W, where the rows of A hold all gates of all units, as packed kernels make them of
    weights transposed; ``column`` is the number of the first.
    """
    width = target.tile[1]
    # A mask would take a register from the panels that need none.
    whole, *edges = [
        [_emit_straight_tile(module, target, dtype, rows, *kind) for rows in range(1, _MOST_ROWS + 1)]
        for kind in ((width, True), *((vectors, False) for vectors in range(1, width + 1)))
    ]
    f = Function.of(module, UNPACKED_GEMM_NN)
    count, vectors, a_rows, weights, columns, start, start_stride, c, c_stride, column, hidden, gates = f.arguments
    v = Vectors(f, target, dtype)
    feature = column * v.lanes
    source, left = weights + feature * v.item, columns - feature

    def multiply(made: list[Function]) -> None:
        with tiles(f, made, count) as (_, first, tile):
            begin, into = start + first * start_stride, c + first * c_stride
            tile(a_rows + first * 8, source, columns * v.item, begin, start_stride, into, c_stride, left, hidden, gates)

    with f.if_else(vectors.equals(width) & (left >= width * v.lanes)) as (of_whole, of_part):
        with of_whole:
            multiply(whole)
        with of_part, f.switch(vectors, range(1, width + 1)) as cases:
            for made, case in zip(edges, cases, strict=True):
                with case:
                    multiply(made)
    f.ret()
    return f


def _emit_straight_tile(
    module: Module, target: Target, dtype: str, rows: int, vectors: int, whole: bool
) -> Function:
    """Some rows of A times some vectors of columns; of the last, if they are not whole, it is what is ``left``."""
    names = ["a", "weights", "stride", "start", "start_stride", "c", "c_stride", "left", "hidden", "gates"]
    f = Function(module, f"{'straight' if whole else 'edge'}{rows}x{vectors}", names)
    a_rows, weights, stride, start, start_stride, c, c_stride, left, hidden, gates = f.arguments
    v = Vectors(f, target, dtype)
    in_last = left - (vectors - 1) * v.lanes
    a = [f.load(a_rows + 8 * i) for i in range(rows)]
    total = [[f.var(v.load(start + start_stride * i + j * v.bytes)) for j in range(vectors)] for i in range(rows)]

    with f.loop(0, hidden, v.lanes) as unit, f.loop(0, gates) as gate:
        real = (hidden - unit).at_most(v.lanes)
        source = weights + (gate * hidden + unit) * stride
        place = (unit * gates + gate * v.lanes) * v.item
        with f.loop(0, real) as lane:
            at = [source + lane * stride + j * v.bytes for j in range(vectors)]
            b = [v.load(one, v.item) for one in (at if whole else at[:-1])]
            if not whole:
                b.append(v.load_masked(at[-1], in_last))
            for i in range(rows):
                scalar = v.broadcast(a[i] + place + lane * v.item)
                for j in range(vectors):
                    total[i][j].set(v.fma(scalar, b[j], total[i][j].get()))
    for i in range(rows):
        for j in range(vectors):
            v.store(total[i][j].get(), c + c_stride * i + j * v.bytes)
    f.ret()
    return f
