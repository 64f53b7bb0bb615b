"""The description of a network whose layers differ: a chain of RNNs, each reading the output of the previous one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.cells import Cell
from fusedrnn.layout import FlatLayout, Parameter
from fusedrnn.lazy import cached_property
from fusedrnn.scalars import check_choice, positive_int, probability, shown
from fusedrnn.spec import RESIDUALS, RNNSpec

_SEED_STEP = 0x9E3779B97F4A7C15
"""The golden ratio of 2**64, so that layers of networks with adjacent seeds have different seeds."""


class NetworkLayout(FlatLayout):
    """The flat parameter vector of a network: the vectors of its layers, one after the other.

    The names of a layer's parameters begin with its number: ``layers.0.l0_i2h_weight``, or by PyTorch's names
    ``layers.0.weight_ih_l0``. Iteration yields every :class:`fusedrnn.layout.Parameter` in the order of the vector,
    with its offset in the whole vector.
    """

    def __init__(self, layers: Sequence[RNNSpec]) -> None:
        self.dtype = layers[0].dtype
        self._layers = tuple(layers)
        ends = np.cumsum([0, *(layer.layout.size for layer in layers)]).tolist()
        self.size: int = ends[-1]
        self.parts: tuple[slice, ...] = tuple(slice(begin, end) for begin, end in pairwise(ends))
        """The part of each layer in the vector."""

    def __iter__(self) -> Iterator[Parameter]:
        for index, (layer, part) in enumerate(zip(self._layers, self.parts, strict=True)):
            for entry in layer.layout:
                name, torch_name = (f"layers.{index}.{name}" for name in (entry.name, entry.torch_name))
                yield replace(entry, name=name, torch_name=torch_name, offset=part.start + entry.offset)

    def __len__(self) -> int:
        return sum(len(layer.layout) for layer in self._layers)

    def split(self, params: Array) -> tuple[Array, ...]:
        """The vector of each layer, as views of the flat vector ``params``."""
        self._check_flat(params)
        return tuple([params[part] for part in self.parts])


@dataclass(frozen=True)
class NetworkSpec:
    """A network of layers that differ in size, cell or options.

    Attributes:
        layers: The chain. Each entry is an :class:`RNNSpec` of one or more equal layers, whose input is the output of
            the previous entry. All have the same dtype.

    Raises:
        TypeError: If ``layers`` is not a sequence of RNNSpecs.
        ValueError: If there is none, or if one does not fit the previous one; the message names both sizes.

    Example:
    >>> from fusedrnn import NetworkSpec, RNNSpec
    >>> spec = NetworkSpec([RNNSpec("lstm", 40, 64, bidirectional=True), RNNSpec("gru", 128, 32)])
    >>> spec.input_size, spec.output_size, spec.layout.size
    (40, 32, 70336)
    """

    layers: tuple[RNNSpec, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence):
            raise TypeError(f"layers must be a sequence of RNNSpecs; got {type(self.layers).__name__}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers must have at least one RNNSpec; got none")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RNNSpec):
                raise TypeError(f"layers[{index}] must be an RNNSpec; got {type(layer).__name__}")
        for index, (before, layer) in enumerate(pairwise(self.layers), 1):
            if layer.input_size != before.output_size:
                raise ValueError(
                    f"layers[{index}]: input_size must be the output size of layers[{index - 1}] "
                    f"({before.output_size}); got {layer.input_size}"
                )
            if layer.dtype != before.dtype:
                raise ValueError(
                    f"layers[{index}]: dtype must be that of layers[0] ({before.dtype}); got {layer.dtype}"
                )

    @classmethod
    def stack(
        cls,
        mode: str | Cell,
        input_size: int,
        hidden_sizes: Sequence[int],
        *,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        residual: str | None = None,
        **options: Any,
    ) -> NetworkSpec:
        """A stack of layers of one cell with a list of hidden sizes.

        Adjacent layers that are equal form one :class:`RNNSpec`: ``hidden_sizes=(64, 64, 32)`` has two entries, and the
        first has two layers. This does not change the results.

        Args:
            mode: The cell, as in :class:`RNNSpec`.
            input_size: I, the features of the first layer's input.
            hidden_sizes: H of each layer.
            dropout: Probability in [0, 1) with which training drops elements between layers.
            input_dropout: Probability in [0, 1) with which training drops elements of the input of the first layer.
            residual: What each layer adds to its output. None is for nothing. ``"identity"`` is for its input, in the
                layers whose input has the size of the output; there must be such a layer. ``"projection"`` is the same
                in these layers, and a projection of the input in the others.
            **options: The other options of :class:`RNNSpec`, the same for all layers.

        Raises:
            TypeError: If an argument has the wrong type, or there is no such option.
            ValueError: If an argument has an invalid value.

        Example:
        >>> spec = NetworkSpec.stack("lstm", input_size=64, hidden_sizes=(512, 256, 128), bidirectional=True)
        >>> [(layer.input_size, layer.hidden_size) for layer in spec.layers]
        [(64, 512), (1024, 256), (512, 128)]
        """
        sizes = _checked_sizes(hidden_sizes)
        for name in ("num_layers", "hidden_size"):
            if name in options:
                raise TypeError(f"{name} must not be given: hidden_sizes has an entry for each layer")
        probability("dropout", dropout)
        probability("input_dropout", input_dropout)
        if residual is not None:
            check_choice("residual", residual, RESIDUALS)
        RNNSpec(mode, input_size, max(sizes), **options)  # errors that have nothing to do with one layer's size
        layers: list[RNNSpec] = []
        for hidden_size, run in groupby(enumerate(sizes), lambda entry: entry[1]):
            numbers = [number for number, _ in run]
            size = layers[-1].output_size if layers else input_size
            dropped = dropout if layers else input_dropout
            try:
                layer = RNNSpec(
                    mode, size, hidden_size, len(numbers), dropout=dropout, input_dropout=dropped, **options
                )
                layers += _with_residual(layer, residual)
            except ValueError as error:
                raise ValueError(f"hidden_sizes[{numbers[0]}] of {hidden_size}: {error}") from None
        if residual is not None and not any(layer.residual for layer in layers):
            raise ValueError(
                "residual='identity' needs a layer whose input has the size of its output; "
                f"got input_size={input_size} and outputs of {', '.join(str(layer.output_size) for layer in layers)}"
            )
        return cls(tuple(layers))

    @property
    def input_size(self) -> int:
        """I, the features of the first layer's input."""
        return self.layers[0].input_size

    @property
    def output_size(self) -> int:
        """The features of the last layer's output at each step."""
        return self.layers[-1].output_size

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"float64"``."""
        return self.layers[0].dtype

    @cached_property
    def drops(self) -> bool:
        """Whether training draws random numbers."""
        return any(layer.drops for layer in self.layers)

    def state_shape(self, batch: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """:meth:`RNNSpec.state_shape` for each entry of the chain."""
        return tuple(layer.state_shape(batch) for layer in self.layers)

    @cached_property
    def state_slices(self) -> tuple[slice, ...]:
        """Where the states of each entry are in a flat tuple of all states."""
        ends = accumulate((len(layer.state_names) for layer in self.layers), initial=0)
        return tuple([slice(begin, end) for begin, end in pairwise(ends)])

    def flops(self, steps: int, batch: int, *, training: bool = False) -> int:
        """Floating-point operations of the GEMMs, as :meth:`RNNSpec.flops` counts them."""
        return sum(layer.flops(steps, batch, training=training) for layer in self.layers)

    def layer_seeds(self, seed: int) -> tuple[int, ...]:
        """The seed of each entry of the chain in a training call with ``seed``; the first entry has ``seed`` itself."""
        return tuple([(seed + index * _SEED_STEP) % 2**64 for index in range(len(self.layers))])

    @cached_property
    def layout(self) -> NetworkLayout:
        """The position of each weight and bias in the flat parameter vector."""
        return NetworkLayout(self.layers)


def _with_residual(layer: RNNSpec, residual: str | None) -> list[RNNSpec]:
    """Equal layers with the residual connections of a stack. The first is separate if only it projects its input."""
    fits = layer.input_size == layer.output_size
    if residual is None or fits:
        return [replace(layer, residual=residual and "identity")]
    if residual != "projection":
        return [replace(layer, residual=residual) if layer.num_layers > 1 else layer]
    first = replace(layer, num_layers=1, residual=residual)
    if layer.num_layers == 1:
        return [first]
    rest = replace(
        layer, input_size=layer.output_size, num_layers=layer.num_layers - 1, input_dropout=layer.dropout,
        residual="identity",
    )  # fmt: skip
    return [first, rest]


def _checked_sizes(hidden_sizes: object) -> list[int]:
    """The hidden sizes if they are a sequence of at least one size."""
    if isinstance(hidden_sizes, str) or not isinstance(hidden_sizes, Sequence):
        raise TypeError(f"hidden_sizes must be a sequence of integers, one for each layer; got {shown(hidden_sizes)}")
    if not hidden_sizes:
        raise ValueError("hidden_sizes must have a size for each layer; got none")
    return [positive_int(f"hidden_sizes[{index}]", size) for index, size in enumerate(hidden_sizes)]
