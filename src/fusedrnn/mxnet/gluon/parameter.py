"""A layer's parameters by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import GRAD_REQS, GradReq, write_or_add
from fusedrnn.layout import Parameter as LayoutEntry
from fusedrnn.mxnet.gluon.initializers import Initializer, check_initializer, fill
from fusedrnn.mxnet.gluon.store import LOCK, RUNNING, Deferred, ParameterStore
from fusedrnn.op import validation
from fusedrnn.scalars import as_bool, check_choice
from fusedrnn.spec import RNNSpec


class Parameter:
    """One weight or bias of a layer.

    Attributes:
        name: Its full name, ``lstm0_l0_i2h_weight``.
        short_name: The name without the layer's prefix.
        init: Its own initializer; None for the argument of :meth:`ParameterDict.initialize`.
    """

    def __init__(self, store: ParameterStore, prefix: str, entry: LayoutEntry, init: Initializer) -> None:
        self._store = store
        self._key = entry.layer, entry.direction, entry.kind
        self._grad_req: GradReq = "write"
        self.short_name = entry.name
        self.name = prefix + entry.name
        self.init = "zeros" if init is None and entry.kind.endswith("bias") else init

    def __repr__(self) -> str:
        return f"Parameter {self.name} (shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, with 0 for an input size that is not known yet."""
        layer, _, kind = self._key
        shape = self._store.spec.layout.entry(*self._key).shape
        return shape if self._store.input_size_known or layer or kind != "i2h_weight" else (shape[0], 0)

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"float64"``."""
        return self._store.spec.dtype

    @property
    def grad_req(self) -> GradReq:
        """What backward does with its gradient: ``"write"``, ``"add"`` (to what :meth:`grad` holds) or ``"null"``.

        A change clears the gradient.
        """
        return self._grad_req

    @grad_req.setter
    def grad_req(self, value: GradReq) -> None:
        grad_req = check_choice("grad_req", value, GRAD_REQS)
        if grad_req != self._grad_req:
            self._grad_req = grad_req
            self.zero_grad()

    def data(self) -> Array:
        """The array that the layer computes with. It is not a copy: the next call uses what is written into it.

        Raises:
            ValueError: If the parameter has no values yet.
        """
        return self._view(self._store.vector(self.name))

    def _view(self, flat: Array) -> Array:
        """Its part of a flat vector."""
        return self._store.spec.layout.view(flat, *self._key)

    def set_data(self, data: Array) -> None:
        """Overwrite the values.

        Raises:
            TypeError: If ``data`` is not a NumPy array of the parameter's dtype.
            ValueError: If it has another shape, or the parameter has no values yet.
        """
        values = self.data()
        values[...] = validation.check_array(self.name, data, self._store.spec, values.shape)

    def grad(self) -> Array:
        """The array to which backward writes or adds the gradient; initially zero.

        Raises:
            ValueError: If ``grad_req`` is ``"null"``, or the parameter has no values yet.
        """
        if self._grad_req == "null":
            raise ValueError(f"grad_req of {self.name} must be 'write' or 'add' for it to have a gradient; got 'null'")
        self._store.vector(self.name)
        return self._view(self._store.gradients())

    def zero_grad(self) -> None:
        """Clear the gradient, if it has one."""
        if self._grad_req != "null" and self._store.grads is not None:
            self.grad()[...] = 0

    def store_grad(self, flat: Array) -> None:
        """Write or add its part of a flat gradient vector, by its ``grad_req``."""
        if self._grad_req != "null":
            write_or_add(self.grad(), self._view(flat), self._grad_req == "add")


class Parameters(dict[str, Parameter]):
    """Parameters of a layer by full name."""

    def setattr(self, name: str, value: GradReq) -> None:
        """Set ``grad_req`` of all parameters.

        Raises:
            TypeError: If ``value`` is not a string.
            ValueError: If ``name`` is another attribute, or ``value`` is not a grad_req.
        """
        if name != "grad_req":
            raise ValueError(f"name must be 'grad_req'; got {name!r}")
        for parameter in self.values():
            parameter.grad_req = value

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for parameter in self.values():
            parameter.zero_grad()


class ParameterDict(Parameters):
    """All parameters of a layer by full name.

    Attributes:
        prefix: The prefix of the full names.
        store: The vectors that hold them and their gradients.
    """

    def __init__(self, prefix: str, store: ParameterStore, initializers: Mapping[str, Initializer]) -> None:
        super().__init__()
        self.prefix, self.store = prefix, store
        for entry in store.spec.layout:
            self[prefix + entry.name] = Parameter(store, prefix, entry, initializers[entry.kind])

    def initialize(self, init: Initializer = "uniform", force_reinit: bool = False, seed: int | None = None) -> None:
        """Initialize all parameters, now or, if the input size is not known yet, at the first call. Clears gradients.

        Args:
            init: The initializer of weights that have none of their own: ``"zeros"``, ``"ones"``, ``"uniform"``
                (±0.07), ``"normal"`` (0.01), ``"xavier"``, ``"orthogonal"``, ``"lstmbias"``, a number, or a function of
                the shape and a ``numpy.random.Generator``. Biases without an initializer become zero.
            force_reinit: Whether to overwrite existing values.
            seed: The seed of the generator, from 0 to 2**64 - 1; None for a different seed at each call.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If there are values, or loaded values that wait for the input size, and ``force_reinit`` is
                False; or an initializer does not fit.
        """
        with LOCK:
            self._initialize(init, as_bool("force_reinit", force_reinit), seed)

    def _initialize(self, init: Initializer, force_reinit: bool, seed: int | None) -> None:
        store = self.store
        has_values = store.flat is not None or (store.deferred is not None and store.deferred.loaded)
        if has_values and not force_reinit:
            raise ValueError(f"force_reinit must be True to overwrite the values that {self.prefix!r} has; got False")
        init = check_initializer("init", init)
        if init is None:
            raise TypeError("init must be an initializer; got None")
        deferred = Deferred(init, validation.check_seed(seed), {})
        if store.input_size_known:
            store.set_vector(store.spec, self._initial(store.spec, deferred))
            self.zero_grad()
        else:
            store.deferred = deferred

    def for_call(self, input_size: int, deferred: Deferred | None) -> tuple[RNNSpec, Array]:
        """The spec and the flat vector for a call with inputs of that size.

        If there is a deferred initialization, it has run, but the caller has to store its values if the call succeeds.
        """
        store = self.store
        # If an initializer makes the call, there are no values yet: an error.
        if deferred is None or store in RUNNING.stores:
            return store.spec, store.vector(f"parameters of {self.prefix!r}")
        spec = store.spec_for(input_size)
        RUNNING.stores.append(store)
        try:
            return spec, self._initial(spec, deferred)
        finally:
            RUNNING.stores.pop()

    def _initial(self, spec: RNNSpec, deferred: Deferred) -> Array:
        """A flat vector of initial values."""
        rng = np.random.default_rng(deferred.seed)
        flat = np.empty(spec.layout.size, spec.dtype)
        views = spec.layout.unpack(flat)
        for parameter in self.values():
            init = deferred.init if parameter.init is None else parameter.init
            fill(views[parameter.short_name], init, rng, parameter.name)
        for name, array in deferred.loaded.items():
            views[name][...] = array
        return flat

    def matching(self, select: object) -> Parameters:
        """The parameters that a regular expression selects. See :meth:`RNNLayer.collect_params`."""
        if not isinstance(select, str):
            raise TypeError(f"select must be a string or None; got {select!r}")
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(f"select must be a regular expression; got {select!r}: {error}") from None
        return Parameters({name: parameter for name, parameter in self.items() if pattern.match(name)})

    def load(self, params: Mapping[str, Array], prefix: str, missing: bool, extra: bool, cast: bool) -> None:
        """Overwrite values; if there is an error, no value changes. See :meth:`RNNLayer.load_parameters`."""
        store, deferred, keys = self.store, self.store.deferred, self._keys(params, prefix)
        if not extra and (others := sorted(map(str, set(params) - set(keys.values())))):
            raise ValueError(f"params must hold no others unless ignore_extra is True; got {', '.join(others)}")
        absent = [parameter.name for parameter in self.values() if parameter.short_name not in keys]
        if absent and not missing:
            raise ValueError(f"params must hold every parameter; missing {', '.join(absent)}")
        if absent and store.flat is None and deferred is None:
            raise ValueError(f"params must hold {', '.join(absent)}, which have no values yet")
        arrays = {name: params[key] for name, key in keys.items()}
        first = next((arrays[name] for name in ("l0_i2h_weight", "r0_i2h_weight") if name in arrays), None)
        spec = store.spec
        if isinstance(first, np.ndarray) and first.ndim == 2 and first.shape[1]:
            spec = store.spec_for(first.shape[1])
        loaded = self._copies(arrays, spec, cast)
        if store.flat is not None:
            for name, array in loaded.items():
                self[self.prefix + name].data()[...] = array
        elif deferred is None or not absent:
            store.set_vector(spec, spec.layout.pack(loaded))
        else:
            deferred = deferred._replace(loaded={**deferred.loaded, **loaded})
            if store.input_size_known or first is not None:
                store.set_vector(spec, self._initial(spec, deferred))
            else:
                store.deferred = deferred

    def _copies(self, arrays: Mapping[str, Array], spec: RNNSpec, cast: bool) -> dict[str, Array]:
        """Copies of arrays by short name, checked and, if ``cast``, converted."""
        shapes = {entry.name: entry.shape for entry in spec.layout}
        copies = {}
        for name, array in arrays.items():
            if cast and isinstance(array, np.ndarray) and array.dtype.kind == "f":
                array = array.astype(spec.dtype)
            copies[name] = validation.check_array(self.prefix + name, array, spec, shapes[name]).copy()
        return copies

    def _keys(self, params: Mapping[str, Array], prefix: str) -> dict[str, str]:
        """By short name, each parameter's key in ``params``: a prefix, then its full name, short name or block name."""
        keys: dict[str, str] = {}
        for entry in self.store.spec.layout:
            names = dict.fromkeys((self.prefix + entry.name, entry.name, self.block_name(entry)))
            present = [key for key in (prefix + name for name in names) if key in params]
            if len(present) > 1:
                raise ValueError(f"params must hold {entry.name} once; got {' and '.join(present)}")
            if present:
                keys[entry.name] = present[0]
        return keys

    def block_name(self, entry: LayoutEntry) -> str:
        """The name by which ``Block.save_parameters`` saves a parameter."""
        cell = f"{'lr'[entry.direction]}_cell." if self.store.spec.bidirectional else ""
        return f"_unfused.{entry.layer}.{cell}{entry.kind}"

    def common_grad_req(self) -> GradReq | None:
        """The grad_req that all parameters share, or None if they differ."""
        grad_reqs = {parameter.grad_req for parameter in self.values()}
        return grad_reqs.pop() if len(grad_reqs) == 1 else None
