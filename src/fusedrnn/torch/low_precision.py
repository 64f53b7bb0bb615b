"""Tensors of bfloat16 and float16. They are converted to float32, in which the operator runs, and results back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch.network import Results, Tensors

OPERANDS = {torch.bfloat16: "bfloat16"}
"""The format of GEMM operands for tensors of a dtype, where it is not float32. Products of such operands are exact."""


def run(
    run_in_float32: Callable[..., Results], spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors,
    **options: Any,
) -> Results:  # fmt: skip
    """Run a call whose tensors are all bfloat16 or all float16; results have the same dtype.

    The conversion to float32 is exact, so only the results are rounded. Autograd records the conversions, so gradients
    have the dtype of their tensors.
    """
    states32 = states and tuple([state.to(torch.float32) for state in states])
    weights = [weight if weight is None else weight.to(torch.float32) for weight in weights]
    return rounded(run_in_float32(spec, x.to(torch.float32), states32, weights, **options), x.dtype)


def rounded(results: Results, dtype: torch.dtype) -> Results:
    """Results in another dtype."""
    y, final = results
    return y.to(dtype), tuple([state.to(dtype) for state in final])
