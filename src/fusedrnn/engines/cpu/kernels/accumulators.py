"""The accumulators of a micro-kernel, and how every format adds products to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fusedrnn.jit.builder import Value

Accumulators = list[list[Value]]
"""Accumulators by row and vector of columns."""


def add_products(
    a_elements: Iterable[Value], b_vecs: Sequence[Value], sums: Accumulators,
    multiply_add: Callable[[Value, Value, Value], Value],
) -> Accumulators:  # fmt: skip
    """The sums plus products: an element of each row, in every lane, times each vector of columns."""
    rows = zip(a_elements, sums, strict=True)
    return [[multiply_add(a, b, total) for b, total in zip(b_vecs, row_sums, strict=True)] for a, row_sums in rows]
