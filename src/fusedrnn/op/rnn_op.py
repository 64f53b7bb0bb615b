"""The operator: created once for a spec, called with arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fusedrnn.engines  # noqa: F401 -- registers the engines
from fusedrnn.arrays import Array
from fusedrnn.engines import registry
from fusedrnn.engines.interface import SAVE_POLICIES, SavePolicy
from fusedrnn.engines.operands import GradReq
from fusedrnn.op import bfloat16_arrays, validation
from fusedrnn.op.grad_req import backward_operands
from fusedrnn.op.makes_streams import MakesStreams
from fusedrnn.op.operator import Operator
from fusedrnn.op.quantizing import QuantizesParams
from fusedrnn.op.reserve import PLAIN_CALL, Reserve, check_reserve
from fusedrnn.op.resets import with_options
from fusedrnn.quantized_params import Params
from fusedrnn.scalars import as_bool, check_choice
from fusedrnn.spec import RNNSpec

if TYPE_CHECKING:  # loaded with the engine
    from fusedrnn.engines.cpu.executor import Executor

# Compared by identity, which is the fastest way to see that the argument was left out: Python has one such literal.
_GATES: SavePolicy = "gates"


class RNNOp(Operator, QuantizesParams, MakesStreams):
    """A recurrent network ready to run: kernels, packed weights and workspace for one spec.

    Sizes: T steps, N sequences, I inputs, H hidden units, S features of h (H, or the projection's size), L layers, D
    directions. The states are h, of size S, and an LSTM's c, of size H.

    Any number of threads may call the same op at once. Parameters are packed at the first call, and again whenever
    their content has changed. Parameters from :func:`frozen` cannot change, so later calls do not compare them.

    Args:
        spec: The network.
        backend: The engine, one of :func:`fusedrnn.engines.registry.names`; None for the first automatic one that can
            run the spec (``cpu``, unless others are registered). Then each call uses the first automatic one that
            supports what it needs.

    Attributes:
        spec: The network.
        backend: The name of the engine.

    Raises:
        TypeError: If ``spec`` is not an :class:`RNNSpec`, or ``backend`` not a string.
        ValueError: If ``backend`` names no engine.
        NotImplementedError: If no engine supports the spec; the message says what the engines lack.

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
        executor: Executor | None = getattr(self._engine, "executor", None)
        if executor is None:
            raise NotImplementedError(f"engine {self.backend!r} takes NumPy arrays alone")
        return executor

    def forward(
        self,
        x: Array,
        params: Params,
        states: Sequence[Array | None] | None = None,
        *,
        training: bool = False,
        lengths: Array | Sequence[int] | None = None,
        out: Array | None = None,
        reserve: SavePolicy = "gates",
        seed: int | None = None,
        resets: Array | Sequence[Sequence[bool]] | None = None,
        reset_states: Sequence[Array | None] | None = None,
        all_states: bool = False,
    ) -> tuple[Any, tuple[Array, ...], Reserve | None]:
        """Run the network over whole sequences.

        Args:
            x: Input (T, N, I), time-major, of the spec's dtype; any strides, never written to. With
                ``compute="bfloat16"``, x, params, states and out may also be of ``ml_dtypes.bfloat16``. Then y has the
                dtype of x, and final states have the dtype of the initial states, or of x if none are given.
            params: The flat parameter vector of ``spec.layout``, of the spec's dtype; or what :meth:`quantize` returns.
            states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size) with index layer·D + direction. None
                instead of an array stands for zeros, and None instead of the tuple for zeros in all.
            training: Whether to save what backward needs, and to drop elements between layers if the spec says so.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T, copied before anything is written; None
                for T everywhere. The output's padding is zero; final states are those of the last valid step; the
                reverse direction starts at each sequence's own end.
            out: Where to write the output instead of a new array: (T, N, D·S), last axis contiguous, sharing no
                memory with ``x``, ``params`` and ``states``. A large output of a cell without recurrent weights is
                written fastest to memory that begins at a cache line (64 bytes).
            reserve: What training saves. ``"gates"`` saves gates and states. ``"states"`` saves states alone, and
                backward computes the gates again, which takes less memory and more time and gives the same bits.
                Inference saves nothing.
            seed: From 0 to 2**64 - 1; determines which elements training drops. None stands for a new seed if the
                network drops anything, else for 0; the reserve has the seed that was used. Inference drops nothing.
            resets: Where sequences begin anew, bools (T, N), copied. At a marked step, all layers of the sequence start
                from ``reset_states``, and the results have the bits of a separate call from that step on. A mark at
                step 0 replaces ``states``; a mark in the padding has no effect. The marks divide a sequence into
                pieces, and the reverse direction runs over each piece from its end; it takes ``states`` for the last
                piece.
            reset_states: The states after resets, a tuple like ``states``; None for zeros.
            all_states: Whether to return every state of every step of the last layer, also states that y does not hold,
                such as c.

        Returns:
            The triple (y, states, reserve). y is the output (T, N, D·S), the last layer's h at each step with the
            directions concatenated; states are the final states, a tuple like the argument; reserve is a
            :class:`Reserve` for :meth:`backward`, or None without ``training``. With ``all_states``, a tuple stands in
            the place of y: y and every other state of each step (T, N, D·H), zero in the padding. For an LSTM it is
            (y, c).

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
            NotImplementedError: If no engine supports what the call needs; the message says what.
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
        return self._run_forward(operands, kind, trains, save, seed, (x, params, states))

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
                anything. With ``all_states``, a tuple of the gradients of y and the other states, as forward returned
                them.
            dstates: Gradients of the final states, a tuple like them. None instead of an array stands for zero, and
                None instead of the tuple for zero in all.
            reserve: What forward returned. It stays as it is, for further calls.
            grad_req: ``"write"``, ``"add"`` (to the content of the buffer in ``out``) or ``"null"`` (not computed), for
                all gradients; or a mapping to these from ``"x"``, ``"params"``, ``"states"`` and, if forward took them,
                ``"reset_states"``. A key that the mapping lacks stands for ``"write"``.
            out: Buffers to write or add to instead of new arrays: a tuple like the one that is returned, where None
                stands for a new array. The last axis of dx must be contiguous, and the other buffers must be contiguous
                as a whole. No buffer may share memory with another, or with ``dy`` and ``dstates``.

        Returns:
            The triple (dx, dparams, dstates), of the dtypes of x, params and states. dx is (T, N, I); its padding is
            zero when written and unchanged when added to. dparams is a flat vector. dstates is a tuple with an array
            (L·D, N, size) for each initial state. If forward took ``reset_states``, a fourth entry holds their
            gradients. None stands for what is not computed.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or ``reserve`` comes from another spec, or from an
                engine that this op never uses.
        """
        if (gradients := self._cached_backward(dy, dstates, reserve, grad_req, out)) is not None:
            return gradients
        if type(reserve) is bfloat16_arrays.MixedReserve:
            return bfloat16_arrays.backward(self.backward, dy, dstates, reserve, grad_req, out)
        checked = check_reserve(reserve, self.spec, self._backends)
        size = checked.steps, checked.batch
        operands = backward_operands(self.spec, *size, dy, dstates, grad_req, out, checked._kind)
        return self._run_backward(checked, operands, (dy, dstates, grad_req))
