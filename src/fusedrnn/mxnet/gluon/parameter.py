"""Parameters by name, and the one vector in which a layer's lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusedrnn.engines.operands import GRAD_REQS, GradReq, write_or_add
from fusedrnn.mxnet.gluon.initializers import Initializer, checked, fill
from fusedrnn.spec import Array, RNNSpec


class Store:
    """The flat vector of a layer's parameters and that of their gradients; both come when they are first needed."""

    def __init__(self, spec: RNNSpec, known: bool) -> None:
        self.spec = spec
        self.known = known
        """Whether the spec's input size is the layer's; until the first call or loading says it, 1 stands in."""
        self.flat: Array | None = None
        self.grads: Array | None = None
        self.waiting: tuple[Initializer, np.random.Generator] | None = None

    def settle(self, input_size: int) -> None:
        """Take the input size from whoever knows it first."""
        if not self.known:
            self.spec, self.known = replace(self.spec, input_size=input_size), True

    def vector(self, who: str) -> Array:
        """The parameters, which must be there."""
        if self.flat is None:
            reason = "call initialize or load_parameters"
            if self.waiting is not None:
                reason = "the first call will say its input size"
            raise ValueError(f"{who} must have values; got none yet: {reason}")
        return self.flat

    def gradients(self) -> Array:
        """Their gradients, zero to begin with."""
        if self.grads is None:
            self.grads = np.zeros(self.spec.layout.size, self.spec.dtype)
        return self.grads

    def cast(self, dtype: str) -> None:
        """Change the format of all."""
        self.spec = replace(self.spec, dtype=dtype)
        self.flat = None if self.flat is None else self.flat.astype(dtype)
        self.grads = None if self.grads is None else self.grads.astype(dtype)


