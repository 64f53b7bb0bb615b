"""The operator: created once for a spec, called with arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fusedrnn.engines  # noqa: F401 -- registers the engines
from fusedrnn.engines import registry
from fusedrnn.engines.interface import NEEDS, SAVE_POLICIES, Engine, SavePolicy
from fusedrnn.engines.operands import GradReq, clear_padding
from fusedrnn.frozen_array import frozen
from fusedrnn.op import bfloat16_arrays, validation
from fusedrnn.op.call_cache import CallCache
from fusedrnn.op.grad_req import backward_operands
from fusedrnn.op.quantizing import QuantizesParams
from fusedrnn.op.reserve import Reserve, check_reserve
from fusedrnn.op.stream import Stream
from fusedrnn.quantized_params import Params
from fusedrnn.scalars import as_bool, check_bytes, check_choice, positive_int
from fusedrnn.spec import Array, RNNSpec

if TYPE_CHECKING:  # loaded with the engine
    from fusedrnn.engines.cpu.executor import Executor

_GATES: SavePolicy = "gates"


class RNNOp(QuantizesParams):
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

    def __init__(self, spec: RNNSpec, backend: str | None = None) -> None:
        validation.check_op(spec, backend)
        self.spec = spec
        self._requested_backend = backend
        self._selector = registry.EngineSelector(spec, backend)
        self.backend, self._engine = self._selector.select()
        # By whether a call trains, and whether it has lengths.
        self._selected: dict[tuple[bool, bool], tuple[str, Engine]] = {(False, False): (self.backend, self._engine)}
        self._call_cache = CallCache()
        # The name and the engine of the last training call that may be cached.
        self._trainer: tuple[str, Any] = "", None

    @classmethod
    def get(cls, spec: RNNSpec, backend: str | None = None) -> RNNOp:
        """The op for that spec and backend, shared by all who ask for it; the most recently used ones are kept."""
        validation.check_op(spec, backend)
        return registry.cached_op(spec, backend, lambda: cls(spec, backend))

    def __repr__(self) -> str:
        return f"RNNOp({self.spec!r}, backend={self.backend!r})"

    def __reduce__(self) -> tuple[type[RNNOp], tuple[RNNSpec, str | None]]:
        return RNNOp, (self.spec, self._requested_backend)

    def compile(self, training: bool = False) -> RNNOp:
        """Compile the kernels now, or load them from disk, rather than at the first call.

        Args:
            training: Whether to compile those of training too.

        Raises:
            TypeError: If ``training`` is not a truth value.
            NotImplementedError: If ``training`` is True and no engine trains this spec.
        """
        trains = as_bool("training", training)
        self._engine.compile()
        if trains:
            self._select_engine(training=True)[1].compile(True)
        return self

    def by_address(self) -> Executor:
        """The engine's calls on operands by address, for adapters; they check nothing.

        Raises:
            NotImplementedError: If the engine takes only NumPy arrays.
        """
        executor: Executor | None = getattr(self._engine, "pointers", None)
        if executor is None:
            raise NotImplementedError(f"engine {self.backend!r} takes NumPy arrays alone")
        return executor

    def _select_engine(self, training: bool, lengths: bool = False) -> tuple[str, Engine]:
        """The name and the engine for a call of that kind."""
        selected = self._selected.get((training, lengths))
        if selected is None:
            needed = {"training": training, "lengths": lengths, "dropout": training and self.spec.drops}
            selected = self._selector.select(frozenset(need for need in NEEDS if needed[need]))
            self._selected[training, lengths] = selected
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
    ) -> tuple[Array, tuple[Array, ...], Reserve | None]:
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

        Returns:
            The triple (y, states, reserve): the output (T, N, D·S), the last layer's h at each step with directions
            side by side; the final states, a tuple like ``states``; and a :class:`Reserve` for :meth:`backward`, or
            None without ``training``.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: Naming what the call needs and no engine supports.
        """
        if lengths is None and seed is None and reserve is _GATES:
            cached = self._forward_cached(x, params, states, training, out)
            if cached is not None:
                return cached
        spec, trains = self.spec, training is True or as_bool("training", training)
        if spec.compute == "bfloat16" and bfloat16_arrays.are_given(x, params, states, out):
            options = {"training": trains, "lengths": lengths, "reserve": reserve, "seed": seed}
            return bfloat16_arrays.forward(self.forward, x, params, states, out, **options)
        save = reserve if reserve is _GATES else check_choice("reserve", reserve, SAVE_POLICIES)
        seed = validation.check_seed(seed)
        operands = validation.forward_operands(spec, x, params, states, lengths, out)
        name, engine = self._select_engine(trains, operands.lengths is not None)
        if operands.lengths is not None:
            clear_padding(operands.y, operands.lengths)
        cacheable = operands.lengths is None and save == "gates"
        if not trains:
            final = engine.forward(operands)
            if cacheable:
                self._call_cache.note_forward(engine, (x, params, states), operands)
            return operands.y, final, None
        seed = _draw_seed(spec) if seed is None else seed
        final, residuals = engine.train(operands, save, seed)
        if cacheable:
            self._trainer = name, engine
            self._call_cache.note_forward(engine, (x, params, states), operands, residuals)
        steps, batch = operands.x.shape[:2]
        return operands.y, final, Reserve(steps, batch, save, seed, spec, name, engine, residuals, operands.lengths)

    def _forward_cached(
        self, x: Array, params: Any, states: Sequence[Array | None] | None, training: bool, out: Array | None
    ) -> tuple[Array, tuple[Array, ...], Reserve | None] | None:
        """What forward returns, by a cached call; None if there is none, or the arguments differ from its."""
        # Another thread may replace a cached call at any time.
        if training is False and (infer := self._call_cache.inference) is not None:
            result = infer(x, params, states, out, 0)
            return None if result is None else (result[0], result[1], None)
        if training is True and (train := self._call_cache.training) is not None:
            seed = _draw_seed(self.spec)
            result = train(x, params, states, out, seed)
            if result is not None:
                y, final, residuals = result
                reserve = Reserve(y.shape[0], y.shape[1], _GATES, seed, self.spec, *self._trainer, residuals, None)
                return y, final, reserve
        return None

    def backward(
        self,
        dy: Array | None,
        dstates: Sequence[Array | None] | None,
        reserve: Reserve | None,
        *,
        grad_req: GradReq | Mapping[str, GradReq] = "write",
        out: Sequence[Any] | None = None,
    ) -> tuple[Array | None, Array | None, tuple[Array, ...] | None]:
        """The gradients of a forward call's input, parameters and initial states.

        Args:
            dy: Gradient of the output (T, N, D·S), any strides, never written to; None for zero. Padding may hold
                anything.
            dstates: Gradients of the final states, a tuple like them, each None for zero; None if all are.
            reserve: What forward returned. It stays as it is, for further calls.
            grad_req: ``"write"``, ``"add"`` (to the content of the buffer in ``out``) or ``"null"`` (not computed),
                for all or for each of ``"x"``, ``"params"`` and ``"states"``; a mapping's missing keys are written.
            out: Where to write or add instead of new arrays: a triple (dx, dparams, dstates) of buffers, each None
                or like what is returned, dstates a tuple. The last axis of dx must be contiguous, the others as a
                whole; none may share memory with another, nor with ``dy`` and ``dstates``.

        Returns:
            The triple (dx, dparams, dstates), of the dtypes of x, params and states: (T, N, I), in padding zero when
            written and untouched when added to; the flat vector; a tuple of (L·D, N, size) for each initial state.
            None for what is not computed.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if ``reserve`` comes from another spec, or from an engine that this op never
                uses.
        """
        spec, cached = self.spec, self._call_cache.backward
        if cached is not None and type(reserve) is Reserve and reserve._engine is self._trainer[1]:
            result = cached(dy, dstates, reserve._residuals, grad_req, out)
            if result is not None:
                return result
        if type(reserve) is bfloat16_arrays.MixedReserve:
            return bfloat16_arrays.backward(self.backward, dy, dstates, reserve, grad_req, out)
        checked = check_reserve(reserve, spec, self._selector.names)
        operands = backward_operands(spec, checked.steps, checked.batch, dy, dstates, grad_req, out)
        checked.backward(operands)
        if checked._engine is self._trainer[1]:
            self._call_cache.note_backward(checked, (dy, dstates, grad_req), operands)
        return operands.grads[:3]

    def stream(self, params: Params, batch: int = 1, states: Sequence[Array | None] | None = None) -> Stream:
        """Sequences that arrive in chunks: the state is carried from one to the next.

        Args:
            params: The flat parameter vector, which is copied; or frozen or quantized ones, which many streams share.
            batch: N.
            states: Initial states as in :meth:`forward`, which are copied.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the network has a reverse direction, which starts at a sequence's end.
        """
        for name in ("bidirectional", "reverse"):
            if getattr(self.spec, name):
                raise ValueError(f"a stream must be of a network that runs forward alone; got {name}=True")
        batch = positive_int("batch", batch)
        check_bytes("batch", batch, self.spec.state_shape(batch), self.spec.dtype)
        return Stream(self, frozen(validation.check_params(params, self.spec)), batch, states)

    def reserve_size(self, steps: int, batch: int, reserve: SavePolicy = "gates") -> int:
        """Bytes of the reserve of a forward call of that size, its ``nbytes``.

        Args:
            steps: T.
            batch: N.
            reserve: As in :meth:`forward`.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: If no engine trains this spec.
        """
        steps, batch = positive_int("steps", steps), positive_int("batch", batch)
        save = check_choice("reserve", reserve, SAVE_POLICIES)
        return self._select_engine(training=True)[1].reserve_bytes(steps, batch, save)


def _draw_seed(spec: RNNSpec) -> int:
    """A new seed if the network drops something, else 0."""
    return int.from_bytes(os.urandom(8), "little") if spec.drops else 0
