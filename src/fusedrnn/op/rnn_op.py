"""The operator: made once for a spec, cached, called with arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedrnn.engines  # noqa: F401 -- registers the engines
from fusedrnn.engines import registry
from fusedrnn.engines.grad_buffers import clear_padding
from fusedrnn.engines.operand_table import Request
from fusedrnn.engines.pointers import ByAddress
from fusedrnn.engines.registry import NEEDS, Choice, Keep
from fusedrnn.frozen_array import frozen
from fusedrnn.op import grad_req as requests
from fusedrnn.op import validation as arguments
from fusedrnn.op.call_cache import Repeats
from fusedrnn.op.grad_req import Reserve
from fusedrnn.op.stream import Stream
from fusedrnn.spec import RNNSpec, check_bytes, positive_int

Array = NDArray[Any]
_GATES: Keep = "gates"


class RNNOp:
    """A recurrent network ready to run: kernels, packed weights and workspace for one spec.

    Sizes: T steps, N sequences, I inputs, H hidden units, S features of h (H, or the projection's size), L layers, D
    directions. The states are h, of size S, and an LSTM's c, of size H.

    Any number of threads may call the same op at once. Parameters are packed at the first call and again whenever
    their content has changed; those from :func:`frozen` are not even looked at twice.

    Args:
        spec: What to run.
        backend: The engine to run it, one of :func:`fusedrnn.engines.registry.names`; None for the first that can,
            also if what a call needs takes another one than the op's own.

    Attributes:
        spec: What it runs.
        backend: The name of its engine.

    Raises:
        TypeError: If ``spec`` is not an :class:`RNNSpec`, or ``backend`` no string.
        ValueError: If ``backend`` names no engine.
        NotImplementedError: Naming what the spec asks for and no engine has.

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
        _check(spec, backend)
        self.spec = spec
        self._asked = backend
        self._choice = Choice(spec, backend)
        self.backend, self._engine = self._choice.serving()
        self._repeats = Repeats()
        # The name and the engine of the last call that trained.
        self._trainer: tuple[str, Any] = "", None

    @classmethod
    def get(cls, spec: RNNSpec, backend: str | None = None) -> RNNOp:
        """The op for that spec and backend: the one made before, while it is among those most recently asked for."""
        _check(spec, backend)
        return registry.cached(spec, backend, lambda: cls(spec, backend))

    def __repr__(self) -> str:
        return f"RNNOp({self.spec!r}, backend={self.backend!r})"

    def __reduce__(self) -> tuple[type[RNNOp], tuple[RNNSpec, str | None]]:
        return RNNOp, (self.spec, self._asked)

    def compile(self, training: bool = False) -> RNNOp:
        """Compile the kernels now, or fetch them from the disk, rather than at the first call.

        Args:
            training: Whether those of training too.

        Raises:
            TypeError: If ``training`` is no truth value.
            NotImplementedError: If it is asked for and no engine trains this spec.
        """
        trains = arguments.flag("training", training)
        self._engine.compile()
        if trains:
            self._serving(True, False)[1].compile(True)
        return self

    def by_address(self) -> ByAddress:
        """The engine's calls on operands by address, for adapters; nothing is checked there.

        Raises:
            NotImplementedError: If the engine takes NumPy arrays alone.
        """
        if not isinstance(self._engine, ByAddress):
            raise NotImplementedError(f"engine {self.backend!r} takes NumPy arrays alone")
        return self._engine

    def _serving(self, training: bool, lengths: bool) -> tuple[str, registry.Engine]:
        """The name and the engine for a call of that kind."""
        if not training and not lengths:
            return self.backend, self._engine
        there = {"training": training, "lengths": lengths, "dropout": training and self.spec.drops}
        return self._choice.serving(frozenset(need for need in NEEDS if there[need]))

    def forward(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array | None] | None = None,
        *,
        training: bool = False,
        lengths: Array | Sequence[int] | None = None,
        out: Array | None = None,
        reserve: Keep = _GATES,
        seed: int | None = None,
    ) -> tuple[Array, tuple[Array, ...], Reserve | None]:
        """Run the network over whole sequences.

        Args:
            x: Input (T, N, I), time-major, of the spec's dtype; any strides, never written to.
            params: The flat parameter vector of ``spec.layout``, of the spec's dtype.
            states: Initial states ``(h0,)`` or ``(h0, c0)``, each (L·D, N, size) with index layer·D + direction, or
                None for zeros; None if all are.
            training: Whether to keep what backward needs, and to drop elements between layers if the spec says so.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T; None for T everywhere. Padding yields
                zeros in the output; final states are those of the last valid step; the reverse direction starts at
                each sequence's own end.
            out: Where to write the output instead of a new array: (T, N, D·S), last axis contiguous, apart from the
                inputs' memory.
            reserve: What training keeps: ``"gates"`` and states; or ``"states"`` alone, to compute the gates again
                in backward: less memory, more time, the same bits. Inference keeps nothing.
            seed: From 0 to 2**64 - 1; says which elements training drops. None for a new one where there is
                something to drop, which the reserve tells; else 0. Inference drops nothing.

        Returns:
            The triple (y, states, reserve): the output (T, N, D·S), the last layer's h at each step with directions
            side by side; the final states, a tuple like ``states``; and a :class:`Reserve` for :meth:`backward`, or
            None without ``training``.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise.
            NotImplementedError: Naming what the call needs and no engine has.
        """
        spec = self.spec
        if lengths is None and seed is None and reserve is _GATES:
            again = self._again(x, params, states, training, out)
            if again is not None:
                return again
        trains, keep, seed = arguments.flag("training", training), arguments.keep(reserve), arguments.seed(seed)
        given: dict[str, Sequence[Array]] = {"x": (x,), "params": (params,)}
        asked = x, params, states
        x = arguments.sequence(x, spec)
        steps, batch = x.shape[:2]
        params = arguments.parameters(params, spec)
        initial = arguments.states(states, spec, batch)
        valid = arguments.lengths(lengths, steps, batch)
        name, engine = self._serving(trains, valid is not None)
        if out is not None:
            given["states"] = [state for state in states or () if state is not None]
            y = arguments.output(out, spec, x.shape, given)
        else:
            y = np.empty((steps, batch, spec.output_size), spec.dtype)
        clear_padding(y, valid)
        repeating = valid is None and keep == "gates"
        if not trains:
            final = engine.forward(x, params, initial, valid, y)
            if repeating:
                self._repeats.after_forward(engine, asked, (x, params, initial), y)
            return y, final, None
        seed = _drawn(spec) if seed is None else seed
        final, kept = engine.train(x, params, initial, valid, y, keep, seed)
        if repeating:
            self._trainer = name, engine
            self._repeats.after_forward(engine, asked, (x, params, initial), y, kept)
        return y, final, Reserve(steps, batch, keep, seed, spec, name, engine, kept, valid)

    def _again(
        self, x: Array, params: Array, states: Sequence[Array | None] | None, training: bool, out: Array | None
    ) -> tuple[Array, tuple[Array, ...], Reserve | None] | None:
        """What forward returns, by a short way if the call is like the one before; None if it is not."""
        # Another thread may take a short way back at any time.
        spec = self.spec
        if training is False and (infer := self._repeats.inference) is not None:
            found = infer(x, params, states, out, 0)
            return None if found is None else (found[0], found[1], None)
        if training is True and (train := self._repeats.training) is not None:
            seed = _drawn(spec)
            found = train(x, params, states, out, seed)
            if found is not None:
                y, final, kept = found
                return y, final, Reserve(y.shape[0], y.shape[1], _GATES, seed, spec, *self._trainer, kept, None)
        return None

    def backward(
        self,
        dy: Array | None,
        dstates: Sequence[Array | None] | None,
        reserve: Reserve | None,
        *,
        grad_req: Request | Mapping[str, Request] = "write",
        out: Sequence[Any] | None = None,
    ) -> tuple[Array | None, Array | None, tuple[Array, ...] | None]:
        """The gradients of a forward call's input, parameters and initial states.

        Args:
            dy: Gradient of the output (T, N, D·S), any strides, never written to; None for zero. Padding may hold
                anything.
            dstates: Gradients of the final states, a tuple like them, each None for zero; None if all are.
            reserve: What forward returned. It stays as it is, for more calls.
            grad_req: ``"write"``, ``"add"`` (to what the buffer in ``out`` holds) or ``"null"`` (not wanted), for
                all or for each of ``"x"``, ``"params"`` and ``"states"``; written if the mapping does not say.
            out: Where to write or add instead of new arrays: a triple (dx, dparams, dstates) of buffers, each None
                or like what is returned, dstates a tuple. The last axis of dx must be contiguous, the others as a
                whole; none may share memory with another, nor with ``dy`` and ``dstates``.

        Returns:
            The triple (dx, dparams, dstates): (T, N, I), zero in padding when written and untouched there when
            added to; the flat vector; a tuple of (L·D, N, size) for each initial state. None for what is not wanted.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if ``reserve`` comes from another spec, or an engine that this op never uses.
        """
        spec, short = self.spec, self._repeats.backward
        if short is not None and type(reserve) is Reserve and reserve._engine is self._trainer[1]:
            found = short(dy, dstates, reserve._kept, grad_req, out)
            if found is not None:
                dx, dparams, initial = found
                return dx, dparams, initial
        kept = requests.reserve_of(reserve, spec, self._choice.names)
        steps, batch = kept.steps, kept.batch
        output = arguments.output_gradient(dy, spec, steps, batch)
        final = arguments.state_gradients(dstates, spec, batch)
        wanted = requests.parse(grad_req)
        given: dict[str, Sequence[Array]] = {
            "dy": () if dy is None else (dy,),
            "dstates": [gradient for gradient in dstates or () if gradient is not None],
        }
        gradients = requests.gradients(wanted, out, spec, steps, batch, given)
        kept.backward(output, final, gradients)
        if kept._engine is self._trainer[1]:
            self._repeats.after_backward(kept, (dy, dstates), (output, final), grad_req, gradients)
        return gradients.x, gradients.params, gradients.states

    def stream(self, params: Array, batch: int = 1, states: Sequence[Array | None] | None = None) -> Stream:
        """Sequences that arrive in chunks: the state is kept from one to the next.

        Args:
            params: The flat parameter vector; copied, unless it is from :func:`frozen`: many streams can share that.
            batch: N.
            states: Initial states as in :meth:`forward`, which are copied.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the network has a reverse direction: that begins at the end.
        """
        for name in ("bidirectional", "reverse"):
            if getattr(self.spec, name):
                raise ValueError(f"a stream must be of a network that runs forward alone; got {name}=True")
        batch = positive_int("batch", batch)
        check_bytes("batch", batch, self.spec.state_shape(batch), self.spec.dtype)
        return Stream(self, frozen(arguments.parameters(params, self.spec)), batch, states)

    def reserve_size(self, steps: int, batch: int, reserve: Keep = "gates") -> int:
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
        keep = arguments.keep(reserve)
        return self._serving(True, False)[1].reserve_bytes(steps, batch, keep)


def _drawn(spec: RNNSpec) -> int:
    """A seed for a call that was given none."""
    return int.from_bytes(os.urandom(8), "little") if spec.drops else 0


def _check(spec: object, backend: object) -> None:
    if not isinstance(spec, RNNSpec):
        raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
    if backend is not None:
        registry.find(backend)  # raises if there is none
