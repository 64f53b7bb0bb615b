"""What runs a network: the contract of its engine, and the engines of its layers run one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.interface import CachedForwardCall, Engine, Need, Residuals, SavePolicy
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, GradBuffers, clear_padding
from fusedrnn.engines.registry import EngineSelector, candidates
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.spec import RNNSpec

LayerStates = tuple[tuple[Array, ...], ...]
"""The final states of each entry of the chain, or the gradients of its initial states."""


class NetworkOperands(NamedTuple):
    """The arrays of a forward call, checked.

    Attributes are those of :class:`fusedrnn.engines.operands.ForwardOperands`, but ``params`` is the flat vector of the
    network, ``states`` and ``reset_states`` have an entry for each layer (None for zeros), and ``all_states`` are those
    of the last layer.
    """

    x: Array
    params: Array
    states: Sequence[Sequence[Array] | None]
    lengths: Array | None
    y: Array
    resets: Array | None
    reset_states: Sequence[Sequence[Array] | None]
    all_states: Sequence[Array]


class NetworkGradBuffers(NamedTuple):
    """Arrays for gradients, and whether to add to them, as in :class:`fusedrnn.engines.operands.GradBuffers`.

    ``params`` is the flat vector of the network; ``states`` and ``reset_states`` have an entry for each layer.
    """

    x: Array | None
    params: Array | None
    states: LayerStates | None
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False
    reset_states: LayerStates | None = None
    add_reset_states: bool = False

    def of_layer(self, index: int, part: slice, dx: Array | None) -> GradBuffers:
        """The buffers of a layer, whose parameters are that part of the flat vector.

        ``dx`` is for the gradient of the layer's input. Only the first layer may add to it.
        """
        return GradBuffers(
            dx,
            None if self.params is None else self.params[part],
            None if self.states is None else self.states[index],
            self.add_x and index == 0,
            self.add_params,
            self.add_states,
            None if self.reset_states is None else self.reset_states[index],
            self.add_reset_states,
        )


class NetworkGradOperands(NamedTuple):
    """The arrays of a backward call, checked.

    Attributes are those of :class:`fusedrnn.engines.operands.BackwardOperands`; ``dstates`` has an entry for each
    layer.
    """

    dy: Array | None
    dstates: Sequence[Sequence[Array | None]]
    grads: NetworkGradBuffers
    dall_states: Sequence[Array | None]


class NetworkEngine(Protocol):
    """Runs one network on operands that have been checked; see :class:`fusedrnn.engines.interface.Engine`."""

    def compile(self, training: bool = False) -> None:
        """Prepare now what the first call in inference would prepare; with ``training`` also that in training."""

    def forward(self, operands: NetworkOperands) -> LayerStates:
        """Inference: write ``y`` and return the final states of each layer, which are new arrays."""

    def train(
        self, operands: NetworkOperands, save: SavePolicy, seeds: Sequence[int]
    ) -> tuple[LayerStates, Residuals]:
        """Training: the same, with the seed of each layer; also return the residuals that :meth:`backward` needs."""

    def backward(self, residuals: Any, operands: NetworkGradOperands) -> None:
        """Write or add the gradients."""

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The ``nbytes`` of the residuals of T steps of N sequences."""


@runtime_checkable
class RunsNetworks(Protocol):
    """An engine that runs a network as a whole, not layer after layer."""

    @staticmethod
    def network(spec: NetworkSpec, layers: Sequence[Any]) -> NetworkEngine:
        """The engine of the network; ``layers`` are engines of this kind, one for each entry of the chain."""


@runtime_checkable
class CachesFlatCalls(Protocol):
    """An engine of a network that caches calls for streams, which hold the states of all layers as a flat tuple."""

    def cache_flat_forward(self, operands: NetworkOperands, states: tuple[Array, ...]) -> CachedForwardCall | None:
        """The cached form of a call in inference without resets, which takes and returns flat states.

        See :meth:`fusedrnn.engines.interface.CachesCalls.cache_forward`; ``states`` are flat too.
        """


