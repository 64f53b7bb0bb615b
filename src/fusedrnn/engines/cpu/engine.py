"""The engine on NumPy arrays."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.executor import Calls
from fusedrnn.engines.cpu.launch.cached_call import RepeatedBackward, RepeatedForward, States
from fusedrnn.engines.cpu.launch.guarded_call import Unprepared
from fusedrnn.engines.cpu.reserve_layout import Kept, KeptHere
from fusedrnn.engines.cpu.varlen import Ragged
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightPointers
from fusedrnn.engines.grad_buffers import Gradients
from fusedrnn.engines.pointers import NOWHERE, Strided, Wanted
from fusedrnn.frozen_array import is_constant
from fusedrnn.runtime.thread_pool import get_num_threads, pool_team

logger = logging.getLogger(__name__)

Array = NDArray[Any]


class CPUEngine(Calls):
    """Runs one spec on arrays. Any number of threads may call it at once."""

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference on valid arguments.

        ``x`` (T, N, I) and ``y`` (T, N, D·S) with elements side by side in the last axis, ``states`` each contiguous
        (L·D, N, size), ``lengths`` (N,). Writes ``y``, but not its padding; returns the final states.
        """
        packed = self._weights(x.shape, params, None)
        return self._on_arrays(x, packed, states, _ragged(lengths, len(x)), y)

    def train(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array] | None,
        lengths: Array | None,
        y: Array,
        keep: str,
        seed: int,
    ) -> tuple[tuple[Array, ...], KeptHere]:
        """The same in training: with dropout, and with a reserve that keeps ``"gates"`` or just ``"states"``."""
        steps, batch = x.shape[:2]
        packed, ragged = self._weights(x.shape, params, keep), _ragged(lengths, steps)
        kept, lease = self.keeping(steps, batch, ragged, keep, seed)
        return self._on_arrays(x, packed, states, ragged, y, kept, lease.address), KeptHere(kept, lease, packed)

    def backward(
        self, here: KeptHere, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients
    ) -> None:
        """Gradients of a forward call from those of its results.

        ``dy`` (T, N, D·S) with elements side by side in the last axis, ``dstates`` each contiguous (L·D, N, size); None
        for zeros. Nothing behind a sequence's length is read or written.
        """
        params = 0 if gradients.params is None else gradients.params.ctypes.data
        wanted = Wanted(
            _strided(gradients.x),
            self.weight_cache.addresses(params),
            _addresses(gradients.states),
            gradients.add_x, gradients.add_params, gradients.add_states,
        )  # fmt: skip
        self.differentiate(here.kept, here.lease.address, here.packed, _strided(dy), _addresses(dstates), wanted)

    def repeat_forward(
        self, x: Array, params: Array, states: States, y: Array, here: KeptHere | None
    ) -> RepeatedForward | None:
        """What runs calls like this one, which has just run on these very arrays; None if it cannot be had.

        ``here`` is what it kept in training. See :class:`fusedrnn.engines.cpu.launch.cached_call.RepeatedForward`.
        """
        if self._debug >= 2:
            return None
        kept = None if here is None else here.kept
        steps, batch = y.shape[:2]
        made = self.records(steps, batch, kept, get_num_threads())
        loose = not is_constant(params) and self.is_short(steps, batch, here is not None)
        layout = None if kept is None else kept.layout
        try:
            return RepeatedForward(self, made, x, params, states, y, loose, layout)
        except Unprepared:
            return None

    def repeat_backward(
        self, here: KeptHere, dy: Array | None, dstates: States, request: Any, gradients: Gradients
    ) -> RepeatedBackward | None:
        """The same for a backward call."""
        if self._debug >= 2:
            return None
        layout = here.kept.layout
        made = self.records(layout.steps, layout.batch, here.kept, get_num_threads(), backward=True)
        try:
            return RepeatedBackward(self, made, here, dy, dstates, request, gradients)
        except Unprepared:
            return None

    def weights_of(self, params: Array, shape: Sequence[int], training: bool) -> PackedWeights | WeightPointers:
        """The flat parameters as a call on so many steps of so many sequences shall have them."""
        return self._weights(shape, params, "gates" if training else None)

    def _weights(self, shape: Sequence[int], params: Array, keep: str | None) -> PackedWeights | WeightPointers:
        """The same; ``keep`` is what training keeps."""
        training = keep is not None
        if ("training" if training else "forward") not in self._jobs:
            self.compile(training)
        began = time.perf_counter()
        found: PackedWeights | WeightPointers
        if keep == "states" or is_constant(params) or not self.is_short(shape[0], shape[1], training):
            found = self.weight_cache.packed_vector(params, training, pool_team(get_num_threads()))
        elif training:
            found = self.weight_cache.copied_vector(params)
        else:
            found = WeightPointers(self.weight_cache.addresses(params.ctypes.data))
        if self._debug >= 2:
            logger.info(f"weights {(time.perf_counter() - began) * 1e6:.1f} us")
        return found

    def _on_arrays(
        self,
        x: Array,
        packed: PackedWeights | WeightPointers,
        states: Sequence[Array] | None,
        ragged: Ragged | None,
        y: Array,
        kept: Kept | None = None,
        reserve: int = 0,
    ) -> tuple[Array, ...]:
        steps, batch = x.shape[:2]
        final = tuple(np.empty(shape, x.dtype) for shape in self.spec.state_shape(batch))
        ends = _addresses(states), _strided(y), _addresses(final)
        self.run(steps, batch, packed, _strided(x), *ends, ragged=ragged, kept=kept, reserve=reserve)
        return final


def _strided(array: Array | None) -> Strided:
    return NOWHERE if array is None else (array.ctypes.data, array.strides[0], array.strides[1])


def _addresses(states: Sequence[Array | None] | None) -> tuple[int, int]:
    """Where h and c are, or their gradients."""
    h, c = (*(0 if state is None else state.ctypes.data for state in states or ()), 0, 0)[:2]
    return h, c


def _ragged(lengths: Array | None, steps: int) -> Ragged | None:
    return None if lengths is None else Ragged(lengths, steps)
