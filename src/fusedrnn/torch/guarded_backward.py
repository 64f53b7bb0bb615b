"""The backward of a repeated call, with checks of its tensors in machine code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedrnn.engines.cpu.tensor_call import TensorCall
from fusedrnn.torch import tensor_calls
from fusedrnn.torch.network import CallShape, Tensors, template
from fusedrnn.torch.openmp import team
from fusedrnn.torch.released_memory import check_weights
from fusedrnn.torch.tensor_calls import SavedForBackward, torch_memory_errors
from fusedrnn.torch.tensor_guards import DESCRIBE, as_new, guard_of

_empty_like = torch.empty_like


class GuardedBackward:
    """The gradients of calls of one shape, for cotangents like those of an earlier backward.

    It never changes, so any number of threads may use it.

    Args:
        shape: The shape of the call.
        saved: What the call saved.
        needs_grad: Which gradients are computed, of x, each initial state and each weight.
        dy: The cotangent of the output, None for zeros.
        dfinal: The cotangents of the final states, None for zeros.

    Attributes:
        is_possible: Whether such a backward is possible; if not, nothing else may be used.
    """

    def __init__(
        self, shape: CallShape, saved: SavedForBackward, needs_grad: Sequence[bool], dy: Tensor | None, dfinal: Tensors
    ) -> None:  # fmt: skip
        network, first_weight = shape.network, 1 + shape.network.num_states
        # Kernels write some gradients of a user cell next to each other.
        self.is_possible = not network.adjacent_weights
        if not self.is_possible:
            return
        shapes = [(*shape.leading, network.spec.input_size), *shape.state_shapes, *network.weight_shapes]
        has_dstates = True in needs_grad[1:first_weight]
        entries = network.spec.layout.by_layer_direction
        symbols = ["dx", *network.state_symbols("d{}0"), *(entry.name for entry in entries)]
        computed = [
            needed or (has_dstates and 0 < number < first_weight) for number, needed in enumerate(needs_grad)
        ]
        self._needs_grad, self._is_packed = needs_grad, saved.packed
        self._like = [
            template(network.dtype, size) if is_computed else None
            for size, is_computed in zip(shapes, computed, strict=True)
        ]
        cotangents = zip((dy, *dfinal), ("dy", *network.state_symbols("d{}_n")), strict=False)
        guards = [guard_of(cotangent, symbol) for cotangent, symbol in cotangents if cotangent is not None]
        guards += [
            guard_of(weight, f"unpacked {entry.name}")._replace(data=weight.data_ptr())
            for weight, entry in zip(self._unpacked(saved), entries, strict=False) if weight is not None
        ]  # fmt: skip
        guards += [
            guard_of(as_new(like), symbol) for like, symbol in zip(self._like, symbols, strict=True) if like is not None
        ]  # fmt: skip
        constants, dx = {}, self._like[0] if self._like[0] is None else as_new(self._like[0])
        for name, tensor in (("dy", dy), ("dx", dx)):
            _, constants[f"{name}_step"], constants[f"{name}_row"] = tensor_calls.strided_address(network, tensor)
        problem = network.executor.problem("backward", shape.steps, shape.batch, saved.call.layout)
        self._call = TensorCall(network.executor, problem, team(), shape.varlen, guards, constants, DESCRIBE)
        self.is_possible = self._call.is_possible

    @torch_memory_errors
    def run(self, saved: SavedForBackward, dy: Tensor | None, dfinal: Tensors) -> list[Tensor | None] | None:
        """The gradients, None where not needed; None instead of the list if a tensor is not like the earlier one."""
        grads, reserve, packed = self._new_grads(), saved.reserve.data_ptr(), 0
        if self._is_packed:
            packed = tensor_calls.addresses_of(saved.weights)[0]
        tensors = tuple([
            tensor for tensor in (dy, *dfinal, *self._unpacked(saved), *grads) if tensor is not None
        ])  # fmt: skip
        # A hook on saved tensors may have moved them.
        is_aligned = not (reserve | packed) % tensor_calls.ALIGNMENT
        if not is_aligned or not self._call.run(tensors, team(), reserve, packed):
            return None
        return [grad if needed else None for grad, needed in zip(grads, self._needs_grad, strict=True)]

    def _unpacked(self, saved: SavedForBackward) -> Tensors:
        return () if self._is_packed else saved.weights

    def _new_grads(self) -> list[Tensor | None]:
        return [None if like is None else _empty_like(like) for like in self._like]


def prepared(
    shape: CallShape, saved: SavedForBackward, needs_grad: tuple[bool, ...], dy: Tensor | None, dfinal: Tensors
) -> GuardedBackward | None:
    """The backward for cotangents like these, which a repeated shape keeps; None if there is none."""
    assert shape.backwards is not None
    key = needs_grad, dy is None, *[cotangent is None for cotangent in dfinal]
    if key not in shape.backwards:
        check_weights(saved.weights)  # later, the guards compare their addresses
        backward = GuardedBackward(shape, saved, needs_grad, dy, dfinal)
        shape.backwards[key] = backward if backward.is_possible else None
    known: GuardedBackward | None = shape.backwards[key]
    return known
