"""Copies of weights in float32, kept until the content of the weights changes.

Without that, every call would convert and pack them anew: a call of one step would take many times as long.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fusedrnn.runtime.fingerprint import fingerprint_of
from fusedrnn.torch.network import Tensors

_WORD = 4
"""Bytes that a fingerprint reads at once."""


class _Widened(NamedTuple):
    """The float32 copies of some weights."""

    addresses: tuple[int, ...]
    fingerprint: bytes
    tensors: Tensors


# By the memory of the first weight, with which the copies are dropped.
_WIDENED: WeakKeyDictionary[torch.UntypedStorage, _Widened] = WeakKeyDictionary()


def widened(weights: Tensors) -> Tensors:
    """Copies of the weights in float32, equal in value; None stays None. They must not change."""
    present = [weight for weight in weights if weight is not None]
    for weight in present:
        if not weight.is_contiguous() or weight.nbytes < _WORD:
            return _copies(weights)
    addresses = tuple([0 if weight is None else weight.data_ptr() for weight in weights])
    fingerprint = fingerprint_of(_memory_ranges(present))
    storage = present[0].untyped_storage()
    known = _WIDENED.get(storage)
    if known is None or known.addresses != addresses or known.fingerprint != fingerprint:
        known = _WIDENED[storage] = _Widened(addresses, fingerprint, _copies(weights))
    return known.tensors


def _copies(weights: Tensors) -> Tensors:
    with torch.inference_mode(False):  # a later call may save the copies for backward
        return [weight if weight is None else weight.detach().to(torch.float32, copy=True) for weight in weights]


def _memory_ranges(weights: list[Tensor]) -> np.ndarray[Any, Any]:
    """The memory of the weights in whole words; the last word of an odd number of elements overlaps the one before."""
    ranges = []
    for weight in weights:
        begin, size = weight.data_ptr(), weight.nbytes
        ranges.append((begin, size - size % _WORD, 0))
        if size % _WORD:
            ranges.append((begin + size - _WORD, _WORD, 0))
    return np.array(ranges, np.int64)
