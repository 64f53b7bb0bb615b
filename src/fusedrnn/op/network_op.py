"""The operator of a network whose layers differ: created once for a spec, called with arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import fusedrnn.engines  # noqa: F401 -- registers the engines
from fusedrnn.arrays import Array
from fusedrnn.engines import registry
from fusedrnn.engines.interface import SAVE_POLICIES, SavePolicy
from fusedrnn.engines.network import NetworkSelector
from fusedrnn.engines.operands import GradReq
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op.makes_streams import MakesStreams
from fusedrnn.op.network_operands import LayerArrays, backward_operands, check_network, forward_operands
from fusedrnn.op.operator import Operator
from fusedrnn.op.reserve import Reserve, check_reserve
from fusedrnn.op.validation import check_seed
from fusedrnn.scalars import as_bool, check_choice

LayerStates = tuple[tuple[Array, ...], ...]


class NetworkOp(Operator, MakesStreams):
    """A network of layers that differ, ready to run.

    A call has the bits of :class:`RNNOp` called layer after layer, where each layer's output is the next one's input.
    On the engine ``cpu`` it is one job of the thread pool. Sizes are those of :class:`RNNOp`: I is that of the first
    layer; for outputs, S, H and D are those of the last layer.

    Any number of threads may call the same op at once.

    Args:
        spec: The network.
        backend: The engine, one of :func:`fusedrnn.engines.registry.names`; None for the first automatic one that
            can run all layers (``cpu``, unless others are registered). Then each call uses the first automatic one that
            supports what it needs.

    Attributes:
        spec: The network.
        backend: The name of the engine.

    Raises:
        TypeError: If ``spec`` is not a :class:`NetworkSpec`, or ``backend`` not a string.
        ValueError: If ``backend`` names no engine.
        NotImplementedError: If no engine supports a layer; the message names the layer and what the engines lack.

    Example:
    >>> import numpy as np
    >>> from fusedrnn import NetworkOp, NetworkSpec
    >>> op = NetworkOp(NetworkSpec.stack("lstm", input_size=3, hidden_sizes=(8, 5)))
    >>> x = np.zeros((7, 2, 3), np.float32)
    >>> params = np.zeros(op.spec.layout.size, np.float32)
    >>> y, states, reserve = op.forward(x, params, training=True)
    >>> y.shape, [[state.shape for state in layer] for layer in states]
    ((7, 2, 5), [[(1, 2, 8), (1, 2, 8)], [(1, 2, 5), (1, 2, 5)]])
    >>> dx, dparams, ((dh0, dc0), (dh1, dc1)) = op.backward(np.ones_like(y), None, reserve)
    """

    spec: NetworkSpec

    def __init__(self, spec: NetworkSpec, backend: str | None = None) -> None:
        super().__init__(check_network(spec), backend, NetworkSelector(spec, backend))

    @classmethod
    def get(cls, spec: NetworkSpec, backend: str | None = None) -> NetworkOp:
        """The op for that spec and backend, shared by all who ask for it; the most recently used ones are kept."""
        check_network(spec)
        registry.check_backend(backend)
        return registry.cached_op(spec, backend, lambda: cls(spec, backend))

    def __repr__(self) -> str:
        return f"NetworkOp({self.spec!r}, backend={self.backend!r})"

    def __reduce__(self) -> tuple[type[NetworkOp], tuple[NetworkSpec, str | None]]:
        return NetworkOp, (self.spec, self._requested_backend)

    def _engine_seed(self, seed: int) -> tuple[int, ...]:
        return self.spec.layer_seeds(seed)

    def forward(
        self,
        x: Array,
        params: Array,
        states: LayerArrays | None = None,
        *,
        training: bool = False,
        lengths: Array | Sequence[int] | None = None,
        out: Array | None = None,
        reserve: SavePolicy = "gates",
        seed: int | None = None,
        resets: Array | Sequence[Sequence[bool]] | None = None,
        reset_states: LayerArrays | None = None,
        all_states: bool = False,
    ) -> tuple[Any, LayerStates, Reserve | None]:
        """Run the network over whole sequences.

        Args:
            x: Input (T, N, I), time-major, of the spec's dtype; any strides, never written to.
            params: The flat parameter vector of ``spec.layout``, of the spec's dtype; quantized parameters are not
                supported.
            states: Initial states, a tuple with an entry for each entry of ``spec.layers``: what :meth:`RNNOp.forward`
                takes for it, or None for zeros. None instead of the tuple stands for zeros in all.
            training: As in :meth:`RNNOp.forward`; ``lengths``, ``out``, ``reserve`` and ``resets`` are also as there.
            lengths: Valid steps of each sequence, integers (N,) from 0 to T; None for T everywhere.
            out: Where to write the output instead of a new array, (T, N, D·S).
            reserve: What training saves: ``"gates"`` and states, or ``"states"`` alone.
            seed: From 0 to 2**64 - 1; determines what training drops, by :meth:`NetworkSpec.layer_seeds`. None stands
                for a new seed if a layer drops anything, else for 0.
            resets: Where sequences begin anew in all layers, bools (T, N).
            reset_states: The states after resets, a tuple like ``states``; None for zeros.
            all_states: Whether to return every state of every step of the last layer.

        Returns:
            The triple (y, states, reserve). y is the output (T, N, D·S) of the last layer, or with ``all_states`` the
            tuple that :meth:`RNNOp.forward` describes; states is a tuple with the final states of each entry of
            ``spec.layers``; reserve is a :class:`Reserve` for :meth:`backward`, or None without ``training``.

        Raises:
            TypeError: If an argument has the wrong type. The message names the argument and the layer, what was given
                and what was expected.
            ValueError: If an argument has the wrong shape or value. The message is of the same form.
            NotImplementedError: If no engine supports what the call needs; the message names the layer and the need.
        """
        has_options = lengths is not None or seed is not None or reset_states is not None or all_states is not False
        if isinstance(reserve, str) and reserve == "gates" and not has_options and self._call_cache.has_forward:
            cached = self._call_cache.forward(self.spec, x, params, states, training, out, resets)
            if cached is not None:
                return cached
        spec, trains = self.spec, as_bool("training", training)
        save, seed = check_choice("reserve", reserve, SAVE_POLICIES), check_seed(seed)
        operands, kind = forward_operands(spec, x, params, states, lengths, out, resets, reset_states, all_states)
        return self._run_forward(operands, kind, trains, save, seed, (x, params, states))

    def backward(
        self,
        dy: Any,
        dstates: LayerArrays | None,
        reserve: Reserve | None,
        *,
        grad_req: GradReq | Mapping[str, GradReq] = "write",
        out: Sequence[Any] | None = None,
    ) -> tuple[Any, ...]:
        """The gradients of a forward call's input, parameters and initial states.

        Args:
            dy: Gradient of the output (T, N, D·S), any strides, never written to; None for zero. With ``all_states``, a
                tuple as in :meth:`RNNOp.backward`.
            dstates: Gradients of the final states, a tuple with an entry for each entry of ``spec.layers``, or None for
                zero. None instead of the tuple stands for zero in all.
            reserve: What forward returned. It stays as it is, for further calls.
            grad_req: ``"write"``, ``"add"`` or ``"null"``, as in :meth:`RNNOp.backward`; the same for all layers.
            out: Buffers to write or add to instead of new arrays, as in :meth:`RNNOp.backward`; those of dstates are a
                tuple with a tuple for each entry of ``spec.layers``.

        Returns:
            The triple (dx, dparams, dstates). dx is (T, N, I), dparams a flat vector, and dstates a tuple with the
            gradients of the initial states of each entry of ``spec.layers``. If forward took ``reset_states``, a fourth
            entry holds their gradients. None stands for what is not computed.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value, or ``reserve`` comes from another spec, or from an
                engine that this op never uses.
        """
        if (gradients := self._cached_backward(dy, dstates, reserve, grad_req, out)) is not None:
            return gradients
        checked = check_reserve(reserve, self.spec, self._backends)
        size = checked.steps, checked.batch
        operands = backward_operands(self.spec, *size, dy, dstates, grad_req, out, checked._kind)
        return self._run_backward(checked, operands, (dy, dstates, grad_req))
