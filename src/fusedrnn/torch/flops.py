"""What ``torch.utils.flop_counter`` counts for the operator: the products that torch.nn's own operations make."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.imports import after_import
from fusedrnn.torch.saving import saved_operands

Shape = Sequence[int]
# Arguments of the operator ``backward`` before those that it shares with ``rnn``.
_GRADIENTS = 4


def register() -> None:
    """Tell the counter, when somebody imports it."""
    after_import("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    operators: Any = torch.ops.fusedrnn
    register: Any = register_flop_formula
    register([operators.rnn, operators.forward_training])(_forward)
    register(operators.backward)(_backward)


def _forward(x: Shape, h0: object, c0: object, weights: Sequence[Shape | None], *_: object, **__: object) -> int:
    """A product of each step with each matrix."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if shape is not None and len(shape) == 2)


def _backward(*arguments: Any, **_: object) -> int:
    """For each product of forward one towards each of its factors that has a gradient."""
    x, _h0, _c0, weights, _lengths, batch_sizes, _seed, *options, needed = arguments[_GRADIENTS:]
    mode, hidden_size, num_layers, bidirectional, _dropout, projection_size = options
    spec = RNNSpec(mode, x[-1], hidden_size, num_layers, bidirectional, projection_size=projection_size or None)
    states = len(spec.state_names)
    own = (*needed[: 1 + states], *needed[3:])
    steps = x[0] if batch_sizes is None else batch_sizes[0]
    # A matrix is saved where its other factor has a gradient.
    towards_factor = saved_operands(spec, own, steps > 1)[1 + states :]
    rows, total = prod(x[:-1]), 0
    # Towards initial states that have no gradient the first step's product is not made. How many rows it has in a
    # packed sequence shapes do not tell: there it is counted.
    first_step = x[1] if batch_sizes is None and not needed[1] else 0
    kinds = spec.layout.kinds * (num_layers * spec.num_directions)
    for shape, kind, has, factor in zip(weights, kinds, own[1 + states :], towards_factor, strict=True):
        if shape is not None and len(shape) == 2:
            left_out = first_step if kind == "h2h_weight" else 0
            total += 2 * prod(shape) * (rows * has + (rows - left_out) * factor)
    return total
