"""The CPU engine: NumPy arrays in, addresses to the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.cached_call import CachedBackward, CachedForward
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.guarded_call import try_to_cache
from fusedrnn.engines.cpu.network_engine import CPUNetwork
from fusedrnn.engines.cpu.reserve_layout import CpuResiduals, TrainingCall
from fusedrnn.engines.cpu.state_options import StateOptions
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightAddresses
from fusedrnn.engines.interface import NULL, GradAddresses, SavePolicy, StateAddresses, StridedAddress
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.spec import RNNSpec


class CPUEngine:
    """Runs one spec on arrays; see :class:`fusedrnn.engines.interface.Engine`.

    Attributes:
        spec: The network.
        executor: Its calls on operands by address.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec, self.executor = spec, Executor(spec)
        self._num_addresses = max(2, len(spec.state_names))

    def compile(self, training: bool = False) -> None:
        """Compile or load the kernels for inference, or for ``training``; else the first call does it."""
        self.executor.compile(training)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """Bytes of the reserve of a training call with T steps of N sequences."""
        return self.executor.reserve_bytes(steps, batch, save)

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference."""
        steps, batch = operands.x.shape[:2]
        weights = self.executor.weights_of(operands.params, steps, batch, None)
        return self._run(operands, weights, _varlen(operands))

    def train(
        self, operands: ForwardOperands, save: SavePolicy, seed: int
    ) -> tuple[tuple[Array, ...], CpuResiduals]:
        """Training."""
        steps, batch = operands.x.shape[:2]
        varlen = _varlen(operands)
        weights = self.executor.weights_of(operands.params, steps, batch, save)
        call = self.executor.training_call(steps, batch, varlen, save, seed, operands.resets)
        lease = self.executor.lease_reserve(call.layout.size)
        return self._run(operands, weights, varlen, call, lease.address), CpuResiduals(call, lease, weights)

    def _run(
        self,
        operands: ForwardOperands,
        weights: PackedWeights | WeightAddresses,
        varlen: VarLen | None,
        call: TrainingCall | None = None,
        reserve: int = 0,
    ) -> tuple[Array, ...]:
        x, y = operands.x, operands.y
        steps, batch = x.shape[:2]
        final = tuple(np.empty(shape, x.dtype) for shape in self.spec.state_shape(batch))
        self.executor.run(
            steps, batch, weights, _strided(x), self._addresses(operands.states), _strided(y), self._addresses(final),
            varlen=varlen, call=call, reserve=reserve,
            options=self._options(operands.resets, operands.reset_states, operands.all_states),
        )  # fmt: skip
        return final

    def backward(self, residuals: CpuResiduals, operands: BackwardOperands) -> None:
        """The gradients."""
        grads, executor = operands.grads, self.executor
        params = 0 if grads.params is None else grads.params.ctypes.data
        grad_addresses = GradAddresses(
            _strided(grads.x), executor.weight_cache.addresses(params), self._addresses(grads.states),
            grads.add_x, grads.add_params, grads.add_states,
        )  # fmt: skip
        for buffer in grads.reset_states or ():
            if not grads.add_reset_states:
                buffer.fill(0)  # kernels add
        dy, dstates = _strided(operands.dy), self._addresses(operands.dstates)
        executor.run_backward(
            residuals.call, residuals.lease.address, residuals.weights, dy, dstates, grad_addresses,
            options=self._options(residuals.call.resets, grads.reset_states, operands.dall_states),
        )  # fmt: skip

    def cache_forward(
        self, operands: ForwardOperands, states: Sequence[Array | None] | None, residuals: CpuResiduals | None
    ) -> CachedForward | None:
        """The cached form of a forward call that has just run; None if there is none."""
        return try_to_cache(self.executor.debug, CachedForward, self.executor, operands, states, residuals)

    def cache_backward(
        self, residuals: CpuResiduals, operands: BackwardOperands, grad_req: Any
    ) -> CachedBackward | None:
        """The cached form of a backward call that has just run; None if there is none."""
        return try_to_cache(self.executor.debug, CachedBackward, self.executor, residuals, operands, grad_req)

    @staticmethod
    def network(spec: NetworkSpec, layers: Sequence[CPUEngine]) -> CPUNetwork:
        """What runs a network as one job; ``layers`` are the engines of the entries of its chain."""
        return CPUNetwork(spec, [layer.executor for layer in layers])

    def _addresses(self, states: Sequence[Array | None] | None) -> StateAddresses:
        """The addresses of states or of their gradients, at least two; 0 for None and for a missing state."""
        addresses = tuple([0 if state is None else state.ctypes.data for state in states or ()])
        return addresses + (0,) * (self._num_addresses - len(addresses))

    def _options(
        self, resets: Array | None, reset_states: Sequence[Array] | None, all_states: Sequence[Array | None]
    ) -> StateOptions | None:
        """The operands that concern states inside sequences, by address; None if there are none."""
        if resets is None and not all_states:
            return None
        replaced, every = (
            tuple([0 if array is None else array.ctypes.data for array in arrays or ()])
            for arrays in (reset_states, all_states)
        )
        return StateOptions(resets, replaced, (0,) * self.spec.output_is_state + every)


def _strided(array: Array | None) -> StridedAddress:
    return NULL if array is None else (array.ctypes.data, array.strides[0], array.strides[1])


def _varlen(operands: ForwardOperands) -> VarLen | None:
    return None if operands.lengths is None else VarLen.padded(operands.lengths, len(operands.x))
