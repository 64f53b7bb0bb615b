"""Cached calls of networks; see :mod:`fusedrnn.engines.cpu.cached_call`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import Weights
from fusedrnn.engines.cpu.guarded_call import GuardedJob
from fusedrnn.engines.cpu.launch.kernel_args import signed
from fusedrnn.engines.cpu.network_executor import NetworkExecutor, NetworkProblem
from fusedrnn.engines.cpu.network_reserve import NetworkResiduals, are_packed, weights_addresses
from fusedrnn.engines.cpu.plan.sizes import Phase
from fusedrnn.engines.network import NetworkGradOperands, NetworkOperands
from fusedrnn.engines.operands import RESETS_USE, ArrayUse, comparable, entries, misplaced_buffer, requests_of
from fusedrnn.frozen_array import is_frozen
from fusedrnn.runtime.thread_pool import get_num_threads

_NO_BUFFERS = (None, None, None)
_READ, _READ_WHOLE = ArrayUse(written=False, contiguous=False), ArrayUse(written=False, contiguous=True)
_WRITTEN, _WRITTEN_WHOLE = ArrayUse(written=True, contiguous=False), ArrayUse(written=True, contiguous=True)


class _CachedNetworkCall:
    """What forward and backward have in common: a network, the shapes of its states, and the number of threads."""

    def __init__(self, network: NetworkExecutor, batch: int) -> None:
        self._network, self._threads = network, get_num_threads()
        by_layer = network.spec.state_shape(batch)
        self._state_shapes = [shape for shapes in by_layer for shape in shapes]
        self._counts = [len(shapes) for shapes in by_layer]
        self._layer_slices = network.spec.state_slices
        self._no_states = (None,) * sum(self._counts)
        self._dtype = np.dtype(network.spec.dtype)

    def _flat(self, states: Any) -> Sequence[Any] | None:
        """The states of all layers, one after the other; None if their number is wrong."""
        if states is None:
            return self._no_states
        layers = entries(states, len(self._counts))
        flat: list[Any] = []
        for layer, count in zip(layers or (), self._counts, strict=False):
            arrays = (None,) * count if layer is None else entries(layer, count)
            if arrays is None:
                return None
            flat += arrays
        return None if layers is None else flat

    def _by_layer(self, states: tuple[Array, ...]) -> tuple[Any, ...]:
        """The opposite of :meth:`_flat`."""
        return tuple([states[part] for part in self._layer_slices])

    def _new_states(self) -> tuple[Array, ...]:
        """New arrays for the states of all layers, one after the other."""
        return tuple([np.empty(shape, self._dtype) for shape in self._state_shapes])

    def _states_like(self, form: str, use: ArrayUse) -> dict[str, ArrayUse]:
        """How a call uses the states of all layers, by the symbols of the states."""
        layers = range(len(self._counts))
        return {symbol: use for index in layers for symbol in self._network.state_symbols(index, form)}

    def _guard(
        self, problem: NetworkProblem, uses: dict[str, ArrayUse], arrays: Sequence[Any], constants: dict[str, int]
    ) -> GuardedJob:
        planned = self._network.planned(problem, self._threads)
        symbols = planned.args.symbol_index
        # Links give the addresses of parameters, from the symbols of the parameter vectors.
        unused = "unpacked_base", "unpacked_first", "dparams_base", "dparams_first", "param_offsets", "num_params"
        computes_dx = dict(zip(uses, arrays, strict=True)).get("dx") is not None
        fields = {
            **dict.fromkeys(unused, 0), **dict.fromkeys(("weights_symbol", "seed_symbol"), symbols["nothing"]),
            "dx_partials_symbol": symbols["dx_partials"] if computes_dx else 0,
        }  # fmt: skip
        num_values = len(symbols) - len(planned.links.given_symbols())
        return GuardedJob(self._network.runner, planned, uses, arrays, {}, constants, fields, num_values)


class CachedNetworkForward(_CachedNetworkCall):
    """A cached call of forward, in inference or in training.

    Args:
        network: What ran the call.
        operands: Its operands, the caller's own arrays.
        states: Its initial states as the caller gave them.
        residuals: What it saved in training; None in inference.
    """

    def __init__(
        self, network: NetworkExecutor, operands: NetworkOperands, states: Any, residuals: NetworkResiduals | None
    ) -> None:
        x, params, y = operands.x, operands.params, operands.y
        steps, batch = x.shape[:2]
        super().__init__(network, batch)
        self._shape = y.shape
        self._layout = None if residuals is None else residuals.layout
        self._save = None if self._layout is None else self._layout.layers[0].save
        weights = network.weights_of(params, steps, batch, self._save)
        self._packed = are_packed(weights)
        self._zeros = (0,) * len(weights)
        # Frozen parameters are recognized by identity: their weights cannot change.
        self._frozen = params if is_frozen(params) else None
        self._weights = weights if self._frozen is not None else None
        # Inference that reads parameters in place guards them like other arrays, and has no weights to look up.
        self._in_place = residuals is None and not any(self._packed)
        self._values = None if self._weights is None else weights_addresses(weights) + self._zeros
        initial, final = self._flat(states), self._new_states()
        assert initial is not None
        uses = {
            "x": _READ, "params": _READ_WHOLE, **self._states_like("{}0", _READ_WHOLE), "y": _WRITTEN,
            **self._states_like("{}_n", _WRITTEN_WHOLE),
        }  # fmt: skip
        arrays = [x, params, *initial, y, *final]
        self._has_resets = operands.resets is not None
        if self._has_resets:
            uses, arrays = uses | RESETS_USE, [*arrays, operands.resets]
        phase: Phase = "inference" if residuals is None else "training"
        self._guarded = self._guard((phase, steps, batch, self._layout, self._packed), uses, arrays, {})

    def __call__(
        self, x: Any, params: Any, states: Any, out: Any, seed: int = 0, resets: Any = None
    ) -> tuple[Array, tuple[Any, ...], NetworkResiduals | None] | None:
        """The output, the final states and in training the residuals; None if the arguments differ."""
        network, initial = self._network, self._flat(states)
        if initial is None or get_num_threads() != self._threads or (resets is not None) is not self._has_resets:
            return None
        weights = self._current_weights(params)
        if weights is None:
            return None
        y = np.empty(self._shape, self._dtype) if out is None else out
        final = self._new_states()
        arrays = (x, params, *initial, y, *final)
        if self._has_resets:
            if type(resets) is not np.ndarray:
                return None
            # Backward reads them too, and the caller may change them before it runs.
            resets = resets if self._layout is None else resets.copy()
            arrays = (*arrays, resets)
        if self._layout is None:
            values = self._values or (weights_addresses(weights) or self._zeros) + self._zeros
            return (y, self._by_layer(final), None) if self._guarded.run(arrays, values=values) else None
        seeds = network.spec.layer_seeds(seed) if network.spec.drops else self._zeros
        lease = network.runner.lease_reserve(self._layout.size)
        values = (*weights_addresses(weights), *map(signed, seeds))
        if not self._guarded.run(arrays, reserve=lease.address, values=values):
            return None
        return y, self._by_layer(final), NetworkResiduals(self._layout, seeds, None, resets, lease, weights)

    def _current_weights(self, params: Any) -> tuple[Weights | None, ...] | None:
        """The weights of the layers; None if the parameters differ in kind."""
        if self._frozen is not None:
            return self._weights if params is self._frozen else None
        if self._in_place:
            return ()
        if type(params) is not np.ndarray or not self._network.fits(params):
            return None
        return self._network.current_weights(params, self._shape[:2], self._packed, self._layout is not None)


class CachedFlatForward(CachedNetworkForward):
    """A cached call of forward in inference that takes and returns the states of all layers one after the other."""

    def _flat(self, states: Any) -> Sequence[Any]:
        return states  # type: ignore[no-any-return]

    def _by_layer(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        return states


class CachedNetworkBackward(_CachedNetworkCall):
    """A cached call of backward.

    Args:
        network: What ran the call.
        residuals: What its training call saved.
        operands: Its operands, the caller's own arrays.
        grad_req: The argument as the caller gave it.
    """

    def __init__(
        self, network: NetworkExecutor, residuals: NetworkResiduals, operands: NetworkGradOperands, grad_req: object
    ) -> None:
        self._layout, self._grad_req, grads = residuals.layout, comparable(grad_req), operands.grads
        steps, batch = self._layout.layers[0].steps, self._layout.layers[0].batch
        super().__init__(network, batch)
        self._packed = are_packed(residuals.weights)
        self._shapes = [None if array is None else array.shape for array in (grads.x, grads.params)]
        self._has_states, self._grad_reqs = grads.states is not None, requests_of(grads)
        final, initial = self._flat(operands.dstates), self._flat(grads.states)
        assert final is not None and initial is not None
        uses = {
            "dy": _READ, **self._states_like("d{}_n", _READ_WHOLE), "dx": _WRITTEN, "dparams": _WRITTEN_WHOLE,
            **self._states_like("d{}0", _WRITTEN_WHOLE),
        }  # fmt: skip
        arrays = [operands.dy, *final, grads.x, grads.params, *initial]
        if residuals.resets is not None:
            uses, arrays = uses | RESETS_USE, [*arrays, residuals.resets]
        adds = {name: int(getattr(grads, name)) for name in ("add_x", "add_params", "add_states")}
        self._guarded = self._guard(("backward", steps, batch, self._layout, self._packed), uses, arrays, adds)

    def __call__(
        self, dy: Any, dstates: Any, residuals: NetworkResiduals, grad_req: Any, out: Any
    ) -> tuple[Array | None, Array | None, Any] | None:
        """The gradients; None if the arguments differ."""
        final = self._flat(dstates)
        if (
            final is None
            or residuals.layout is not self._layout
            or residuals.varlen is not None
            or are_packed(residuals.weights) != self._packed
            or get_num_threads() != self._threads
            or comparable(grad_req) != self._grad_req
        ):
            return None
        buffers = _NO_BUFFERS if out is None else entries(out, len(_NO_BUFFERS))
        if buffers is None or misplaced_buffer(self._grad_reqs, buffers) is not None:
            return None
        dx, dparams = (
            np.empty(shape, self._dtype) if buffer is None and shape is not None else buffer
            for buffer, shape in zip(buffers, self._shapes, strict=False)
        )
        states = self._by_layer(self._new_states()) if buffers[2] is None and self._has_states else buffers[2]
        initial = self._flat(states)
        if initial is None:
            return None
        arrays = (dy, *final, dx, dparams, *initial)
        if residuals.resets is not None:  # the original call had resets too, so the layout has a place for them
            arrays = (*arrays, residuals.resets)
        values = (*weights_addresses(residuals.weights), *map(signed, residuals.seeds))
        if not self._guarded.run(arrays, reserve=residuals.lease.address, values=values):
            return None
        return dx, dparams, None if states is None else tuple(map(tuple, states))
