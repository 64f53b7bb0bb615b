"""The number formats of GEMM operands, defined on NumPy arrays: bfloat16, and int8 with a scale for each row.

Kernels round exactly as these functions do. A bfloat16 is the upper half of a float32, rounded to nearest even. An
int8 row holds integers from -127 to 127 and one float32 scale; an element is its integer times the scale.
"""

from __future__ import annotations

import numpy as np

from fusedrnn.arrays import Array

INT8_MAX = 127
"""The largest magnitude of a quantized element. -128 is not used, so that the range is symmetric."""
INT8_MAX_PRODUCTS = (2**31 - 1) // INT8_MAX**2
"""The largest number of products of quantized elements whose sum always fits int32."""
_HALF_BITS = 16
_QUIET_BIT = np.uint16(0x40)
_MAGIC = np.float32(1.5 * 2.0**23)
"""A float32 so large that its sum with a small number has no fraction bits, so the sum is rounded to nearest even."""


def to_bfloat16(array: Array) -> Array:
    """A float32 array rounded to bfloat16, to nearest even, as bits in uint16. NaN becomes a quiet NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    lowest_kept_bit = (bits >> _HALF_BITS) & 1
    rounded = ((bits + (0x7FFF + lowest_kept_bit)) >> _HALF_BITS).astype(np.uint16)
    quiet_nan = (bits >> _HALF_BITS).astype(np.uint16) | _QUIET_BIT
    return np.where(np.isnan(array), quiet_nan, rounded)


def from_bfloat16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits, uint16."""
    return (bits.astype(np.uint32) << _HALF_BITS).view(np.float32)


def round_to_bfloat16(array: Array) -> Array:
    """A float32 array with every element rounded to bfloat16, to nearest even."""
    return from_bfloat16(to_bfloat16(array))


def quantize_rows(array: Array, largest: float | None = None) -> tuple[Array, Array]:
    """Quantize each row of a float32 array (..., K) to int8, symmetric about zero.

    The largest magnitude of a row becomes 127. A row of zeros, or of numbers so small that 127 divided by the largest
    is not finite, becomes zeros with scale 0. A row that holds NaN or an infinity gets the scale NaN, so every product
    with it is NaN.

    Args:
        array: The rows.
        largest: The magnitude that becomes 127 in every row; numbers beyond it become 127 or -127. None for the largest
            magnitude of each row.

    Returns:
        Integers int8 (..., K), and scales float32 (...,).
    """
    array = np.asarray(array, np.float32)
    own_largest: Array = np.max(np.abs(array), axis=-1, initial=np.float32(0.0))  # NaN if the row holds one
    is_finite = np.isfinite(own_largest)
    reached = own_largest if largest is None else np.full_like(own_largest, largest)
    with np.errstate(all="ignore"):
        inverse = np.float32(INT8_MAX) / reached
        is_usable = np.isfinite(inverse) & is_finite
        scale = np.where(is_usable, reached / np.float32(INT8_MAX), np.float32(0.0))
        scale = np.where(is_finite, scale, np.float32(np.nan))
        scaled = np.where(is_usable[..., None], array * inverse[..., None], np.float32(0.0))
        integers = (np.clip(scaled, -INT8_MAX, INT8_MAX) + _MAGIC) - _MAGIC
    return integers.astype(np.int8), scale.astype(np.float32)


def dequantize_rows(integers: Array, scales: Array) -> Array:
    """The float32 values of quantized rows."""
    return integers.astype(np.float32) * scales[..., None]
