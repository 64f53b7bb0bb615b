"""The backward of a short call, with checks of its tensors in machine code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn.engines.cpu.tensor_call import TensorCall
from fusedrnn.torch import tensor_calls
from fusedrnn.torch.network import CallShape, Tensors, template
from fusedrnn.torch.openmp import team
from fusedrnn.torch.tensor_guards import DESCRIBE, guard_of

_empty_like = torch.empty_like


class ShortBackward:
    """The gradients of calls of one shape, for cotangents like those of an earlier backward.

    It never changes, so any number of threads may use it.

    Args:
        shape: The shape of the call.
        call: The training call, as the executor describes it.
        needs_grad: Which gradients are computed, of x, each initial state and each weight.
        dy: The cotangent of the output, None for zeros.
        dfinal: The cotangents of the final states, None for zeros.
        weights: The weights as :func:`fusedrnn.torch.tensor_calls.own_tensors` returns them.

    Attributes:
        is_possible: Whether such a backward is possible; if not, nothing else may be used.
    """

    def __init__(
        self, shape: CallShape, call: Any, needs_grad: Sequence[bool], dy: Tensor | None, dfinal: Tensors,
        weights: Tensors,
    ) -> None:  # fmt: skip
        network, first_weight = shape.network, 1 + shape.network.num_states
        shapes = [(*shape.leading, network.spec.input_size), *shape.state_shapes, *network.weight_shapes]
        has_dstates = True in needs_grad[1:first_weight]
        entries = network.spec.layout.by_layer_direction
        symbols = ["dx", *network.state_symbols("d{}0"), *(entry.name for entry in entries)]
        computed = [
            needed or (has_dstates and 0 < number < first_weight) for number, needed in enumerate(needs_grad)
        ]
        self._needs_grad = needs_grad
        self._like = [
            template(network.dtype, size) if is_computed else None
            for size, is_computed in zip(shapes, computed, strict=True)
        ]
        cotangents = zip((dy, *dfinal), ("dy", *network.state_symbols("d{}_n")), strict=False)
        guards = [guard_of(cotangent, symbol) for cotangent, symbol in cotangents if cotangent is not None]
        guards += [
            guard_of(weight, f"unpacked {entry.name}")._replace(data=weight.data_ptr())
            for weight, entry in zip(weights, entries, strict=True) if weight is not None
        ]  # fmt: skip
        grads = self._new_grads()
        guards += [guard_of(grad, symbol) for grad, symbol in zip(grads, symbols, strict=True) if grad is not None]
        constants = {}
        for name, tensor in (("dy", dy), ("dx", grads[0])):
            _, constants[f"{name}_step"], constants[f"{name}_row"] = tensor_calls.strided_address(network, tensor)
        problem = network.executor.problem("backward", shape.steps, shape.batch, call.layout)
        self._call = TensorCall(
            network.executor, problem, team(), shape.varlen,
            guards, constants, DESCRIBE,
        )  # fmt: skip
        self.is_possible = self._call.is_possible

    def run(self, reserve: Tensor, weights: Tensors, dy: Tensor | None, dfinal: Tensors) -> list[Tensor | None] | None:
        """The gradients, None where not needed; None instead of the list if a tensor is not like the earlier one."""
        grads, address = self._new_grads(), reserve.data_ptr()
        tensors = tuple([tensor for tensor in (dy, *dfinal, *weights, *grads) if tensor is not None])
        if address % tensor_calls.ALIGNMENT or not self._call.run(tensors, team(), address):
            return None
        return [grad if needed else None for grad, needed in zip(grads, self._needs_grad, strict=True)]

    def _new_grads(self) -> list[Tensor | None]:
        return [None if like is None else _empty_like(like) for like in self._like]


def prepared(
    shape: CallShape, call: Any, needs_grad: tuple[bool, ...], dy: Tensor | None, dfinal: Tensors, weights: Tensors
) -> ShortBackward | None:
    """The backward for cotangents like these, which a repeated shape keeps; None if there is none."""
    assert shape.backwards is not None
    key = needs_grad, dy is None, *[cotangent is None for cotangent in dfinal]
    if key not in shape.backwards:
        tensor_calls.check_exist(weights)  # later, the guards compare their addresses
        backward = ShortBackward(shape, call, needs_grad, dy, dfinal, weights)
        shape.backwards[key] = backward if backward.is_possible else None
    known: ShortBackward | None = shape.backwards[key]
    return known
