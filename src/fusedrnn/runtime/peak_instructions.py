"""The instructions whose rates are a format's peak. Each has a small emitter of a loop of independent instructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fusedrnn.jit.builder import Value
from fusedrnn.jit.dot_products import add_bfloat16_products, add_int8_products
from fusedrnn.jit.int_vector import int_vector, shuffle
from fusedrnn.jit.target import ITEM_SIZE, Target
from fusedrnn.jit.tiles import RIGHT_TILES, ROW_BYTES, TILE_ROWS, AmxTiles, released_tiles
from fusedrnn.jit.vector import Vectors

_OPERAND_BYTES = 64
_SUM_TILES = range(6)

Step = Callable[[Vectors, Value, Value, Value], Value]
"""From a chain's value and two operands to its next value."""


class Instruction(Protocol):
    """An instruction that is measured."""

    @property
    def name(self) -> str:
        """Its name, for users."""

    @property
    def iterations(self) -> int:
        """Iterations of the loop, which take half a millisecond."""

    def operations(self, target: Target, dtype: str) -> int:
        """Multiplications and additions in an iteration."""

    def emit(self, v: Vectors, operands: Value, into: Value) -> None:
        """Emit a loop that runs it.

        ``operands`` is the address of operands, all zeros. ``into`` is where a result may be stored that depends on
        all iterations.
        """


@dataclass(frozen=True)
class VectorInstruction:
    """An instruction on vectors, in chains.

    Attributes:
        name: Its name, for users.
        products: Products that it adds to a lane.
        step: Emits it.
        chains: Independent chains: enough to hide the latency on any processor known, few enough for 16 registers.
        iterations: See :class:`Instruction`.
    """

    name: str
    products: int
    step: Step
    chains: int = 12
    iterations: int = 250_000

    def operations(self, target: Target, dtype: str) -> int:
        """See :class:`Instruction`."""
        return 2 * self.chains * target.lanes(dtype) * self.products

    def emit(self, v: Vectors, operands: Value, into: Value) -> None:
        """See :class:`Instruction`. Operands come from memory, so that the compiler cannot compute the result."""
        f = v.function
        chains = [f.var(v.const(float(number))) for number in range(self.chains)]
        left, right = v.load(operands), v.load(operands + _OPERAND_BYTES)
        with f.loop(0, self.iterations):
            for chain in chains:
                chain.set(self.step(v, chain.get(), left, right))
        total = chains[0].get()
        for chain in chains[1:]:
            total = total + chain.get()
        v.store(total, into)


@dataclass(frozen=True)
class TileInstruction:
    """An AMX instruction, which adds the products of two tiles to a third one of 16 x 16 sums.

    Attributes:
        name: Its name, for users and for LLVM.
        products: Products that it adds to a sum for each 32-bit group of a row: 2 of bfloat16, 4 of int8.
        iterations: See :class:`Instruction`.
    """

    name: str
    products: int
    iterations: int = 16_000

    def operations(self, target: Target, dtype: str) -> int:
        """See :class:`Instruction`."""
        numbers_per_row = ROW_BYTES // ITEM_SIZE["float32"]
        return 2 * len(_SUM_TILES) * TILE_ROWS * numbers_per_row * numbers_per_row * self.products

    def emit(self, v: Vectors, operands: Value, into: Value) -> None:
        """See :class:`Instruction`. Configuring the tiles sets them to zero; they are released at the end."""
        f = v.function
        tiles = AmxTiles(self.name, f, f.constant(TILE_ROWS))
        with released_tiles(f, v.target):
            tiles.configure()
            with f.loop(0, self.iterations):
                for tile in _SUM_TILES:
                    tiles.multiply(tile, *RIGHT_TILES)


def _fma(v: Vectors, total: Value, factor: Value, addend: Value) -> Value:
    """A step of a chain. Factor and addend are zeros, so that the chain never holds a denormal number."""
    return v.fma(total, factor, addend)


def _int16_pairs(v: Vectors, total: Value, left: Value, right: Value) -> Value:
    """Products of int16, summed by pairs, as in the micro-kernel of int8: two instructions.

    The chain is an operand of its own product, since the compiler would move a constant product out of the loop.
    """
    int16, int32 = int_vector(16, 2 * v.lanes), int_vector(32, 2 * v.lanes)
    integers = total.bitcast(v.itype)
    products = integers.bitcast(int16).sext(int32) * left.bitcast(int16).sext(int32)
    even, odd = (shuffle(products, products, range(first, 2 * v.lanes, 2)) for first in (0, 1))
    return (integers + (even + odd)).bitcast(v.type)


def _int8_groups(v: Vectors, total: Value, left: Value, right: Value) -> Value:
    return add_int8_products(v, left.bitcast(v.itype), right.bitcast(v.itype), total.bitcast(v.itype)).bitcast(v.type)


def _bfloat16_pairs(v: Vectors, total: Value, left: Value, right: Value) -> Value:
    return add_bfloat16_products(v, left.bitcast(v.itype), right.bitcast(v.itype), total)


FMA = VectorInstruction("FMA", 1, _fma)
VDPBF16PS = VectorInstruction("vdpbf16ps", 2, _bfloat16_pairs)
VPDPBUSD = VectorInstruction("vpdpbusd", 4, _int8_groups)
INT16_PAIRS = VectorInstruction("products of int16 by pairs", 2, _int16_pairs, chains=13)
TDPBF16PS, TDPBUSD = TileInstruction("tdpbf16ps", 2), TileInstruction("tdpbusd", 4)
_DOT_PRODUCTS: dict[str, Instruction] = {"bfloat16": VDPBF16PS, "int8": VPDPBUSD}
_TILES: dict[str, Instruction] = {"bfloat16": TDPBF16PS, "int8": TDPBUSD}


def instruction_of(number_format: str, target: Target) -> Instruction:
    """The instruction with which kernels for the target multiply operands of a format.

    Without a dot product bfloat16 is widened to float32, so that its peak is that of FMA.
    """
    if number_format in target.dot_products and not target.emulated:
        return (_TILES if target.has_tiles else _DOT_PRODUCTS)[number_format]
    return INT16_PAIRS if number_format == "int8" else FMA
