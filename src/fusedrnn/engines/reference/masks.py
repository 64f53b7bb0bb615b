"""The random masks inside the steps of a cell, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn import dropout
from fusedrnn.cell.expr import Leaf
from fusedrnn.cell.trace import TracedCell

StepMasks = Mapping[Leaf, Any]
"""The value of each mask at a step: (N, H), or in inference its expectation, (1,)."""


def expected_masks(cell: TracedCell, dtype: DTypeLike) -> Iterator[StepMasks]:
    """The expectations, for any number of steps."""
    return repeat({mask: np.full(1, mask.keep, dtype) for mask in cell.masks})


def random_masks(
    cell: TracedCell, seed: int, layer_dir: int, steps: int, shape: tuple[int, int], dtype: DTypeLike, reverse: bool
) -> Iterator[StepMasks]:
    """The masks (N, H) of each step of a layer-direction, in the order in which it computes the steps."""
    for t in reversed(range(steps)) if reverse else range(steps):
        yield {
            mask: dropout.step_mask(seed, mask.keep, number, layer_dir, None if mask.per_sequence else t, *shape)
            .astype(dtype)
            for number, mask in enumerate(cell.masks)
        }  # fmt: skip
