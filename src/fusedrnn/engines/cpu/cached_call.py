"""Cached calls: forward, training and backward calls that repeat an earlier one on arrays of the same kind.

A cached call is built from the arrays of a checked call that has just run, and takes the arguments of the next calls
as they are given. If they differ from those of the checked call in anything that matters, it does nothing and returns
None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.guarded_call import GuardedCall
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.launch.kernel_args import signed
from fusedrnn.engines.cpu.plan.sizes import Phase
from fusedrnn.engines.cpu.reserve_layout import CpuResiduals
from fusedrnn.engines.cpu.weights.cache import PackedWeights
from fusedrnn.engines.operands import (
    RESETS_USE,
    BackwardOperands,
    ForwardOperands,
    backward_uses,
    comparable,
    entries,
    forward_uses,
    misplaced_buffer,
)
from fusedrnn.frozen_array import is_frozen
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.runtime.thread_pool import get_num_threads

States = Sequence[Array | None] | None
_NO_BUFFERS = (None, None, None)
_new_array = np.empty  # bound once: an attribute lookup takes a noticeable part of a call of one step


class _CachedCall:
    """What all cached calls have: an executor, the number of states, and the number of threads."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self._threads = executor, get_num_threads()
        self._num_states = len(executor.spec.state_names)
        self._letters = state_letters(self._num_states)
        self._no_states = (None,) * len(self._letters)
        self._dtype = np.dtype(executor.spec.dtype)

    def _all_states(self, states: States) -> Sequence[Any] | None:
        """The entries for h, c and further states, None for a missing one; None in all if their number is wrong."""
        if states is None:
            return self._no_states
        is_tuple = type(states) is tuple and len(states) == self._num_states  # faster than asking what else it may be
        state_entries = states if is_tuple else entries(states, self._num_states)
        if state_entries is not None and self._num_states == 1:
            return state_entries[0], None
        return state_entries

    def _empty(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Array, ...]:
        return tuple([np.empty(shape, self._dtype) for shape in shapes])


class CachedForward(_CachedCall):
    """A cached call of forward, in inference or in training.

    Args:
        executor: What ran the call.
        operands: Its operands, the caller's own arrays.
        states: Its initial states as the caller gave them.
        residuals: What it saved in training; None in inference.
    """

    def __init__(
        self, executor: Executor, operands: ForwardOperands, states: States, residuals: CpuResiduals | None
    ) -> None:
        super().__init__(executor)
        x, params, _, _, y, *_ = operands
        self._shape = y.shape
        steps, batch = y.shape[:2]
        self._layout = None if residuals is None else residuals.call.layout
        self._save = None if self._layout is None else self._layout.save
        self._state_shapes = executor.spec.state_shape(batch)
        initial = self._all_states(states)
        assert initial is not None
        final = (*self._empty(self._state_shapes), None)[: len(self._letters)]
        # Frozen parameters are recognized by identity: their weights cannot change.
        self._frozen = params if is_frozen(params) else None
        self._weights = None if self._frozen is None else executor.weights_of(params, steps, batch, self._save)
        # Quantized parameters are not an array, so there is nothing to guard.
        self._frozen_array = params = None if isinstance(params, QuantizedParams) else params
        self._unpacked = self._frozen is None and executor.is_short(steps, batch, self._layout is not None)
        # Inference reads unpacked parameters where the caller has them, so they are one of the arrays. Training reads
        # a copy.
        self._params_in_place = self._unpacked and self._layout is None
        symbol = "weights" if not self._unpacked else "nothing" if self._params_in_place else "params"
        phase: Phase = "inference" if self._layout is None else "training"
        problem = Problem(phase, steps, batch, self._layout, not self._unpacked)
        uses, arrays = forward_uses(self._letters), (x, params, *initial, y, *final)
        self._has_resets = operands.resets is not None
        if self._has_resets:
            uses, arrays = uses | RESETS_USE, (*arrays, operands.resets)
        self._guarded = GuardedCall(executor, problem, uses, arrays, symbol, {})

    def __call__(
        self, x: Any, params: Any, states: Any, out: Any, seed: int = 0, resets: Any = None
    ) -> tuple[Array, tuple[Array, ...], CpuResiduals | None] | None:
        """The output, the final states and in training the residuals; None if the arguments differ."""
        initial = self._no_states if states is None else self._all_states(states)
        if initial is None or get_num_threads() != self._threads or (resets is not None) is not self._has_resets:
            return None
        weights = self._weights
        if self._frozen is not None:
            if params is not self._frozen:
                return None
            params = self._frozen_array
        elif not self._params_in_place:
            if type(params) is not np.ndarray or not self._executor.weight_cache.fits(params):
                return None
            weights = self._executor.weights_of(params, self._shape[0], self._shape[1], self._save)
            if isinstance(weights, PackedWeights) is self._unpacked:
                return None
        y = _new_array(self._shape, self._dtype) if out is None else out
        # Like _empty, but without its call and its list.
        h_n = _new_array(self._state_shapes[0], self._dtype)
        final: tuple[Array, ...] = (h_n,)
        if self._num_states == 1:
            arrays: tuple[Any, ...] = (x, params, initial[0], None, y, h_n, None)
        else:
            final = h_n, _new_array(self._state_shapes[1], self._dtype)
            if self._num_states > 2:
                final = *final, *self._empty(self._state_shapes[2:])
            arrays = (x, params, *initial, y, *final)
        if self._has_resets:
            if type(resets) is not np.ndarray:
                return None
            # Backward reads them too, and the caller may change them before it runs.
            resets = resets if self._layout is None else resets.copy()
            arrays = (*arrays, resets)
        address = 0 if weights is None else weights.address or weights.matrices[0]
        if self._layout is None:
            return (y, final, None) if self._guarded.run(arrays, address) else None
        assert weights is not None
        steps, batch, _ = self._shape
        call = self._executor.training_call(steps, batch, None, "gates", seed, resets)
        lease = self._executor.lease_reserve(call.layout.size)
        if call.layout is not self._layout or not self._guarded.run(arrays, address, lease.address, signed(seed)):
            return None
        return y, final, CpuResiduals(call, lease, weights)


