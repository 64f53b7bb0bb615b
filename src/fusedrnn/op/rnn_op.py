"""The operator: created once for a spec, called with arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fusedrnn.engines  # noqa: F401 -- registers the engines
from fusedrnn.engines import registry
from fusedrnn.engines.interface import NEEDS, SAVE_POLICIES, Engine, SavePolicy
from fusedrnn.engines.operands import GradReq, clear_padding
from fusedrnn.op import bfloat16_arrays, validation
from fusedrnn.op.grad_req import backward_operands
from fusedrnn.op.makes_streams import MakesStreams
from fusedrnn.op.operator import Operator
from fusedrnn.op.quantizing import QuantizesParams
from fusedrnn.op.reserve import CACHEABLE, PLAIN_CALL, CallKind, Reserve, check_reserve
from fusedrnn.op.resets import with_options
from fusedrnn.quantized_params import Params
from fusedrnn.scalars import as_bool, check_choice
from fusedrnn.spec import Array, RNNSpec

if TYPE_CHECKING:  # loaded with the engine
    from fusedrnn.engines.cpu.executor import Executor

_GATES: SavePolicy = "gates"


class RNNOp(Operator, QuantizesParams, MakesStreams):
    """A recurrent network ready to run: kernels, packed weights and workspace for one spec.

    Sizes: T steps, N sequences, I inputs, H hidden units, S features of h (H, or the projection's size), L layers, D
    directions. The states are h, of size S, and an LSTM's c, of size H.

    Any number of threads may call the same op at once. Parameters are packed at the first call, and again whenever
    their content has changed; those from :func:`frozen` cannot change and are not compared again.

    Args:
        spec: The network.
        backend: The engine, one of :func:`fusedrnn.engines.registry.names`; None for the first that can run the spec,
            and for each call the first that supports what the call needs.

    Attributes:
        spec: The network.
        backend: The name of the engine.

    Raises:
        TypeError: If ``spec`` is not an :class:`RNNSpec`, or ``backend`` not a string.
        ValueError: If ``backend`` names no engine.
        NotImplementedError: Naming what the spec requires and no engine supports.

    Example:
    >>> import numpy as np
    >>> from fusedrnn import RNNOp, RNNSpec
    >>> op = RNNOp(RNNSpec("gru", input_size=3, hidden_size=5))
    >>> x = np.zeros((7, 2, 3), np.float32)
    >>> params = np.zeros(op.spec.layout.size, np.float32)
    >>> y, (h_n,), reserve = op.forward(x, params)
    >>> y.shape, h_n.shape
    ((7, 2, 5), (1, 2, 5))
    >>> y, (h_n,), reserve = op.forward(x, params, training=True)
    >>> dx, dparams, (dh0,) = op.backward(np.ones_like(y), None, reserve)
    >>> dx.shape, dparams.shape, dh0.shape
    ((7, 2, 3), (150,), (1, 2, 5))
    """

    spec: RNNSpec

    def __init__(self, spec: RNNSpec, backend: str | None = None) -> None:
        validation.check_op(spec, backend)
        super().__init__(spec, backend, registry.EngineSelector(spec, backend))

    @classmethod
    def get(cls, spec: RNNSpec, backend: str | None = None) -> RNNOp:
        """The op for that spec and backend, shared by all who ask for it; the most recently used ones are kept."""
        validation.check_op(spec, backend)
        return registry.cached_op(spec, backend, lambda: cls(spec, backend))

    def __repr__(self) -> str:
        return f"RNNOp({self.spec!r}, backend={self.backend!r})"

    def __reduce__(self) -> tuple[type[RNNOp], tuple[RNNSpec, str | None]]:
        return RNNOp, (self.spec, self._requested_backend)

    def by_address(self) -> Executor:
        """The engine's calls on operands by address, for adapters; they check nothing.

        Raises:
            NotImplementedError: If the engine takes only NumPy arrays.
        """
        executor: Executor | None = getattr(self._engine, "pointers", None)
        if executor is None:
            raise NotImplementedError(f"engine {self.backend!r} takes NumPy arrays alone")
        return executor

    def _select_engine(self, training: bool, lengths: bool = False, kind: CallKind = PLAIN_CALL) -> tuple[str, Engine]:
        """The name and the engine for a call of that kind."""
        key = training, lengths, kind.resets, kind.all_states
        selected = self._selected.get(key)
        if selected is None:
            needed = dict(zip(("training", "lengths", "resets", "all_states"), key, strict=True))
            needed["dropout"] = training and self.spec.drops
            selected = self._selector.select(frozenset(need for need in NEEDS if needed[need]))
            self._selected[key] = selected
        return selected

    def forward(
        self,
        x: Array,
        params: Params,
        states: Sequence[Array | None] | None = None,
        *,
        training: bool = False,
        lengths: Array | Sequence[int] | None = None,
        out: Array | None = None,
        reserve: SavePolicy = _GATES,
        seed: int | None = None,
        resets: Array | Sequence[Sequence[bool]] | None = None,
        reset_states: Sequence[Array | None] | None = None,
        all_states: bool = False,
    ) -> tuple[Any, tuple[Array, ...], Reserve | None]:
        """Run the network over whole sequences.

        Args:
            x: Input (T, N, I), time-major, of the spec's dtype; any strides, never written to. With
                ``compute="bfloat16"`` also ``ml_dtypes.bfloat16``, and so params, states and out: results have the
                dtype of their argument, y that of x, final states that of initial ones, or of x if there are none.
            params: The flat parameter vector of ``spec.layout``, of the spec's dtype; or what :meth:`quantize` returns.
            states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size) with index layer·D + direction, or
                None for zeros; None if all are.
            training: Whether to save what backward needs, and to drop elements between layers if the spec says so.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T, copied before anything is written; None
                for T everywhere. The output's padding is zero; final states are those of the last valid step; the
                reverse direction starts at each sequence's own end.
            out: Where to write the output instead of a new array: (T, N, D·S), last axis contiguous, sharing no
                memory with ``x``, ``params`` and ``states``.
            reserve: What training saves: ``"gates"`` and states; or ``"states"`` alone, so that backward computes the
                gates again: less memory, more time, the same bits. Inference saves nothing.
            seed: From 0 to 2**64 - 1; determines which elements training drops. None for a new one if the network
                drops anything, else 0; the reserve tells which. Inference drops nothing.
            resets: Where sequences begin anew, bools (T, N), copied: before a marked step, all layers of a sequence
                start from ``reset_states``, with the bits of a separate call. A mark at step 0 replaces ``states``,
                one in the padding has no effect. The reverse direction runs over the same pieces, each from its end;
                ``states`` enter the last one.
            reset_states: The states after resets, a tuple like ``states``; None for zeros.
            all_states: Whether to return every state of every step of the last layer, also those that y does not show.

        Returns:
            The triple (y, states, reserve): the output (T, N, D·S), the last layer's h at each step with directions
            side by side; the final states, a tuple like ``states``; and a :class:`Reserve` for :meth:`backward`, or
            None without ``training``. With ``all_states`` the first is a tuple of y and likewise of each other state
            (T, N, D·H), zero in the padding: of an LSTM (y, c).

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: Naming what the call needs and no engine supports.
        """
        has_options = reset_states is not None or all_states is not False
        if lengths is None and seed is None and reserve is _GATES and not has_options and self._call_cache.has_forward:
            cached = self._call_cache.forward(self.spec, x, params, states, training, out, resets)
            if cached is not None:
                return cached
        spec, trains = self.spec, training is True or as_bool("training", training)
        if spec.compute == "bfloat16" and bfloat16_arrays.are_given(x, params, states, out, reset_states):
            options: dict[str, Any] = {"training": trains, "lengths": lengths, "reserve": reserve, "seed": seed}
            options |= {"resets": resets, "all_states": all_states}
            return bfloat16_arrays.forward(self.forward, x, params, states, out, reset_states, **options)
        save = reserve if reserve is _GATES else check_choice("reserve", reserve, SAVE_POLICIES)
        seed = validation.check_seed(seed)
        operands = validation.forward_operands(spec, x, params, states, lengths, out)
        kind = PLAIN_CALL
        if has_options or resets is not None:
            operands, kind = with_options(operands, spec, resets, reset_states, all_states)
        name, engine = self._select_engine(trains, operands.lengths is not None, kind)
        outputs = (operands.y, *operands.all_states) if kind.all_states else operands.y
        if operands.lengths is not None:
            for output in (operands.y, *operands.all_states):
                clear_padding(output, operands.lengths)
        cacheable = operands.lengths is None and save == "gates" and kind in CACHEABLE
        if not trains:
            final = engine.forward(operands)
            if cacheable:
                self._call_cache.note_forward(engine, (x, params, states), operands)
            return outputs, final, None
        seed = validation.draw_seed(spec) if seed is None else seed
        final, residuals = engine.train(operands, save, seed)
        if cacheable:
            self._call_cache.trainer = name, engine
            self._call_cache.note_forward(engine, (x, params, states), operands, residuals)
        steps, batch = operands.x.shape[:2]
        return outputs, final, Reserve(steps, batch, save, seed, spec, name, engine, residuals, operands.lengths, kind)

    def backward(
        self,
        dy: Array | None,
        dstates: Sequence[Array | None] | None,
        reserve: Reserve | None,
        *,
        grad_req: GradReq | Mapping[str, GradReq] = "write",
        out: Sequence[Any] | None = None,
    ) -> tuple[Any, ...]:
        """The gradients of a forward call's input, parameters and initial states.

        Args:
            dy: Gradient of the output (T, N, D·S), any strides, never written to; None for zero. Padding may hold
                anything. With ``all_states`` a tuple of the gradients of what forward returned first.
            dstates: Gradients of the final states, a tuple like them, each None for zero; None if all are.
            reserve: What forward returned. It stays as it is, for further calls.
            grad_req: ``"write"``, ``"add"`` (to the content of the buffer in ``out``) or ``"null"`` (not computed),
                for all or for each of ``"x"``, ``"params"``, ``"states"`` and, if forward took them,
                ``"reset_states"``; a mapping's missing keys are written.
            out: Where to write or add instead of new arrays: a tuple of buffers like what is returned, each None or
                an array, dstates a tuple. The last axis of dx must be contiguous, the others as a whole; none may
                share memory with another, nor with ``dy`` and ``dstates``.

        Returns:
            The triple (dx, dparams, dstates), of the dtypes of x, params and states: (T, N, I), in padding zero when
            written and untouched when added to; the flat vector; a tuple of (L·D, N, size) for each initial state.
            If forward took ``reset_states``, a fourth for these. None for what is not computed.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if ``reserve`` comes from another spec, or from an engine that this op never
                uses.
        """
        cached = self._call_cache.backward
        if cached is not None and type(reserve) is Reserve and reserve._engine is self._call_cache.trainer[1]:
            result: tuple[Any, ...] | None = cached(dy, dstates, reserve._residuals, grad_req, out)
            if result is not None:
                return result
        if type(reserve) is bfloat16_arrays.MixedReserve:
            return bfloat16_arrays.backward(self.backward, dy, dstates, reserve, grad_req, out)
        checked = check_reserve(reserve, self.spec, self._backends)
        size = checked.steps, checked.batch
        operands = backward_operands(self.spec, *size, dy, dstates, grad_req, out, checked._kind)
        return self._run_backward(checked, operands, (dy, dstates, grad_req))
