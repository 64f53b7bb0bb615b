"""Dropout's mask in vector registers: Philox4x32-10, with the random words that :mod:`fusedrnn.dropout` defines.

Each lane holds one Philox counter, which yields the random words of four consecutive features. A panel's width is a
multiple of four on every target, so a panel always begins with a whole counter.
"""

from __future__ import annotations

from fusedrnn.dropout import MULTIPLIERS, ROUNDS, WEYL, WORDS
from fusedrnn.jit.builder import Function, Module, Signature, Value
from fusedrnn.jit.int_vector import IntVectors, shuffle
from fusedrnn.jit.target import Target
from fusedrnn.jit.vector import Vectors

# What a mask depends on besides the feature.
_COUNTER = ("index", "time", "layer", "threshold", "scale", "seed")

DROP_PANEL = Signature("drop_panel", ("address", "feature", *_COUNTER))
DROP_ROW = Signature("drop_row", ("row", "num_features", *_COUNTER))


def emit_drop_panel(module: Module, target: Target, dtype: str) -> Function:
    """A function that drops some features of an aligned panel row, in place, and scales the others."""
    f = Function.of(module, DROP_PANEL)
    address, feature, index, time, layer, threshold, scale, seed = f.arguments
    v = Vectors(f, target, dtype)
    # As many counters as cover the features of a panel, rounded up to a power of two.
    num_features = v.lanes * target.tile[1]
    counters = IntVectors(f, 1 << (-(-num_features // WORDS) - 1).bit_length())
    first_word = counters.splat(feature // WORDS) + counters.lane_numbers()
    counter = [first_word, *(counters.splat(word) for word in (index, time, layer))]
    words = _philox(counters, counter, [counters.splat(seed), counters.splat(seed >> 32)])
    # Each counter's four words side by side, in the order of the features.
    order = [word * counters.lanes + lane for lane in range(counters.lanes) for word in range(WORDS)]
    low, high = (shuffle(words[i], words[i + 1], range(2 * counters.lanes)) for i in (0, 2))
    factor = v.splat_float64(scale)
    lanes = IntVectors(f, v.lanes)
    for number in range(target.tile[1]):
        drawn = shuffle(low, high, order[number * v.lanes : (number + 1) * v.lanes])
        mask = lanes.at_least(drawn, lanes.splat(threshold)).select(factor, 0.0)
        vector = address + number * v.bytes
        v.store(v.load(vector) * mask, vector)
    f.ret()
    return f


def emit_drop_row(module: Module, target: Target, dtype: str, drop_panel: Function) -> Function:
    """A function that drops some features of an aligned row in place; the row is padded to whole panels."""
    f = Function.of(module, DROP_ROW)
    row, num_features, *counter = f.arguments
    v = Vectors(f, target, dtype)
    with f.loop(0, num_features, target.tile[1] * v.lanes) as first:
        f.call(drop_panel, row + first * v.item, first, *counter)
    f.ret()
    return f


def _philox(words: IntVectors, counter: list[Value], key: list[Value]) -> list[Value]:
    """Ten rounds on a counter and a key of 32-bit words in every lane."""
    for number in range(ROUNDS):
        (high0, low0), (high1, low1) = (words.wide_mul(counter[2 * i], MULTIPLIERS[i]) for i in (0, 1))
        keys = [word + words.const(number * step) for word, step in zip(key, WEYL, strict=True)]
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
    return counter
