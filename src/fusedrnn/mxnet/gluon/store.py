"""The flat vectors that hold a layer's parameters and their gradients."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.locks import Lock
from fusedrnn.mxnet.gluon.initializers import Initializer
from fusedrnn.spec import RNNSpec

LOCK = Lock()
"""Held by whatever gives a layer values, such as a call that runs a deferred initialization.

It is one for all layers, because initializers may call other layers, whose initializers may call the first.
"""


class _Running(threading.local):
    """The stores whose deferred initialization this thread runs; a forked child forgets those of other threads."""

    def __init__(self) -> None:
        self.stores: list[ParameterStore] = []


RUNNING = _Running()


class Deferred(NamedTuple):
    """An initialization that waits for the input size: its arguments, and values by short name that take precedence."""

    init: Initializer
    seed: int | None
    loaded: Mapping[str, Array]


class ParameterStore:
    """The flat vectors of a layer's parameters and of their gradients, each allocated at its first use."""

    def __init__(self, spec: RNNSpec, input_size_known: bool) -> None:
        self.spec = spec
        self.input_size_known = input_size_known
        """Whether the spec has the layer's input size. Until a call or a load sets it, the spec's input size is 1."""
        self.flat: Array | None = None
        self.grads: Array | None = None
        self.deferred: Deferred | None = None

    def spec_for(self, input_size: int) -> RNNSpec:
        """The spec, with that input size if it is not known yet."""
        return self.spec if self.input_size_known else replace(self.spec, input_size=input_size)

    def vector(self, name: str) -> Array:
        """The parameters. If they have no values, an error whose message begins with ``name``."""
        if self.flat is None:
            deferred = self.deferred is not None
            reason = "the first call sets the input size" if deferred else "call initialize or load_parameters"
            raise ValueError(f"{name} must have values; got none yet: {reason}")
        return self.flat

    def set_vector(self, spec: RNNSpec, flat: Array) -> None:
        """Overwrite the parameters; if these have no values yet, ``flat`` and ``spec`` become the layer's."""
        if self.flat is None:
            # Another thread must not see that nothing is deferred before it sees the values.
            self.spec, self.input_size_known, self.flat, self.deferred = spec, True, flat, None
        else:
            self.flat[...] = flat

    def gradients(self) -> Array:
        """The gradients, initially zero."""
        if self.grads is None:
            self.grads = np.zeros(self.spec.layout.size, self.spec.dtype)
        return self.grads

    def cast(self, dtype: str) -> None:
        """Convert parameters and gradients to another dtype."""
        with LOCK:
            self.spec = replace(self.spec, dtype=dtype)
            self.flat = None if self.flat is None else self.flat.astype(dtype)
            self.grads = None if self.grads is None else self.grads.astype(dtype)
