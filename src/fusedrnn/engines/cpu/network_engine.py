"""The CPU engine of networks: NumPy arrays in, addresses to the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.cached_network import CachedFlatForward, CachedNetworkBackward, CachedNetworkForward
from fusedrnn.engines.cpu.executor import Executor, Weights
from fusedrnn.engines.cpu.guarded_call import try_to_cache
from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.network_executor import NetworkExecutor, NetworkProblem, by_layer
from fusedrnn.engines.cpu.network_reserve import NetworkReserveLayout, NetworkResiduals, are_packed
from fusedrnn.engines.cpu.plan.sizes import Phase
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.network import LayerStates, NetworkGradOperands, NetworkOperands
from fusedrnn.network_spec import NetworkSpec


class CPUNetwork:
    """Runs a network; see :class:`fusedrnn.engines.network.NetworkEngine`.

    Attributes:
        executor: Runs its jobs.
    """

    def __init__(self, spec: NetworkSpec, layers: Sequence[Executor]) -> None:
        self._spec, self.executor = spec, NetworkExecutor(spec, layers)

    def compile(self, training: bool = False) -> None:
        """Compile or load the kernels for inference, or for ``training``; else the first call does it."""
        self.executor.compile(training)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """Bytes of the reserve of a training call with T steps of N sequences."""
        return self.executor.reserve_layout(steps, batch, save, False).size

    def forward(self, operands: NetworkOperands) -> LayerStates:
        """Inference."""
        steps, batch = operands.x.shape[:2]
        weights = self.executor.weights_of(operands.params, steps, batch, None)
        return self._run_forward(operands, "inference", weights, _varlen(operands), None, {})

    def train(
        self, operands: NetworkOperands, save: SavePolicy, seeds: Sequence[int]
    ) -> tuple[LayerStates, NetworkResiduals]:
        """Training."""
        steps, batch = operands.x.shape[:2]
        varlen, weights = _varlen(operands), self.executor.weights_of(operands.params, steps, batch, save)
        layout = self.executor.reserve_layout(steps, batch, save, operands.resets is not None)
        lease = self.executor.runner.lease_reserve(layout.size)
        values = {"reserve": lease.address}
        final = self._run_forward(operands, "training", weights, varlen, layout, values | by_layer("seed", seeds))
        return final, NetworkResiduals(layout, tuple(seeds), varlen, operands.resets, lease, weights)

    def _run_forward(
        self, operands: NetworkOperands, phase: Phase, weights: tuple[Weights, ...], varlen: VarLen | None,
        layout: NetworkReserveLayout | None, values: dict[str, int],
    ) -> LayerStates:  # fmt: skip
        x, y = operands.x, operands.y
        steps, batch = x.shape[:2]
        final = tuple(
            tuple([np.empty(shape, x.dtype) for shape in shapes]) for shapes in self._spec.state_shape(batch)
        )
        values |= {"params": _address(operands.params), "resets": _address(operands.resets)}
        values |= _strided("x", x) | _strided("y", y)
        values |= self._states("{}0", operands.states) | self._states("{}_n", final)
        values |= self._states("{}_reset", operands.reset_states)
        values |= self._all_states("all_{}", operands.all_states)
        self.executor.run((phase, steps, batch, layout, are_packed(weights)), values, weights, varlen)
        return final

    def backward(self, residuals: NetworkResiduals, operands: NetworkGradOperands) -> None:
        """The gradients."""
        grads, layout = operands.grads, residuals.layout
        for buffers in grads.reset_states or ():
            for buffer in buffers:
                if not grads.add_reset_states:
                    buffer.fill(0)  # kernels add
        values = {
            "reserve": residuals.lease.address, "resets": _address(residuals.resets),
            "dparams": _address(grads.params),
            **{name: int(getattr(grads, name)) for name in ("add_x", "add_params", "add_states")},
            **by_layer("seed", residuals.seeds),
            **_strided("dy", operands.dy), **_strided("dx", grads.x),
            **self._states("d{}_n", operands.dstates), **self._states("d{}0", grads.states or ()),
            **self._states("d{}_reset", grads.reset_states or ()),
            **self._all_states("dall_{}", operands.dall_states),
        }  # fmt: skip
        steps, batch = layout.layers[0].steps, layout.layers[0].batch
        problem: NetworkProblem = "backward", steps, batch, layout, are_packed(residuals.weights)
        self.executor.run(problem, values, residuals.weights, residuals.varlen)

    def cache_forward(
        self, operands: NetworkOperands, states: Any, residuals: NetworkResiduals | None
    ) -> CachedNetworkForward | None:
        """The cached form of a forward call that has just run; None if there is none."""
        debug = self.executor.runner.debug
        return try_to_cache(debug, CachedNetworkForward, self.executor, operands, states, residuals)

    def cache_flat_forward(self, operands: NetworkOperands, states: tuple[Array, ...]) -> CachedFlatForward | None:
        """The cached form of an inference call, which takes and returns flat states; None if there is none."""
        return try_to_cache(self.executor.runner.debug, CachedFlatForward, self.executor, operands, states, None)

    def cache_backward(
        self, residuals: NetworkResiduals, operands: NetworkGradOperands, grad_req: Any
    ) -> CachedNetworkBackward | None:
        """The cached form of a backward call that has just run; None if there is none."""
        debug = self.executor.runner.debug
        return try_to_cache(debug, CachedNetworkBackward, self.executor, residuals, operands, grad_req)

    def _states(self, form: str, states: Sequence[Sequence[Array | None] | None]) -> dict[str, int]:
        """The values of the symbols of states or of their gradients."""
        return {
            symbol: _address(array)
            for index, arrays in enumerate(states)
            for symbol, array in zip(self.executor.state_symbols(index, form), arrays or (), strict=False)
        }

    def _all_states(self, form: str, arrays: Sequence[Array | None]) -> dict[str, int]:
        last = self._spec.layers[-1]
        letters = state_letters(len(last.state_names))[last.output_is_state :]
        return {form.format(letter): _address(array) for letter, array in zip(letters, arrays, strict=False)}


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data


def _strided(name: str, array: Array | None) -> dict[str, int]:
    """The address and the strides of an array (T, N, features), by symbol."""
    if array is None:
        return {}
    return {name: array.ctypes.data, f"{name}_step": array.strides[0], f"{name}_row": array.strides[1]}


def _varlen(operands: NetworkOperands) -> VarLen | None:
    return None if operands.lengths is None else VarLen.padded(operands.lengths, len(operands.x))
