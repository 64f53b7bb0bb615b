"""The same numbers in other layouts in memory."""

import numpy as np


def spread(array, steps):
    """The same numbers, ``steps`` elements apart in each dimension (backwards if negative), with NaN between them."""
    index = tuple(slice(None, None, step) for step in steps)
    shape = [size * abs(step) for size, step in zip(array.shape, steps, strict=True)]
    holder = np.full(shape, np.nan, array.dtype)
    holder[index] = array
    return holder[index]


def misaligned(array):
    """The same numbers at an address that is no multiple of their size."""
    holder = bytearray(array.nbytes + 1)
    result = np.frombuffer(holder, array.dtype, array.size, offset=1).reshape(array.shape)
    result[...] = array
    assert not result.flags.aligned
    return result


LAYOUTS = {
    "rows apart": lambda a: spread(a, (2, 3, 1)[-a.ndim :]),
    "elements apart": lambda a: spread(a, (2,) * a.ndim),
    "backwards": lambda a: spread(a, (-1,) * a.ndim),
    "Fortran": np.asfortranarray,
    "misaligned": misaligned,
}
