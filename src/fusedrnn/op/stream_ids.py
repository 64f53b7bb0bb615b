"""The checks of the ids of streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.op.validation import copy_of
from fusedrnn.scalars import as_int

UNKNOWN_ID = "ids must be of streams that have joined and not left; got {}"
"""The error of an id that no stream has."""
_INT64 = np.dtype(np.int64)
_MAX_ID = np.iinfo(np.int64).max


def check_ids(ids: Any) -> Array:
    """A copy of the ids, int64 (n,), at least one.

    Raises:
        TypeError: If they are no integers.
        ValueError: If there are none, or one is larger than that of any stream.
    """
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.ndim == 1 and len(ids):
        return ids.copy()
    expected = "ids must be a sequence of integers, the ids of streams"
    array = copy_of(ids, expected)
    if array.ndim == 1 and not len(array):
        raise ValueError("ids must have at least one stream; got none")
    if array.ndim == 1 and array.dtype.kind != "i":  # which cannot hold every integer
        for id in ids:
            if isinstance(id, (int, np.integer)) and not -_MAX_ID <= id <= _MAX_ID:
                raise ValueError(UNKNOWN_ID.format(id))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{expected}; got {ids!r}")
    return array.astype(np.int64)


def check_id(id: object) -> Array:
    """The id as int64 (1,).

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is larger than that of any stream.
    """
    return check_ids([as_int("id", id)])
