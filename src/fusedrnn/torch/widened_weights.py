"""Copies of weights in float32, kept until the content of the weights changes."""

from __future__ import annotations

import torch

from fusedrnn.torch.network import Tensors
from fusedrnn.torch.weight_copies import WeightCopies


def _in_float32(weights: Tensors) -> Tensors:
    return [weight if weight is None else weight.to(torch.float32, copy=True) for weight in weights]


COPIES = WeightCopies(_in_float32)
"""The copies that are kept."""
widened = COPIES.of
"""Copies of weights in float32, equal in value; None stays None. They must not change."""
