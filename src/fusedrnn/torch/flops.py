"""What ``torch.utils.flop_counter`` counts for the operator: the matrix products of torch.nn's own operations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.imports import after_import
from fusedrnn.torch.saved_operands import saved_operands

Shape = Sequence[int]
# Arguments of the operator ``backward`` before those of the call: dy, dh_n, dc_n, reserve.
_NUM_BACKWARD = 4


def register() -> None:
    """Register with the counter as soon as it is imported."""
    after_import("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    operators: Any = torch.ops.fusedrnn
    register: Any = register_flop_formula
    register([operators.rnn, operators.forward_training])(_forward)
    register(operators.backward)(_backward)


def _forward(x: Shape, h0: object, c0: object, weights: Sequence[Shape | None], *_: object, **__: object) -> int:
    """One product of every step with every matrix."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if shape is not None and len(shape) == 2)


def _backward(*arguments: Any, **_: object) -> int:
    """For each product of forward, one product for each of its factors that needs a gradient."""
    x, _h0, _c0, weights, _lengths, batch_sizes, _seed, *options, needed = arguments[_NUM_BACKWARD:]
    mode, hidden_size, num_layers, bidirectional, _dropout, projection_size = options
    spec = RNNSpec(mode, x[-1], hidden_size, num_layers, bidirectional, projection_size=projection_size or None)
    num_states = len(spec.state_names)
    needs_grad = (*needed[: 1 + num_states], *needed[3:])
    steps = x[0] if batch_sizes is None else batch_sizes[0]
    # A matrix is saved if its other factor needs a gradient.
    factors_need_grad = saved_operands(spec, needs_grad, steps > 1)[1 + num_states :]
    rows, total = prod(x[:-1]), 0
    # The first step makes no product for an initial state that needs no gradient. In a packed sequence shapes do not
    # tell how many rows the first step has, so that it counts.
    first_step = x[1] if batch_sizes is None and not needed[1] else 0
    kinds = spec.layout.kinds * (num_layers * spec.num_directions)
    for shape, kind, needs, factor in zip(weights, kinds, needs_grad[1 + num_states :], factors_need_grad, strict=True):
        if shape is not None and len(shape) == 2:
            skipped = first_step if kind == "h2h_weight" else 0
            total += 2 * prod(shape) * (rows * needs + (rows - skipped) * factor)
    return total