class CachedBackward(_CachedCall):
    """A cached call of backward.

    Args:
        executor: What ran the call.
        residuals: What its training call saved.
        operands: Its operands, the caller's own arrays.
        grad_req: The argument as the caller gave it.
    """

    def __init__(
        self, executor: Executor, residuals: CpuResiduals, operands: BackwardOperands, grad_req: object
    ) -> None:
        super().__init__(executor)
        dy, dstates, grads, _ = operands
        self._layout, self._grad_req = residuals.call.layout, comparable(grad_req)
        self._packed = isinstance(residuals.weights, PackedWeights)
        steps, batch = self._layout.steps, self._layout.batch
        self._dx_shape = None if grads.x is None else (steps, batch, executor.spec.input_size)
        self._dparams_shape = None if grads.params is None else (executor.spec.layout.size,)
        self._state_shapes = None if grads.states is None else executor.spec.state_shape(batch)
        self._grad_reqs = grads.grad_reqs
        final = self._all_states(dstates)
        assert final is not None
        initial = (*(grads.states or ()), *self._no_states)[: len(self._letters)]
        uses, arrays = backward_uses(self._letters), (dy, *final, grads.x, grads.params, *initial)
        if residuals.call.resets is not None:
            uses, arrays = uses | RESETS_USE, (*arrays, residuals.call.resets)
        self._guarded = GuardedCall(
            executor, Problem("backward", steps, batch, self._layout, self._packed), uses, arrays,
            "weights" if self._packed else "params",
            {"add_x": grads.add_x, "add_params": grads.add_params, "add_states": grads.add_states},
        )  # fmt: skip

    def __call__(
        self, dy: Any, dstates: Any, residuals: CpuResiduals, grad_req: Any, out: Any
    ) -> tuple[Array | None, Array | None, tuple[Array, ...] | None] | None:
        """The gradients; None if the arguments differ."""
        call, weights = residuals.call, residuals.weights
        final = self._all_states(dstates)
        if (
            final is None
            or call.layout is not self._layout
            or call.varlen is not None
            or isinstance(weights, PackedWeights) is not self._packed
            or get_num_threads() != self._threads
            or comparable(grad_req) != self._grad_req
        ):
            return None
        buffers = _NO_BUFFERS if out is None else entries(out, len(_NO_BUFFERS))
        if buffers is None or misplaced_buffer(self._grad_reqs, buffers) is not None:
            return None
        dx, dparams, states = buffers
        initial = self._all_states(states)
        if initial is None:
            return None
        if dx is None and self._dx_shape is not None:
            dx = np.empty(self._dx_shape, self._dtype)
        if dparams is None and self._dparams_shape is not None:
            dparams = np.empty(self._dparams_shape, self._dtype)
        if states is None and self._state_shapes is not None:
            states = self._empty(self._state_shapes)
            initial = states if self._num_states > 1 else (states[0], None)
        address = weights.address or weights.matrices[0]
        arrays = (dy, *final, dx, dparams, *initial)
        if call.resets is not None:  # the original call had resets too, so the layout has a place for them
            arrays = (*arrays, call.resets)
        if not self._guarded.run(arrays, address, residuals.lease.address, signed(call.seed)):
            return None
        return dx, dparams, None if states is None else tuple(states)
