"""Rounds the operands of the reference's GEMMs as a spec's ``compute`` says, in any float type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusedrnn.number_formats import quantize_rows, round_to_bfloat16
from fusedrnn.spec import Array

Rounding = Callable[[Array], Array]
"""From rows (..., K) to the same rows in the format of operands, in the same float type."""


def row_rounding(compute: str | None) -> Rounding:
    """The rounding of the rows that weights multiply; ``compute`` is None for none.

    A product of int8 operands is exact but for the scales, so that it is that of the rows they stand for.
    """
    return {None: unrounded, "bfloat16": _bfloat16, "int8": _int8, "int8_weights": unrounded}[compute]


def weight_rounding(compute: str | None) -> Rounding:
    """The rounding of weights."""
    return _int8 if compute == "int8_weights" else row_rounding(compute)


def unrounded(rows: Array) -> Array:
    """The rows as they are."""
    return rows


def _bfloat16(rows: Array) -> Array:
    result: Array = round_to_bfloat16(rows.astype(np.float32)).astype(rows.dtype)
    return result


def _int8(rows: Array) -> Array:
    integers, scales = quantize_rows(rows.astype(np.float32))
    result: Array = integers.astype(rows.dtype) * scales.astype(rows.dtype)[..., None]
    return result
