"""Dropout's mask in vector registers: Philox4x32-10, the same numbers as :mod:`fusedrnn.dropout` gives.

A group of counters, one in each lane, yields four words for each: those of consecutive features once they are put in
order. A panel's width is a multiple of four on every target, so that a panel always begins with a whole counter.
"""

from __future__ import annotations

from collections.abc import Iterable

from llvmlite import ir

from fusedrnn.dropout import MULTIPLIERS, ROUNDS, WEYL, WORDS
from fusedrnn.jit.builder import I32, I64, Function, Module, Signature, Value
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import DOUBLE, Vectors

# What a mask depends on besides the feature.
_DRAW = ("index", "time", "layer", "threshold", "scale", "seed")

DROP_PANEL = Signature("drop_panel", ("at", "feature", *_DRAW))
DROP_ROW = Signature("drop_row", ("source", "into", "features", *_DRAW))


class Dropout:
    """Emits functions that drop elements of one float type on one target."""

    def __init__(self, module: Module, target: Target, dtype: str) -> None:
        self._vectors = target.tile[1]
        self._width = target.lanes(dtype) * self._vectors
        blocks = 1
        while blocks * WORDS < self._width:
            blocks *= 2
        self._blocks = blocks
        self._narrow, self._wide = ir.VectorType(I32, blocks), ir.VectorType(I64, blocks)
        self._module, self._target, self._dtype = module, target, dtype

    def emit(self) -> None:
        """Emit both functions."""
        self._emit_row(self._emit_panel())

    def _emit_panel(self) -> Function:
        """A function that drops some of a panel's features, aligned and in place, and scales the others."""
        f = Function.of(self._module, DROP_PANEL)
        at, feature, index, time, layer, threshold, scale, seed = f.arguments
        v = Vectors(f, self._target, self._dtype)
        lane = Value(f, ir.Constant(self._narrow, list(range(self._blocks))))
        counter = [self._splat(f, feature // WORDS) + lane, *(self._splat(f, word) for word in (index, time, layer))]
        words = self._philox(f, counter, [self._splat(f, seed), self._splat(f, seed >> 32)])
        order = [word * self._blocks + block for block in range(self._blocks) for word in range(WORDS)]
        low, high = (self._shuffle(f, words[i], words[i + 1], range(2 * self._blocks)) for i in (0, 2))
        number = scale.bitcast(DOUBLE)
        if v.format.scalar is not DOUBLE:
            number = Value(f, f.builder.fptrunc(number.ir, v.format.scalar))
        kept, limit = v.splat(number), f.builder.trunc(threshold.ir, I32)
        for place in range(self._vectors):
            drawn = self._shuffle(f, low, high, order[place * v.lanes : (place + 1) * v.lanes])
            first = f.builder.insert_element(ir.Constant(drawn.type, ir.Undefined), limit, ir.Constant(I32, 0))
            limits = self._shuffle(f, Value(f, first), Value(f, first), [0] * v.lanes)
            factor = Value(f, f.builder.icmp_unsigned(">=", drawn.ir, limits.ir)).select(kept, 0.0)
            v.store(v.load(at + place * v.bytes) * factor, at + place * v.bytes)
        f.done()
        return f

    def _emit_row(self, panel: Function) -> None:
        """A function that copies a row of features to an aligned one, dropping some; it may read past the row's end."""
        f = Function.of(self._module, DROP_ROW)
        source, into, features, *draw = f.arguments
        v = Vectors(f, self._target, self._dtype)
        with f.loop(0, features, self._width) as first:
            for place in range(self._vectors):
                at = first * v.item + place * v.bytes
                v.store(v.load(source + at, v.item), into + at)
            f.call(panel, into + first * v.item, first, *draw)
        f.done()

    def _philox(self, f: Function, counter: list[Value], key: list[Value]) -> list[Value]:
        """Ten rounds on a counter and a key of 32-bit words in every lane."""
        for turn in range(ROUNDS):
            (high0, low0), (high1, low1) = (self._multiply(f, counter[2 * i], MULTIPLIERS[i]) for i in (0, 1))
            keys = [word + self._constant(f, turn * step) for word, step in zip(key, WEYL, strict=True)]
            counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        return counter

    def _multiply(self, f: Function, word: Value, factor: int) -> tuple[Value, Value]:
        """The high and the low half of a product."""
        builder = f.builder
        wide = builder.mul(builder.zext(word.ir, self._wide), ir.Constant(self._wide, [factor] * self._blocks))
        high = builder.lshr(wide, ir.Constant(self._wide, [32] * self._blocks))
        return Value(f, builder.trunc(high, self._narrow)), Value(f, builder.trunc(wide, self._narrow))

    def _constant(self, f: Function, value: int) -> Value:
        return Value(f, ir.Constant(self._narrow, [value & 0xFFFFFFFF] * self._blocks))

    def _splat(self, f: Function, value: Value) -> Value:
        """The low 32 bits of an integer in every lane."""
        builder = f.builder
        word = builder.trunc(value.ir, I32)
        first = Value(f, builder.insert_element(ir.Constant(self._narrow, ir.Undefined), word, ir.Constant(I32, 0)))
        return self._shuffle(f, first, first, [0] * self._blocks)

    @staticmethod
    def _shuffle(f: Function, one: Value, other: Value, places: Iterable[int]) -> Value:
        chosen = list(places)
        kind = ir.VectorType(I32, len(chosen))
        return Value(f, f.builder.shuffle_vector(one.ir, other.ir, ir.Constant(kind, chosen)))
