"""A call of a module like the previous one, with checks of its tensors in machine code.

A step of a cell then takes a few microseconds in addition to the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.engines.cpu.tensor_call import TensorCall, TensorGuard
from fusedrnn.runtime.thread_pool import ThreadTeam
from fusedrnn.torch import autocast, dispatch, eager, tensor_calls
from fusedrnn.torch.network import CallShape, template
from fusedrnn.torch.openmp import team
from fusedrnn.torch.plan import ModulePlan, in_operator_order
from fusedrnn.torch.tensor_calls import packed_tensor, torch_memory_errors
from fusedrnn.torch.tensor_guards import DESCRIBE, as_new, guard_of

# Bound once: attribute lookups are a large part of a call of one step.
_is_grad_enabled = torch.is_grad_enabled
_get_num_threads = torch.get_num_threads
_empty_like = torch.empty_like
_is_neg = Tensor.is_neg
_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")


class GuardedCall:
    """A call of a module on plain tensors. It never changes, so any number of threads may use it.

    Args:
        module: A layer or cell.
        plan: Its plan.
        shape: The shape of the call.
        x: Its input: a tensor or a packed sequence.
        states: Its initial states, None for zeros.
        weights: Its weights in the operator's order, which are its own parameters, with None for missing biases.
        is_recorded: Whether autograd records it.

    Attributes:
        is_possible: Whether such a call is possible; if not, nothing else may be used.
        shape: The shape of the call.
    """

    def __init__(
        self, module: Any, plan: ModulePlan, shape: CallShape, x: Any, states: tuple[Tensor, ...] | None,
        weights: list[Tensor | None], is_recorded: bool,
    ) -> None:  # fmt: skip
        is_packed = isinstance(x, PackedSequence)
        data: Tensor = x.data if is_packed else x
        is_unbatched = not plan.is_cell and not is_packed and data.dim() == 2
        are_readable = data.stride(-1) == 1 and all([state.is_contiguous() for state in states or ()])
        self.is_possible = bool(DESCRIBE) and are_readable and not is_unbatched
        if not self.is_possible:
            return
        self.shape, self._weights, shape.backwards = shape, weights, {}
        self._plan, self._training, self._num_threads = plan, module.training, _get_num_threads()
        self._parameters = [weight for weight in weights if weight is not None]
        self._names = [name for name in in_operator_order(plan, plan.names) if name is not None]
        self._dtype, self._num_states = self._parameters[0].dtype, None if states is None else len(states)
        self._is_hx_tensor = states is not None and len(plan.state_sizes) == 1
        self._batch_sizes = x.batch_sizes.tolist() if is_packed else None
        self._sizes_of_states = [state.shape for state in states or ()]
        self._index_shapes = _index_shapes(x) if is_packed else None
        self._is_transposed = not plan.is_cell and not is_packed and module.batch_first
        self._final_like = [template(self._dtype, size) for size in shape.state_shapes]
        output_shape = None if plan.is_cell else (*shape.leading, shape.network.output_size)
        self._output_like = None if output_shape is None else template(self._dtype, output_shape)
        self._addresses = tensor_calls.addresses_of(weights)
        self._is_grad_enabled = _is_grad_enabled()
        self._needs_grad = [*map(_requires_grad, (data, *(states or ()), *self._parameters))]
        executor = shape.network.executor
        self._packs = not executor.is_short(shape.steps, shape.batch, is_recorded)
        # They share the memory of the weights, which the guards compare. Packed weights are a copy.
        self._own_weights = [] if self._packs else tensor_calls.own_tensors(weights)
        self._weight_cache = executor.weight_cache_for(shape.steps, shape.batch)
        self._counts_versions = is_recorded and not any([weight.is_inference() for weight in self._parameters])
        self._training_call = executor.training_call(shape.steps, shape.batch, shape.varlen) if is_recorded else None
        data = data.transpose(0, 1) if self._is_transposed else data
        _, x_step, x_row = tensor_calls.strided_address(shape.network, data)
        constants = {
            "x_step": x_step, "x_row": x_row, **dict(zip(("y_step", "y_row"), shape.output_strides, strict=True)),
        }  # fmt: skip
        layout = None if self._training_call is None else self._training_call.layout
        problem = executor.problem("training" if is_recorded else "inference", shape.steps, shape.batch, layout)
        self._call = TensorCall(
            executor, problem, team(), shape.varlen, self._guards(module, data, states or ()), constants, DESCRIBE
        )
        self.is_possible = self._call.is_possible

    def _guards(self, module: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[TensorGuard]:
        """The guards of all tensors, in the order in which a call passes them."""
        network = self.shape.network
        entries = network.spec.layout.by_layer_direction
        # By position, since one tensor may be several of the weights.
        parameters = [
            guard_of(weight, None if self._packs else f"unpacked {entry.name}")._replace(
                data=weight.data_ptr(), is_same=True
            )
            for weight, entry in zip(self._weights, entries, strict=True) if weight is not None
        ]  # fmt: skip
        flat = [TensorGuard(weight, is_same=True) for weight in self._flat_weights(module)]
        y_like = self._final_like[0] if self._output_like is None else self._output_like
        return [
            guard_of(x, "x"), *map(guard_of, states, network.state_symbols("{}0")), *parameters, *flat,
            *map(guard_of, map(as_new, self._final_like), network.state_symbols("{}_n")), guard_of(as_new(y_like), "y"),
        ]  # fmt: skip

    def __call__(self, module: Any, x: Any, hx: Any) -> Any:
        """What the module's forward returns; None if the call is not like this one."""
        if (
            module.training is not self._training
            or _is_grad_enabled() is not self._is_grad_enabled
            or dispatch.runner() is not eager.run
            or autocast.is_enabled()
            or _get_num_threads() != self._num_threads
            or module._plan(self._dtype) is not self._plan
        ):
            return None
        data = x if self._batch_sizes is None else self._rows(x)
        if type(data) is not Tensor:
            return None
        states: Sequence[Any] = as_tuple(hx)
        num_states = None if hx is None else len(states)
        if num_states != self._num_states or isinstance(hx, Tensor) is not self._is_hx_tensor:
            return None
        inputs = (data, *states, *self._parameters)
        try:
            if True in map(_is_neg, inputs) or (
                self._is_grad_enabled and [*map(_requires_grad, inputs)] != self._needs_grad
            ):
                return None
        except (AttributeError, TypeError):  # a state that is no tensor
            return None
        if self._is_transposed:
            if data.dim() != 3:
                return None
            data = data.transpose(0, 1)
        indices = None if self._batch_sizes is None else x.sorted_indices
        if indices is not None:
            if [state.shape for state in states] != self._sizes_of_states:
                return None
            states = [state.index_select(1, indices) for state in states]
        results = self.run(module, data, states)
        return None if results is None else self._returned(x, *results)

    def _returned(self, x: Any, y: Any, *final: Tensor) -> Any:
        """What forward returns for these results."""
        is_packed = self._batch_sizes is not None
        if is_packed and x.unsorted_indices is not None:
            final = tuple([state.index_select(1, x.unsorted_indices) for state in final])
        result = final if len(final) > 1 else final[0]
        if self._output_like is None:
            return result
        if self._is_transposed:
            y = y.transpose_(0, 1)
        return (PackedSequence(y, *x[1:]) if is_packed else y), result

    @torch_memory_errors
    def run(self, module: Any, x: Tensor, states: Sequence[Tensor]) -> Sequence[Any] | None:
        """The output, None for a cell, and the final states; None if a tensor does not pass its guard."""
        y, final = self._new_results()
        parameters = map(module._parameters.get, self._names)
        tensors = (x, *states, *parameters, *self._flat_weights(module), *final, y)
        if self._output_like is None:
            y = None
        call, threads, packed = self._training_call, team(), None
        if self._packs:
            if not self._call.accepts(tensors):  # before the parameters are read
                return None
            packed = self._packed_weights(threads)
        address = 0 if packed is None else packed.address
        if call is None:
            return (y, *final) if self._call.run(tensors, threads, weights=address) else None
        reserve, reserve_address = tensor_calls.new_reserve(self.shape.network.executor, call.layout.size)
        if not self._call.run(tensors, threads, reserve_address, address):
            return None
        saved_weights: list[Tensor | None] = self._own_weights if packed is None else [packed_tensor(packed)]
        saved = tensor_calls.SavedForBackward(reserve, saved_weights, call)
        initial = states if self._num_states else (None,) * len(final)
        return eager.record(self.shape, (y, tuple(final), saved), x, initial, self._weights)

    def _packed_weights(self, threads: ThreadTeam) -> Any:
        """The packed weights, packed anew if the parameters have changed."""
        versions = [*map(_version, self._parameters)] if self._counts_versions else None
        owner = tensor_calls.owner_of(self._weights)
        is_training = self._training_call is not None
        return self._weight_cache.packed(self._addresses, is_training, threads, owner, versions)

    def _rows(self, x: Any) -> Any:
        """The rows of a packed sequence with the same sizes; None for anything else."""
        if type(x) is not PackedSequence or _index_shapes(x) != self._index_shapes:
            return None
        sizes = x.batch_sizes
        is_same = type(sizes) is Tensor and sizes.dtype is torch.int64 and sizes.tolist() == self._batch_sizes
        return x.data if is_same else None

    def _flat_weights(self, module: Any) -> Sequence[Any]:
        """The weights that torch.nn's forward of a layer reads, instead of the parameters by name."""
        flat: Sequence[Any] = module._flat_weights if self._plan.has_flat_weights else ()
        return flat

    def _new_results(self) -> tuple[Any, list[Tensor]]:
        """Memory for the output, or a cell's next h, and for the final states."""
        final = [*map(_empty_like, self._final_like)]
        return final[0] if self._output_like is None else _empty_like(self._output_like), final


def as_tuple(hx: Any) -> tuple[Any, ...]:
    """The initial states of a call as a tuple, empty for zeros."""
    return tuple(hx) if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)


def _index_shapes(packed: PackedSequence) -> list[Any]:
    """The shapes of the indices of a packed sequence, None for missing indices."""
    return [None if indices is None else indices.shape for indices in packed[2:]]
