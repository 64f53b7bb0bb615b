"""Where the parameters of an RNN lie in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Kind = Literal["i2h_weight", "h2h_weight", "h2r_weight", "peephole_weight", "i2h_bias", "h2h_bias"]

_TORCH_NAMES: dict[Kind, str] = {
    "i2h_weight": "weight_ih",
    "h2h_weight": "weight_hh",
    "h2r_weight": "weight_hr",
    "peephole_weight": "weight_ph",
    "i2h_bias": "bias_ih",
    "h2h_bias": "bias_hh",
}


@dataclass(frozen=True)
class Parameter:
    """One weight or bias in the flat vector: elements ``offset`` to ``offset + size``, row-major in ``shape``."""

    name: str
    torch_name: str
    layer: int
    direction: int
    kind: Kind
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class ParameterLayout:
    """The flat parameter vector of MXNet and cuDNN: all weights first, then all biases.

    For each layer and direction the weights are i2h (G·H, in), h2h (G·H, S) and, if projected, h2r (P, H), and of an
    LSTM with peepholes those of i, f and o, (3·H), or coupled those of i and o, (2·H); the biases are i2h (G·H) and, if
    double, h2h (G·H). Gates are stacked by rows in the cell's order: LSTM i f g o, coupled i g o, GRU r z n. Iterating
    yields every :class:`Parameter` in the order in which it lies.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec = spec
        self._entries: dict[tuple[int, int, Kind], Parameter] = {}
        self.size = 0
        there: dict[Kind, bool] = {
            "i2h_weight": True,
            "h2h_weight": True,
            "h2r_weight": spec.projection_size is not None,
            "peephole_weight": spec.peepholes,
            "i2h_bias": spec.bias != "none",
            "h2h_bias": spec.bias == "double",
        }
        self.kinds = tuple(kind for kind in there if there[kind])
        weights = [kind for kind in self.kinds if kind.endswith("weight")]
        biases = [kind for kind in self.kinds if kind.endswith("bias")]
        for kinds in (weights, biases):
            for layer in range(spec.num_layers):
                for direction in range(spec.num_directions):
                    for kind in kinds:
                        self._append(layer, direction, kind)

    def _append(self, layer: int, direction: int, kind: Kind) -> None:
        spec = self.spec
        rows = spec.num_gates * spec.hidden_size
        shapes: dict[Kind, tuple[int, ...]] = {
            "i2h_weight": (rows, spec.layer_input_size(layer)),
            "h2h_weight": (rows, spec.state_size),
            "h2r_weight": (spec.state_size, spec.hidden_size),
            "peephole_weight": ((2 if spec.coupled_gates else 3) * spec.hidden_size,),
            "i2h_bias": (rows,),
            "h2h_bias": (rows,),
        }
        name = f"{'lr'[direction]}{layer}_{kind}"
        torch_name = f"{_TORCH_NAMES[kind]}_l{layer}{'_reverse' if direction else ''}"
        entry = Parameter(name, torch_name, layer, direction, kind, self.size, shapes[kind])
        self._entries[layer, direction, kind] = entry
        self.size += entry.size

    @cached_property
    def by_pass(self) -> tuple[Parameter, ...]:
        """For each layer, for each direction: its weights, then its biases; the order of torch's modules."""
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
        """That parameter in its shape, sharing memory with the flat vector ``params``."""
        return self._view(self._check_flat(params), self.entry(layer, direction, kind))

    @staticmethod
    def _view(params: Array, entry: Parameter) -> Array:
        return params[entry.offset : entry.offset + entry.size].reshape(entry.shape)

    def _check_flat(self, params: Array) -> Array:
        if not isinstance(params, np.ndarray):
            raise TypeError(f"params must be a NumPy array; got {type(params).__name__}")
        if params.shape != (self.size,):
            raise ValueError(f"params must have shape ({self.size},); got {params.shape}")
        return params

    def unpack(self, params: Array, *, names: Literal["mxnet", "torch"] = "mxnet") -> dict[str, Array]:
        """Views into the flat vector by name.

        ``names="mxnet"`` gives ``l0_i2h_weight``, ``r0_h2h_bias`` (l forward, r reverse, then the layer);
        ``names="torch"`` gives ``weight_ih_l0``, ``bias_hh_l0_reverse``.
        """
        self._check_flat(params)
        return {self._name(entry, names): self._view(params, entry) for entry in self}

    def pack(
        self,
        arrays: Mapping[str, Array],
        *,
        names: Literal["mxnet", "torch"] = "mxnet",
        dtype: DTypeLike | None = None,
    ) -> Array:
        """The inverse of :meth:`unpack`: a new flat vector, of the spec's dtype unless another is given."""
        flat = np.empty(self.size, dtype or self.spec.dtype)
        expected = {self._name(entry, names): entry for entry in self}
        if missing := expected.keys() - arrays.keys():
            raise ValueError(f"parameters missing: {', '.join(sorted(missing))}")
        if unknown := arrays.keys() - expected.keys():
            raise ValueError(f"parameters unknown: {', '.join(sorted(unknown))}; expected {', '.join(expected)}")
        for name, entry in expected.items():
            array = np.asarray(arrays[name])
            if array.shape != entry.shape:
                raise ValueError(f"{name} must have shape {entry.shape}; got {array.shape}")
            self._view(flat, entry)[...] = array
        return flat

    @staticmethod
    def _name(entry: Parameter, names: str) -> str:
        if names not in ("mxnet", "torch"):
            raise ValueError(f"names must be 'mxnet' or 'torch'; got {names!r}")
        return entry.name if names == "mxnet" else entry.torch_name
