"""The tiles of AMX: eight registers of a thread, each of up to 16 rows of 64 bytes, and the product of two tiles.

An emulated target keeps tiles in memory, and computes the same in the same order with instructions that every processor
has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from llvmlite import ir

from fusedrnn.jit.builder import I64, VOID, Function, Module, Value
from fusedrnn.jit.dot_products import add_groups_of_products, halves_as_float
from fusedrnn.jit.int_vector import int_vector
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

NUM_TILES, TILE_ROWS, ROW_BYTES = 8, 16, 64
TILE_BYTES = TILE_ROWS * ROW_BYTES
RIGHT_TILES = 6, 7
"""The tiles for right operands, which always have all rows."""
_I8 = ir.IntType(8)
_WORD_BYTES = 4
_CONFIG_BYTES = 64
_PALETTE, _ROW_BYTES_OFFSETS, _ROWS_OFFSET = 1, (16, 24), 48
"""The palette of a configuration, and offsets in it: those of the tiles' bytes per row (16-bit numbers, four at each
offset), and that of their numbers of rows (8-bit numbers)."""


class Tiles(Protocol):
    """The tiles in a function under construction, which chooses how many rows all but :data:`RIGHT_TILES` have."""

    def configure(self) -> None:
        """Give the tiles their numbers of rows, unless they have them already. A change sets all tiles to zero."""

    def load(self, tile: int, address: Value, stride: Value) -> None:
        """Load a tile from rows that are ``stride`` bytes apart."""

    def multiply(self, sums: int, left: int, right: int) -> None:
        """Add the product of two tiles to the tile ``sums``.

        A row of ``left`` holds 16 groups of numbers; a row of ``right`` holds one group for each column. A group has
        32 bits.
        """

    def store(self, tile: int, address: Value, stride: Value) -> None:
        """Store a tile in rows that are ``stride`` bytes apart."""


TilesOf = Callable[[Function, Value], Tiles]
"""From a function and a number of rows to the tiles in that function."""


def emit_tiles(module: Module, target: Target, instruction: str) -> TilesOf:
    """Tiles in the functions of a module, multiplied by the instruction ``"tdpbf16ps"`` or ``"tdpbusd"``."""
    if not target.emulated:
        return partial(AmxTiles, instruction)
    return partial(
        _EmulatedTiles,
        _emit_load(module, target),
        _emit_store(module, target),
        _emit_multiply(module, target, instruction),
    )


@contextmanager
def released_tiles(f: Function, target: Target) -> Iterator[None]:
    """Begin and end with tiles in their initial state, so that the system need not save them outside the block.

    What the thread ran before may have left them in another state. Nothing is emitted for targets without tiles.
    """
    release = target.has_tiles and not target.emulated
    if release:
        release_tiles(f)
    yield
    if release:
        release_tiles(f)


def release_tiles(f: Function) -> None:
    """Put the tiles into their initial state."""
    f.intrinsic("llvm.x86.tilerelease", VOID, [])


class AmxTiles:
    """See :class:`Tiles`."""

    def __init__(self, instruction: str, f: Function, rows: Value) -> None:
        self._instruction, self._f, self._rows = instruction, f, rows

    def configure(self) -> None:
        """See :class:`Tiles`. Setting a configuration takes ten times as long as reading it."""
        f = self._f
        config = f.alloca(_CONFIG_BYTES)
        f.intrinsic("llvm.x86.sttilecfg", VOID, [f.pointer(config)])
        rows = f.load(config + _ROWS_OFFSET, _I8, 1).zext(I64)
        with f.if_(rows.compare("!=", self._rows)):
            f.fill_zero(config, f.constant(_CONFIG_BYTES))
            f.store(_PALETTE, config)
            for offset in _ROW_BYTES_OFFSETS:
                f.store(_repeated(ROW_BYTES, 16, 4), config + offset)
            fewer = NUM_TILES - len(RIGHT_TILES)
            all_rows = _repeated(TILE_ROWS, 8, len(RIGHT_TILES)) << 8 * fewer
            f.store(self._rows * _repeated(1, 8, fewer) + all_rows, config + _ROWS_OFFSET)
            f.intrinsic("llvm.x86.ldtilecfg", VOID, [f.pointer(config)])

    def load(self, tile: int, address: Value, stride: Value) -> None:
        """See :class:`Tiles`."""
        self._f.intrinsic("llvm.x86.tileloadd64", VOID, [_I8(tile), self._f.pointer(address), stride])

    def multiply(self, sums: int, left: int, right: int) -> None:
        """See :class:`Tiles`."""
        self._f.intrinsic(f"llvm.x86.{self._instruction}", VOID, [_I8(tile) for tile in (sums, left, right)])

    def store(self, tile: int, address: Value, stride: Value) -> None:
        """See :class:`Tiles`."""
        self._f.intrinsic("llvm.x86.tilestored64", VOID, [_I8(tile), self._f.pointer(address), stride])


def _repeated(number: int, bits: int, times: int) -> int:
    """An integer that holds ``number`` in each of ``times`` fields of ``bits`` bits."""
    return sum(number << place * bits for place in range(times))


class _EmulatedTiles:
    """See :class:`Tiles`. These are in memory, and functions load, store and multiply them."""

    def __init__(self, load: Function, store: Function, multiply: Function, f: Function, rows: Value) -> None:
        self._load, self._store, self._multiply = load, store, multiply
        self._f, self._rows, self._memory = f, rows, aligned_alloca(f, NUM_TILES * TILE_BYTES)

    def _tile(self, tile: int) -> Value:
        return self._memory + tile * TILE_BYTES

    def configure(self) -> None:
        """See :class:`Tiles`."""

    def load(self, tile: int, address: Value, stride: Value) -> None:
        """See :class:`Tiles`."""
        rows = TILE_ROWS if tile in RIGHT_TILES else self._rows
        self._f.call(self._load, self._tile(tile), address, stride, rows)

    def multiply(self, sums: int, left: int, right: int) -> None:
        """See :class:`Tiles`."""
        self._f.call(self._multiply, self._tile(sums), self._tile(left), self._tile(right), self._rows)

    def store(self, tile: int, address: Value, stride: Value) -> None:
        """See :class:`Tiles`."""
        self._f.call(self._store, self._tile(tile), address, stride, self._rows)


def aligned_alloca(f: Function, size: int) -> Value:
    """The address of ``size`` bytes on the stack, aligned to a row of a tile."""
    return f.alloca(size + ROW_BYTES) + (ROW_BYTES - 1) & -ROW_BYTES


def _emit_load(module: Module, target: Target) -> Function:
    f = Function(module, "load_tile", ["tile", "address", "stride", "rows"])
    tile, address, stride, rows = f.arguments
    v = Vectors(f, target, "float32")
    with f.loop(0, rows) as row:
        v.store(v.load(address + row * stride, v.item), tile + row * ROW_BYTES)
    f.ret()
    return f


def _emit_store(module: Module, target: Target) -> Function:
    f = Function(module, "store_tile", ["tile", "address", "stride", "rows"])
    tile, address, stride, rows = f.arguments
    v = Vectors(f, target, "float32")
    with f.loop(0, rows) as row:
        v.store(v.load(tile + row * ROW_BYTES), address + row * stride, v.item)
    f.ret()
    return f


def _emit_multiply(module: Module, target: Target, instruction: str) -> Function:
    f = Function(module, "multiply_tiles", ["sums", "left", "right", "rows"])
    sums, left, right, rows = f.arguments
    v = Vectors(f, target, "float32")
    add = {"tdpbf16ps": _add_bfloat16_row, "tdpbusd": _add_int8_row}[instruction]
    with f.loop(0, rows) as row:
        add(v, sums + row * ROW_BYTES, left + row * ROW_BYTES, right)
    f.ret()
    return f


def _add_bfloat16_row(v: Vectors, sums: Value, left: Value, right: Value) -> None:
    """Two chains of fused multiply-adds begin at zero, one over the low and one over the high numbers of all pairs.

    Their sum is added to ``sums``. This is the order that Intel's manual defines. Denormals are zero.
    """
    f = v.function
    totals = [f.var(v.const(0.0)) for _ in range(2)]
    with f.loop(0, TILE_ROWS) as group:
        a = halves_as_float(v, v.splat_word(left + group * _WORD_BYTES))
        b = halves_as_float(v, f.load(right + group * ROW_BYTES, v.itype, ROW_BYTES))
        for total, a_half, b_half in zip(totals, a, b, strict=True):
            total.set(v.fma(a_half, b_half, total.get()))
    low, high = totals
    v.store(v.load(sums) + (low.get() + high.get()), sums)


def _add_int8_row(v: Vectors, sums: Value, left: Value, right: Value) -> None:
    """All products of uint8 and int8, added in int32."""
    f = v.function
    numbers = _WORD_BYTES * v.lanes
    int8, int32 = int_vector(8, numbers), int_vector(32, numbers)
    total = f.var(f.load(sums, v.itype, ROW_BYTES))
    with f.loop(0, TILE_ROWS) as group:
        a = v.splat_word(left + group * _WORD_BYTES).bitcast(int8).zext(int32)
        b = f.load(right + group * ROW_BYTES, int8, ROW_BYTES).sext(int32)
        total.set(add_groups_of_products(a * b, total.get()))
    f.store(total.get(), sums, ROW_BYTES)
