"""Specs as streams see them: the states of a whole network are a flat tuple of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.interface import CachedForwardCall, CachesCalls
from fusedrnn.engines.network import CachesFlatCalls
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op import network_operands, validation
from fusedrnn.op.bfloat16_arrays import as_float32
from fusedrnn.spec import RNNSpec

States = Sequence[Any] | None
"""States as callers give them. For an RNNSpec an entry is an array or None, for a NetworkSpec what its layer takes."""

Cacher = Callable[[Any, "tuple[Array, ...]"], "CachedForwardCall | None"]
"""``(operands, states)`` to the cached form of a call in inference that has just run; None if there is none."""


class StreamedSpec:
    """An RNNSpec. Its states are a flat tuple everywhere.

    Attributes:
        layers: The specs of the chain of which it consists.
        prefixes: What precedes the names of each layer's fields and states in texts.
        takes_bfloat16: Whether arrays may be of bfloat16; those of states and parameters are held in float32.
    """

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        self.layers: tuple[RNNSpec, ...] = (spec,)
        self.prefixes: tuple[str, ...] = ("",)
        self.takes_bfloat16 = spec.compute == "bfloat16"

    def check_direction(self) -> None:
        """Raise an error unless all layers run forward alone."""
        for prefix, layer in zip(self.prefixes, self.layers, strict=True):
            for name in ("bidirectional", "reverse"):
                if getattr(layer, name):
                    message = f"a stream must be of a network that runs forward alone; got {prefix}{name}=True"
                    raise ValueError(message)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all states."""
        named = zip(self.prefixes, self.layers, strict=True)
        return tuple([prefix + name for prefix, layer in named for name in layer.state_names])

    def state_shapes(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """The shapes of all states of so many sequences."""
        return tuple([shape for layer in self.layers for shape in layer.state_shape(batch)])

    def check_params(self, params: object) -> Any:
        """Parameters as a call takes them, contiguous."""
        return validation.check_params(as_float32(params) if self.takes_bfloat16 else params, self._spec)

    def check_states(self, states: States, batch: int) -> tuple[Array, ...] | None:
        """Initial states as the caller gives them, checked, as a flat tuple; None for zeros in all."""
        return validation.check_states(as_float32(states) if self.takes_bfloat16 else states, self._spec, batch)

    def operands(self, x: Array, params: Any, states: tuple[Array, ...]) -> Any:
        """The checked operands of a call in inference, from flat states."""
        return validation.forward_operands(self._spec, x, params, states, None, None)

    def cacher(self, engine: Any) -> Cacher | None:
        """The function of an engine that caches calls on flat states; None if the engine caches none."""
        if not isinstance(engine, CachesCalls):
            return None
        cache = engine.cache_forward
        return lambda operands, states: cache(operands, states, None)

    def nested(self, states: tuple[Array, ...]) -> tuple[Any, ...]:
        """Flat states in the form that calls take and return."""
        return states

    def flat(self, states: tuple[Any, ...]) -> tuple[Array, ...]:
        """The opposite of :meth:`nested`."""
        return states


class StreamedNetwork(StreamedSpec):
    """A NetworkSpec. Calls take and return a tuple of states for each layer; see :class:`StreamedSpec`."""

    def __init__(self, spec: NetworkSpec) -> None:
        self._spec, self.layers, self.takes_bfloat16 = spec, spec.layers, False
        self.prefixes = tuple([f"layers[{index}]." for index in range(len(spec.layers))])

    def check_params(self, params: object) -> Array:
        """The flat parameter vector, contiguous."""
        return network_operands.check_params(params, self._spec)

    def check_states(self, states: States, batch: int) -> tuple[Array, ...] | None:
        """Initial states as the caller gives them, checked, as a flat tuple; None for zeros in all."""
        by_layer = network_operands.check_states("states", states, self._spec, batch, "{}0")
        if all(entry is None for entry in by_layer):
            return None
        return self.flat(tuple([
            entry or tuple([np.zeros(shape, self._spec.dtype) for shape in shapes])
            for entry, shapes in zip(by_layer, self._spec.state_shape(batch), strict=True)
        ]))  # fmt: skip

    def operands(self, x: Array, params: Any, states: tuple[Array, ...]) -> Any:
        """The checked operands of a call in inference, from flat states."""
        return network_operands.forward_operands(self._spec, x, params, self.nested(states))[0]

    def cacher(self, engine: Any) -> Cacher | None:
        """The function of an engine that caches calls on flat states; None if the engine caches none."""
        return engine.cache_flat_forward if isinstance(engine, CachesFlatCalls) else None

    def nested(self, states: tuple[Array, ...]) -> tuple[Any, ...]:
        """Flat states in the form that calls take and return."""
        return tuple([states[part] for part in self._spec.state_slices])

    def flat(self, states: tuple[Any, ...]) -> tuple[Array, ...]:
        """The opposite of :meth:`nested`."""
        return tuple(chain.from_iterable(states))


def streamed(spec: RNNSpec | NetworkSpec) -> StreamedSpec:
    """The spec of an op as streams see it."""
    return StreamedNetwork(spec) if isinstance(spec, NetworkSpec) else StreamedSpec(spec)
