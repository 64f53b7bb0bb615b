"""The layout of the flat parameter vector: where each parameter of an RNN is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike

from fusedrnn.arrays import Array, check_is_array, is_masked
from fusedrnn.lazy import cached_property
from fusedrnn.scalars import check_choice

Naming = Literal["mxnet", "torch"]
Kind = str
"""A kind of parameter: ``"i2h_weight"``, ``"h2h_weight"``, ``"h2r_weight"``, ``"peephole_weight"``, ``"i2h_bias"``,
``"h2h_bias"``, or the name of a parameter of a user cell."""
Shapes = dict[Kind, tuple[int, ...]]

BIASES = "i2h_bias", "h2h_bias"
_TORCH_NAMES: dict[Kind, str] = {
    "i2h_weight": "weight_ih",
    "h2h_weight": "weight_hh",
    "h2r_weight": "weight_hr",
    "peephole_weight": "weight_ph",
    "i2h_bias": "bias_ih",
    "h2h_bias": "bias_hh",
}


class Spec(Protocol):
    """The properties of an :class:`fusedrnn.spec.RNNSpec` that a layout reads."""

    @property
    def num_layers(self) -> int:
        """L."""

    @property
    def num_directions(self) -> int:
        """D."""

    @property
    def dtype(self) -> str:
        """The type of packed parameters."""

    def parameter_shapes(self, layer: int) -> Shapes:
        """The shapes of the parameters of each direction of a layer, the weights before the biases."""


@dataclass(frozen=True)
class Parameter:
    """One weight or bias: elements ``offset`` to ``offset + size`` of the flat vector, row-major in ``shape``."""

    name: str
    torch_name: str
    layer: int
    direction: int
    kind: Kind
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def view(self, params: Array) -> Array:
        """The parameter in its shape, as a view of the flat vector ``params``."""
        return params[self.offset : self.offset + self.size].reshape(self.shape)


class FlatLayout:
    """The positions of named parameters in one flat vector. Iteration yields every :class:`Parameter` in that order.

    Attributes:
        size: The number of elements of the vector.
        dtype: The type of packed parameters.
    """

    size: int
    dtype: str

    def __iter__(self) -> Iterator[Parameter]:
        raise NotImplementedError

    def __repr__(self) -> str:
        parameters = ", ".join(f"{entry.name} {entry.shape}" for entry in self)
        return f"<{type(self).__name__} of {self.size} elements in {self.dtype}: {parameters}>"

    def _check_flat(self, params: Array) -> None:
        check_is_array("params", params)
        if params.shape != (self.size,):
            raise ValueError(f"params must have shape ({self.size},); got {params.shape}")

    def unpack(self, params: Array, *, names: Naming = "mxnet") -> dict[str, Array]:
        """Views of the flat vector by name.

        ``names="mxnet"`` gives names such as ``l0_i2h_weight`` and ``r0_h2h_bias``: l for forward or r for reverse,
        then the layer. ``names="torch"`` gives names such as ``weight_ih_l0`` and ``bias_hh_l0_reverse``.
        """
        self._check_flat(params)
        return {name: entry.view(params) for name, entry in self._named(names).items()}

    def pack(
        self, arrays: Mapping[str, Array], *, names: Naming = "mxnet", dtype: DTypeLike | None = None
    ) -> Array:
        """The inverse of :meth:`unpack`: a new flat vector, by default of the spec's dtype."""
        flat = np.empty(self.size, dtype or self.dtype)
        expected = self._named(names)
        check_names(expected, arrays)
        for name, entry in expected.items():
            if is_masked(arrays[name]):
                raise TypeError(f"{name} must be an array without a mask; got {type(arrays[name]).__name__}")
            array = np.asarray(arrays[name])
            if array.shape != entry.shape:
                raise ValueError(f"{name} must have shape {entry.shape}; got {array.shape}")
            entry.view(flat)[...] = array
        return flat

    def _named(self, names: Naming) -> dict[str, Parameter]:
        """Every parameter by its name."""
        in_torch = check_choice("names", names, ("mxnet", "torch")) == "torch"
        return {entry.torch_name if in_torch else entry.name: entry for entry in self}


class ParameterLayout(FlatLayout):
    """The flat parameter vector of MXNet and cuDNN: all weights first, then all biases.

    For each layer and direction, the weights are:

    - i2h (G·H, in) and h2h (G·H, S); with heads, h2h is (G·H, H / heads);
    - with a projection, h2r (P, H);
    - in an LSTM with peepholes, the peephole weights of i, f and o (3·H), or of i and o if its gates are coupled (2·H);
    - in a user cell, its vectors (H,) and scalars (1,) by name.

    In a user cell, i2h has rows for the gates with a part from the input, and h2h has rows for the gates of recurrent
    products; without such products there is no h2h. The biases are i2h (G·H) and, with ``bias="double"``, h2h (G·H).
    Gates are stacked by rows in the order of the cell: LSTM i f g o, coupled i g o, GRU r z n. Iteration yields every
    :class:`Parameter` in the order of the vector.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec, self.dtype = spec, spec.dtype
        self.size = 0
        self.kinds: tuple[Kind, ...] = tuple(spec.parameter_shapes(0))
        self._entries: dict[tuple[int, int, Kind], Parameter] = {}
        for are_biases in (False, True):
            for layer in range(spec.num_layers):
                shapes = {kind: s for kind, s in spec.parameter_shapes(layer).items() if (kind in BIASES) == are_biases}
                for direction in range(spec.num_directions):
                    for kind, shape in shapes.items():
                        self._append(layer, direction, kind, shape)

    def _append(self, layer: int, direction: int, kind: Kind, shape: tuple[int, ...]) -> None:
        name = f"{'lr'[direction]}{layer}_{kind}"
        torch_name = f"{_TORCH_NAMES.get(kind, kind)}_l{layer}{'_reverse' if direction else ''}"
        entry = Parameter(name, torch_name, layer, direction, kind, self.size, shape)
        self._entries[layer, direction, kind] = entry
        self.size += entry.size

    @cached_property
    def by_layer_direction(self) -> tuple[Parameter, ...]:
        """For each layer and each direction, its weights and then its biases. PyTorch's modules use this order."""
        return tuple(sorted(self, key=lambda entry: (entry.layer, entry.direction)))

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, kind: Kind) -> bool:
        """Whether there are parameters of that kind."""
        return kind in self.kinds

    def entry(self, layer: int, direction: int, kind: Kind) -> Parameter:
        """The parameter of that layer, direction (0 forward, 1 reverse) and kind."""
        try:
            return self._entries[layer, direction, kind]
        except KeyError:
            raise ValueError(f"no parameter {kind!r} for layer {layer!r}, direction {direction!r}") from None

    def view(self, params: Array, layer: int, direction: int, kind: Kind) -> Array:
        """A view of that parameter in the flat vector ``params``, in its shape."""
        self._check_flat(params)
        return self.entry(layer, direction, kind).view(params)


def check_names(expected: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Refuse arrays whose names are not those of the parameters.

    Raises:
        ValueError: If names are missing or unknown; the message lists them.
    """
    missing, unknown = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
    parts = [f"{kind}: {', '.join(sorted(map(str, names)))}" for kind, names in
             (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
    if parts:
        raise ValueError(f"parameters {'; '.join(parts)}")