class Parameter:
    """One weight or bias of a layer.

    Attributes:
        name: Its full name, ``lstm0_l0_i2h_weight``.
        short_name: The name without the layer's prefix.
    """

    def __init__(self, store: Store, prefix: str, layer: int, direction: int, kind: Any, init: Initializer) -> None:
        self._store = store
        self._place = layer, direction, kind
        self._init = init
        self._grad_req: GradReq = "write"
        self.short_name = f"{'lr'[direction]}{layer}_{kind}"
        self.name = prefix + self.short_name

    def __repr__(self) -> str:
        return f"Parameter {self.name} (shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, with 0 for an input size that is not known yet."""
        layer, _, kind = self._place
        shape = self._store.spec.layout.entry(*self._place).shape
        return shape if self._store.known or layer or kind != "i2h_weight" else (shape[0], 0)

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"float64"``."""
        return self._store.spec.dtype

    @property
    def grad_req(self) -> GradReq:
        """What backward does with its gradient: ``"write"``, ``"add"`` (to what :meth:`grad` holds) or ``"null"``."""
        return self._grad_req

    @grad_req.setter
    def grad_req(self, value: GradReq) -> None:
        if value not in GRAD_REQS:
            raise ValueError(f"grad_req must be one of {', '.join(GRAD_REQS)}; got {value!r}")
        self._grad_req = value

    def data(self) -> Array:
        """The array that the layer computes with, no copy: what is written into it counts from the next call on.

        Raises:
            ValueError: If it has no values yet.
        """
        return self._store.spec.layout.view(self._store.vector(self.name), *self._place)

    def set_data(self, data: Array) -> None:
        """Overwrite the values.

        Raises:
            TypeError: If ``data`` is no NumPy array of the parameter's dtype.
            ValueError: If it has another shape, or the parameter has no values yet.
        """
        into = self.data()
        _put_values(into, data, self.name, False)

    def grad(self) -> Array:
        """The array that backward writes or adds its gradient to, zero before.

        Raises:
            ValueError: If ``grad_req`` is ``"null"``, or it has no values yet.
        """
        if self._grad_req == "null":
            raise ValueError(f"grad_req of {self.name} must be 'write' or 'add' for it to have a gradient; got 'null'")
        self._store.vector(self.name)
        return self._store.spec.layout.view(self._store.gradients(), *self._place)

    def zero_grad(self) -> None:
        """Clear the gradient, if it has one."""
        if self._grad_req != "null" and self._store.grads is not None:
            self.grad()[...] = 0

    def fill(self, flat: Array, default: Initializer, rng: np.random.Generator) -> None:
        """Write into its part of ``flat`` what its own initializer gives, or else the default; for a bias, zero."""
        init = self._init
        if init is None:
            init = "zeros" if self._place[2].endswith("bias") else default
        fill(self._store.spec.layout.view(flat, *self._place), init, rng, self.name)

    def deliver(self, flat: Array) -> None:
        """Take its own out of the gradients of all, as it asks for them."""
        if self._grad_req != "null":
            gradient = self._store.spec.layout.view(flat, *self._place)
            write_or_add(self.grad(), gradient, self._grad_req == "add")


class ParameterDict(dict[str, Parameter]):
    """A layer's parameters by full name.

    Attributes:
        prefix: The layer's.
        store: The vectors in which they and their gradients lie.
    """

    def __init__(self, prefix: str, store: Store, initializers: Mapping[str, Initializer]) -> None:
        super().__init__()
        self.prefix, self.store = prefix, store
        for entry in store.spec.layout:
            place = entry.layer, entry.direction, entry.kind
            one = Parameter(store, prefix, *place, initializers[entry.kind])
            self[one.name] = one

    def setattr(self, name: str, value: GradReq) -> None:
        """Set ``grad_req`` of all.

        Raises:
            ValueError: If ``name`` is another attribute, or ``value`` no request.
        """
        if name != "grad_req":
            raise ValueError(f"name must be 'grad_req'; got {name!r}")
        for one in self.values():
            one.grad_req = value

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for one in self.values():
            one.zero_grad()

    def initialize(self, init: Initializer = "uniform", force_reinit: bool = False, seed: int | None = None) -> None:
        """Give all parameters values: now, or once the first call has said the input size.

        Args:
            init: For weights that have no initializer of their own: ``"zeros"``, ``"ones"``, ``"uniform"`` (±0.07),
                ``"normal"`` (0.01), ``"xavier"``, ``"orthogonal"``, ``"lstmbias"``, a number, or a function of the
                shape and a ``numpy.random.Generator``. Biases without one become zero.
            force_reinit: Whether to overwrite values that are there.
            seed: For the generator; None for another one each time.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If there are values and ``force_reinit`` is False, or an initializer does not fit.
        """
        if self.store.flat is not None and not force_reinit:
            raise ValueError(f"force_reinit must be True to overwrite the values that {self.prefix!r} has; got False")
        init = checked("init", init)
        if init is None:
            raise TypeError("init must be an initializer; got None")
        self.store.waiting = init, np.random.default_rng(seed)
        if self.store.known:
            self.settle(self.store.spec.input_size)

    def settle(self, input_size: int) -> Array:
        """The parameters of a layer that is called with inputs of that size, initialized if they wait for it."""
        store = self.store
        if store.waiting is not None:
            (init, rng), store.waiting = store.waiting, None
            before = store.spec, store.known
            store.settle(input_size)
            flat = np.empty(store.spec.layout.size, store.spec.dtype)
            try:
                for one in self.values():
                    one.fill(flat, init, rng)
            except BaseException:
                store.spec, store.known = before
                raise
            if store.flat is None:
                store.flat = flat
            else:
                store.flat[...] = flat
        return store.vector(f"parameters of {self.prefix!r}")

    def load(self, arrays: Mapping[str, Array], missing: bool, cast: bool) -> None:
        """Overwrite the values of those that there are arrays for, by short name; all, unless some may be missing."""
        store = self.store
        absent = [one.name for one in self.values() if one.short_name not in arrays]
        if absent and not missing:
            raise ValueError(f"params must hold every parameter; missing {', '.join(absent)}")
        if absent and store.flat is None:
            raise ValueError(f"params must hold {', '.join(absent)}, which have no values yet")
        first = arrays.get("l0_i2h_weight")
        known, spec = store.known, store.spec
        if not known and isinstance(first, np.ndarray) and first.ndim == 2 and first.shape[1]:
            spec = replace(spec, input_size=first.shape[1])
        # Into a copy: if one array is wrong, none has been taken.
        flat = np.empty(spec.layout.size, spec.dtype) if store.flat is None else store.flat.copy()
        for entry in spec.layout:
            if entry.name in arrays:
                into = spec.layout.view(flat, entry.layer, entry.direction, entry.kind)
                _put_values(into, arrays[entry.name], self.prefix + entry.name, cast)
        if store.flat is None:
            store.spec, store.known, store.flat, store.waiting = spec, True, flat, None
        else:
            store.flat[...] = flat

    def requests(self) -> GradReq | None:
        """What all ask for, or None if some ask for something else."""
        asked = {one.grad_req for one in self.values()}
        return asked.pop() if len(asked) == 1 else None


def _put_values(into: Array, data: object, name: str, cast: bool) -> None:
    if not isinstance(data, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array; got {type(data).__name__}")
    if data.shape != into.shape:
        raise ValueError(f"{name} must have shape {into.shape}; got {data.shape}")
    if data.dtype != into.dtype and not (cast and data.dtype.kind == "f"):
        raise TypeError(f"{name} must have dtype {into.dtype}; got {data.dtype}")
    into[...] = data


def short_names(params: Mapping[str, Any], own: Sequence[str], prefix: str, given_prefix: str) -> dict[str, str]:
    """By the short name of each parameter, the key in ``params`` under which it is.

    A key may be the full name, the short one, or what ``Block.save_parameters`` writes, all behind ``given_prefix``.
    """
    both_ways = any(name.startswith("r") for name in own)
    found: dict[str, str] = {}
    for name in own:
        side, layer, kind = name[0], *name[1:].split("_", 1)
        saved = f"_unfused.{layer}.{side}_cell.{kind}" if both_ways else f"_unfused.{layer}.{kind}"
        names = [given_prefix + key for key in dict.fromkeys((prefix + name, name, saved))]
        keys = [key for key in names if key in params]
        if len(keys) > 1:
            raise ValueError(f"params must hold {name} once; got {' and '.join(keys)}")
        if keys:
            found[name] = keys[0]
    return found
