"""Forward, training and backward calls that repeat the one before: the same shapes, other arrays.

Each is made from the arrays of a call that has gone the long way, and is called with those of the next as they were
given. It returns None, and nothing has happened, if they differ from the sample in anything that matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.launch.guarded_call import Prepared
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs, signed
from fusedrnn.engines.cpu.reserve_layout import KeptHere, ReserveLayout
from fusedrnn.engines.cpu.weights.cache import PackedWeights
from fusedrnn.engines.grad_buffers import Gradients, plain
from fusedrnn.engines.operand_table import BACKWARD, FORWARD, Operand, entries, misplaced
from fusedrnn.frozen_array import is_constant
from fusedrnn.runtime.thread_pool import get_num_threads, pool_team

if TYPE_CHECKING:
    from fusedrnn.engines.cpu.engine import CPUEngine

Array = NDArray[Any]
States = Sequence[Array | None] | None
_NO_STATES = (None, None)
_NO_BUFFERS = (None, None, None)


class _Repeated:
    """What the three have in common: an engine, its states, and the threads that the sample ran on."""

    def __init__(self, engine: CPUEngine) -> None:
        self._engine, self.threads = engine, get_num_threads()
        self._team = pool_team(self.threads)
        self._count = len(engine.spec.state_names)
        self._dtype = np.dtype(engine.spec.dtype)

    def _prepared(
        self, name: str, made: KernelArgs, operands: Mapping[str, Operand], arrays: Sequence[Any],
        constants: Mapping[str, int], loose: bool, *, ignored: str = "", wanted: bool = False, parts: bool = False,
    ) -> Prepared:  # fmt: skip
        """What runs a job on arrays like these, one for each operand; the address of ``ignored`` is not used."""
        engine = self._engine
        samples = [
            (array, "nothing" if each == ignored else each, operand.written)
            for (each, operand), array in zip(operands.items(), arrays, strict=True)
        ]
        entries = engine.spec.layout.by_pass
        return Prepared(
            engine.job(name), made, self._team, engine.workspaces,
            lambda forecast: engine.thread_choices.of(name, forecast), samples, constants,
            loose=f"unpacked {entries[0].name}" if loose else "",
            wanted=entries[0].name if wanted else "",
            offsets=engine.weight_cache.offsets, parts=parts,
        )  # fmt: skip

    def _pair(self, states: States) -> tuple[Any, Any] | None:
        """H and c, None for what is not there; None if there are not as many as there should be."""
        if states is None:
            return _NO_STATES
        each = entries(states, self._count)
        if each is None:
            return None
        return (each[0], each[1]) if self._count > 1 else (each[0], None)

    def _final(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Array, ...]:
        return tuple([np.empty(shape, self._dtype) for shape in shapes])


class RepeatedForward(_Repeated):
    """Inference, or with a layout of the reserve training.

    Args:
        engine: What ran.
        made: The records of that run.
        x: Input (T, N, I), as it was given.
        params: The flat vector, as it was given.
        states: Initial states, as they were given.
        y: Output (T, N, D·S).
        loose: Whether the parameters are used as they lie.
        layout: Of the reserve, for training.
    """

    def __init__(
        self,
        engine: CPUEngine,
        made: KernelArgs,
        x: Array,
        params: Array,
        states: States,
        y: Array,
        loose: bool,
        layout: ReserveLayout | None = None,
    ) -> None:
        super().__init__(engine)
        self._shape, self._layout = y.shape, layout
        self._states = engine.spec.state_shape(y.shape[1])
        pair = self._pair(states)
        assert pair is not None
        h_n, c_n = (*self._final(self._states), None)[:2]
        # Whoever holds on to what can never change need not look at it again.
        self._source = params if is_constant(params) else None
        self._weights = engine.weights_of(params, y.shape, layout is not None) if self._source is not None else None
        # Parameters that are used where the caller has them are one of the arrays; a copy of them is not.
        self._loose, self._given = loose, loose and layout is None
        self._prepared_call = self._prepared(
            "forward" if layout is None else "training", made, FORWARD, (x, params, *pair, y, h_n, c_n),
            {
                **dict(zip(("x_step", "x_row"), x.strides[:2], strict=True)),
                **dict(zip(("y_step", "y_row"), y.strides[:2], strict=True)),
            },
            loose, ignored="" if self._given else "params",
        )  # fmt: skip

    def __call__(
        self, x: Any, params: Any, states: Any, out: Any, seed: int = 0
    ) -> tuple[Array, tuple[Array, ...], KeptHere | None] | None:
        """The output, the final states and what training keeps; None if the arrays are not like the sample."""
        pair = _NO_STATES if states is None else self._pair(states)
        if pair is None or get_num_threads() != self.threads:
            return None
        weights = self._weights
        if self._source is not None:
            if params is not self._source:
                return None
        elif not self._given:
            if type(params) is not np.ndarray or not self._engine.weight_cache.fits(params):
                return None
            weights = self._engine.weights_of(params, self._shape, self._layout is not None)
            if isinstance(weights, PackedWeights) is self._loose:
                return None
        y = np.empty(self._shape, self._dtype) if out is None else out
        # As _final does, without its call and its list: a call of one step notices.
        h_n, c_n = np.empty(self._states[0], self._dtype), None
        final: tuple[Array, ...] = (h_n,)
        if self._count > 1:
            c_n = np.empty(self._states[1], self._dtype)
            final = h_n, c_n
        arrays = (x, params, pair[0], pair[1], y, h_n, c_n)
        address = 0 if weights is None else weights.address or weights.matrices[0]
        if self._layout is None:
            return (y, final, None) if self._prepared_call.run(arrays, address) else None
        assert weights is not None
        steps, batch, _ = self._shape
        kept, lease = self._engine.keeping(steps, batch, None, "gates", seed)
        if kept.layout is not self._layout or not self._prepared_call.run(arrays, address, lease.address, signed(seed)):
            return None
        return y, final, KeptHere(kept, lease, weights)


class RepeatedBackward(_Repeated):
    """Backward.

    Args:
        engine: What ran.
        made: The records of that run.
        here: What its forward kept.
        dy: As it was given.
        dstates: As they were given.
        request: What was asked for, as it was given.
        gradients: Where they went.
    """

    def __init__(
        self,
        engine: CPUEngine,
        made: KernelArgs,
        here: KeptHere,
        dy: Array | None,
        dstates: States,
        request: Any,
        gradients: Gradients,
    ) -> None:
        super().__init__(engine)
        self._layout, self._request = here.kept.layout, plain(request)
        self._packed = isinstance(here.packed, PackedWeights)
        steps, batch = self._layout.steps, self._layout.batch
        self._x = None if gradients.x is None else (steps, batch, engine.spec.input_size)
        self._params = None if gradients.params is None else (engine.spec.layout.size,)
        self._states = None if gradients.states is None else engine.spec.state_shape(batch)
        self._requests = gradients.requests
        pair = self._pair(dstates)
        assert pair is not None
        dh0, dc0 = (*(gradients.states or ()), None, None)[:2]
        constants = {f"add_{name}": int(getattr(gradients, f"add_{name}")) for name in ("x", "params", "states")}
        for name, array in (("dy", dy), ("dx", gradients.x)):
            if array is not None:
                constants |= dict(zip((f"{name}_step", f"{name}_row"), array.strides[:2], strict=True))
        self._prepared_call = self._prepared(
            "backward", made, BACKWARD, (dy, *pair, gradients.x, gradients.params, dh0, dc0), constants,
            not self._packed, wanted=gradients.params is not None, parts=gradients.x is not None,
        )  # fmt: skip

    def __call__(
        self, dy: Any, dstates: Any, here: KeptHere, request: Any, out: Any
    ) -> tuple[Array | None, Array | None, tuple[Array, ...] | None] | None:
        """The gradients; None if the arrays are not like the sample."""
        kept, packed = here.kept, here.packed
        pair = self._pair(dstates)
        if (
            pair is None
            or kept.layout is not self._layout
            or kept.ragged is not None
            or isinstance(packed, PackedWeights) is not self._packed
            or get_num_threads() != self.threads
            or plain(request) != self._request
        ):
            return None
        buffers = _NO_BUFFERS if out is None else entries(out, len(_NO_BUFFERS))
        if buffers is None or misplaced(self._requests, buffers) is not None:
            return None
        dx, dparams, states = buffers
        initial = self._pair(states)
        if initial is None:
            return None
        if dx is None and self._x is not None:
            dx = np.empty(self._x, self._dtype)
        if dparams is None and self._params is not None:
            dparams = np.empty(self._params, self._dtype)
        if states is None and self._states is not None:
            states = self._final(self._states)
            initial = (states[0], states[1]) if self._count > 1 else (states[0], None)
        address = packed.address or packed.matrices[0]
        arrays = (dy, *pair, dx, dparams, *initial)
        if not self._prepared_call.run(arrays, address, here.lease.address, signed(kept.seed)):
            return None
        return dx, dparams, None if states is None else tuple(states)
