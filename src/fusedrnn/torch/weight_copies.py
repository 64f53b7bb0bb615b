"""Tensors computed from weights, kept until the content of the weights changes.

Otherwise every call would compute and pack them again, and a call of one step would take many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from fusedrnn.runtime.fingerprint import fingerprint_of
from fusedrnn.torch.network import Tensors

_WORD = 4
"""Bytes that a fingerprint reads at once."""


class _Copies(NamedTuple):
    """The tensors computed from some weights."""

    key: Hashable
    fingerprint: bytes
    tensors: Tensors


class WeightCopies:
    """The results of a function of weights, kept until the memory of the first weight is freed.

    Args:
        compute: A function of (weights, ``*options``) that returns new tensors; the options are hashable.
    """

    def __init__(self, compute: Callable[..., Tensors]) -> None:
        self._compute = compute
        self._copies: WeakKeyDictionary[torch.UntypedStorage, _Copies] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._copies)

    def of(self, weights: Tensors, *options: Hashable) -> Tensors:
        """The result for these weights. Do not change it."""
        present = [weight for weight in weights if weight is not None]
        for weight in present:
            if not weight.is_contiguous() or weight.nbytes < _WORD:
                return self._computed(weights, options)
        key = tuple([0 if weight is None else weight.data_ptr() for weight in weights]), options
        fingerprint = fingerprint_of(_memory_ranges(present))
        storage = present[0].untyped_storage()
        known = self._copies.get(storage)
        if known is None or known.key != key or known.fingerprint != fingerprint:
            known = self._copies[storage] = _Copies(key, fingerprint, self._computed(weights, options))
        return known.tensors

    def _computed(self, weights: Tensors, options: tuple[Hashable, ...]) -> Tensors:
        # A later call may save the tensors for backward.
        with torch.inference_mode(False), torch.no_grad():
            return self._compute([weight if weight is None else weight.detach() for weight in weights], *options)


def _memory_ranges(weights: list[Tensor]) -> np.ndarray[Any, Any]:
    """The memory of the weights in whole words; the last word of an odd number of elements overlaps the one before."""
    ranges = []
    for weight in weights:
        begin, size = weight.data_ptr(), weight.nbytes
        ranges.append((begin, size - size % _WORD, 0))
        if size % _WORD:
            ranges.append((begin + size - _WORD, _WORD, 0))
    return np.array(ranges, np.int64)