class _Residuals(NamedTuple):
    """What the training call of each layer saved."""

    layers: Sequence[Residuals]
    steps: int
    batch: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they hold."""
        return sum(layer.nbytes for layer in self.layers)


class EngineChain:
    """Runs a network layer after layer, on any engines; see :class:`NetworkEngine`."""

    def __init__(self, spec: NetworkSpec, layers: Sequence[Engine]) -> None:
        self._spec, self._engines = spec, layers

    def compile(self, training: bool = False) -> None:
        """Compile what each layer needs."""
        for engine in self._engines:
            engine.compile(training)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The bytes of all layers."""
        return sum(engine.reserve_bytes(steps, batch, save) for engine in self._engines)

    def forward(self, operands: NetworkOperands) -> LayerStates:
        """Inference."""
        layers = self._forward_operands(operands)
        return tuple([engine.forward(layer) for engine, layer in zip(self._engines, layers, strict=True)])

    def train(
        self, operands: NetworkOperands, save: SavePolicy, seeds: Sequence[int]
    ) -> tuple[LayerStates, _Residuals]:
        """Training."""
        layers = zip(self._engines, self._forward_operands(operands), seeds, strict=True)
        results = [engine.train(layer, save, seed) for engine, layer, seed in layers]
        steps, batch = operands.x.shape[:2]
        return tuple([final for final, _ in results]), _Residuals([saved for _, saved in results], steps, batch)

    def _forward_operands(self, operands: NetworkOperands) -> list[ForwardOperands]:
        """The operands of each layer; the output of one layer is the input of the next."""
        layers: list[ForwardOperands] = []
        x, last = operands.x, len(self._engines) - 1
        for index, (spec, params) in enumerate(self._parts(operands.params)):
            y = operands.y if index == last else np.empty((*x.shape[:2], spec.output_size), x.dtype)
            if index < last and operands.lengths is not None:
                clear_padding(y, operands.lengths)
            layers.append(ForwardOperands(
                x, params, operands.states[index], operands.lengths, y, operands.resets, operands.reset_states[index],
                operands.all_states if index == last else (),
            ))  # fmt: skip
            x = y
        return layers

    def _parts(self, params: Array) -> list[tuple[RNNSpec, Array]]:
        return list(zip(self._spec.layers, self._spec.layout.split(params), strict=True))

    def backward(self, residuals: _Residuals, operands: NetworkGradOperands) -> None:
        """The gradients, from the last layer to the first."""
        dy, grads, parts = operands.dy, operands.grads, self._spec.layout.parts
        last = len(parts) - 1
        for index, spec in reversed([*enumerate(self._spec.layers)]):
            dx = grads.x if index == 0 else np.empty((residuals.steps, residuals.batch, spec.input_size), spec.dtype)
            dall_states = operands.dall_states if index == last else ()
            buffers = grads.of_layer(index, parts[index], dx)
            layer = BackwardOperands(dy, operands.dstates[index], buffers, dall_states)
            self._engines[index].backward(residuals.layers[index], layer)
            dy = dx


class NetworkSelector:
    """Selects the engine for each call of a network: the first that supports what the call needs in all layers.

    Args:
        spec: What to run.
        backend: The one engine to use; None for any that may be selected automatically.

    Raises:
        TypeError: If ``backend`` is not a string.
        ValueError: If it names no engine.
    """

    def __init__(self, spec: NetworkSpec, backend: str | None = None) -> None:
        self._spec = spec
        self.names = tuple(entry.name for entry in candidates(backend))
        self._selectors = {name: [EngineSelector(layer, name) for layer in spec.layers] for name in self.names}
        self._created: dict[str, NetworkEngine] = {}

    def select(self, needs: frozenset[Need] = frozenset()) -> tuple[str, NetworkEngine]:
        """The name and the engine for calls with these needs.

        Raises:
            NotImplementedError: With the reason of each engine that was rejected, and the layer.
        """
        rejections: list[str] = []
        for name in self.names:
            layers = self._select_layers(name, needs, rejections)
            if layers is not None:
                # A selector of one engine always gives the same object.
                engine = self._created.get(name)
                return name, engine or self._created.setdefault(name, _make(self._spec, layers))
        raise NotImplementedError("; ".join(rejections) or "no engine is registered that is used automatically")

    def _select_layers(self, name: str, needs: frozenset[Need], rejections: list[str]) -> list[Engine] | None:
        """The engine of that name for each layer; None if a layer has none: then the reason joins ``rejections``."""
        layers, last = [], len(self._spec.layers) - 1
        for index, (layer, selector) in enumerate(zip(self._spec.layers, self._selectors[name], strict=True)):
            needed = needs
            if not layer.drops:
                needed -= {"dropout"}
            if index < last:
                needed -= {"all_states"}
            try:
                layers.append(selector.select(needed)[1])
            except NotImplementedError as error:
                rejections.append(f"layers[{index}]: {error}")
                return None
        return layers


def _make(spec: NetworkSpec, layers: list[Engine]) -> NetworkEngine:
    first = layers[0]
    if isinstance(first, RunsNetworks) and all(type(layer) is type(first) for layer in layers):
        return first.network(spec, layers)
    return EngineChain(spec, layers)
