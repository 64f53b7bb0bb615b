"""The symbols of a network's jobs: those of its layers, expressed by those of the whole call.

A symbol of the call that belongs to a layer has the layer's number in its name: ``1 h0``. The other symbols are those
of :mod:`fusedrnn.engines.cpu.launch.kernel_args`, for the arrays of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.launch.chain_args import Link
from fusedrnn.engines.cpu.launch.kernel_args import Relocation, state_symbols
from fusedrnn.lazy import cached_property
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.runtime.buffers import pad_against_conflicts

_WEIGHTS, _SEED = "weights {}", "seed {}"
_SHARED = "spins", "resets", "add_params", "add_states", "workspace", "args"


@dataclass(frozen=True)
class NetworkLinks:
    """What the links of a call depend on.

    Attributes:
        spec: The network.
        steps, batch: T and N.
        backward: Whether the call is backward.
        packed: Whether the weights of each layer are packed.
        in_place: Whether unpacked weights are read where the caller has them; else each layer has a copy of its own.
        reserves: Where the reserve of each layer begins; empty in inference.
    """

    spec: NetworkSpec
    steps: int
    batch: int
    backward: bool
    packed: tuple[bool, ...]
    in_place: bool
    reserves: tuple[int, ...]

    def symbols(self) -> list[str]:
        """The symbols of the call; those of :meth:`given_symbols` come last."""
        names = ("dy", "dx") if self.backward else ("x", "y")
        arrays = [name + end for name in names for end in ("", "_step", "_row")]
        forms = ("d{}_n", "d{}0", "d{}_reset") if self.backward else ("{}0", "{}_n", "{}_reset")
        layers = range(len(self.spec.layers))
        states = [
            self.of_layer(index, symbol) for index in layers for symbol in state_symbols(self._letters(index), *forms)
        ]
        every = state_symbols(self._letters(-1), "dall_{}" if self.backward else "all_{}")
        return [
            "nothing", *_SHARED, "params", "dparams", "add_x", "dx_partials", "reserve", *arrays, *states, *every,
            *(f"tables {index}" for index in layers), *self.given_symbols(),
        ]  # fmt: skip

    def given_symbols(self) -> list[str]:
        """The symbols whose values a cached call gives: the weights of each layer, packed or a copy, then the seeds."""
        return [form.format(index) for form in (_WEIGHTS, _SEED) for index in range(len(self.spec.layers))]

    @staticmethod
    def of_layer(index: int, symbol: str) -> str:
        """The symbol of a layer's own array."""
        return f"{index} {symbol}"

    def _letters(self, index: int) -> str:
        return state_letters(len(self.spec.layers[index].state_names))

    def link(self, index: int, symbol: str) -> Link:
        """The link of a symbol of a layer's job."""
        last = len(self.spec.layers) - 1
        if symbol in _SHARED:
            return Relocation(symbol)
        if symbol == "reserve":
            return Relocation(symbol, self.reserves[index]) if self.reserves else 0
        if symbol in ("seed", "tables"):
            return Relocation(f"{symbol} {index}")
        if symbol == "add_x":
            return 0 if index else Relocation(symbol)
        if symbol == "dx_partials":  # all layers but the first compute the gradient of their input in any case
            return Relocation("workspace" if index else symbol)
        if symbol.startswith(("all_", "dall_")):
            return Relocation(symbol) if index == last else 0
        name, _, _ = symbol.partition("_")
        if name in ("x", "dx"):
            return Relocation(symbol) if index == 0 else self._between(index - 1, symbol)
        if name in ("y", "dy"):
            return Relocation(symbol) if index == last else self._between(index, symbol)
        return self._parameters(index, symbol)

    def _parameters(self, index: int, symbol: str) -> Link:
        """The link of a symbol of parameters, of their gradients or of states."""
        layer, weights = self.spec.layers[index], _WEIGHTS.format(index)
        if symbol == "weights":
            return Relocation(weights) if self.packed[index] else 0
        prefix, _, name = symbol.rpartition(" ")
        offset = self._param_offsets[index].get(name)
        if offset is not None:
            begin = self.spec.layout.parts[index].start * np.dtype(layer.dtype).itemsize
            if not prefix:
                return Relocation("dparams", begin + offset)
            if self.packed[index]:
                return 0
            return Relocation("params", begin + offset) if self.in_place else Relocation(weights, offset)
        states = state_symbols(self._letters(index), "{}0", "{}_n", "{}_reset", "d{}_n", "d{}0", "d{}_reset")
        # No layer has packed sequences; "params", "dparams" and "nothing" have no fields.
        return Relocation(self.of_layer(index, symbol)) if symbol in states else 0

    @cached_property
    def _param_offsets(self) -> list[dict[str, int]]:
        """Where each parameter of a layer is in the layer's vector, in bytes."""
        item = np.dtype(self.spec.dtype).itemsize
        return [{entry.name: entry.offset * item for entry in layer.layout} for layer in self.spec.layers]

    def _rows(self, index: int) -> int:
        """Bytes from one row to the next in the output that a layer passes to the layer above."""
        layer = self.spec.layers[index]
        return pad_against_conflicts(layer.output_size * np.dtype(layer.dtype).itemsize)

    def _between(self, index: int, symbol: str) -> Link:
        """The link of the output of a layer, or of its gradient: layers take turns with two arrays."""
        if symbol.endswith("_row"):
            return self._rows(index)
        if symbol.endswith("_step"):
            return self._rows(index) * self.batch
        return Relocation("between", index % 2 * (self.between_bytes() // 2))

    def between_bytes(self) -> int:
        """Bytes of what layers pass to one another."""
        rows: Sequence[int] = [self._rows(index) for index in range(len(self.spec.layers) - 1)]
        return 2 * self.steps * self.batch * max(rows, default=0)
