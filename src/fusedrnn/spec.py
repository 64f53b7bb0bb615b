"""The description of an RNN: frozen, hashable and validated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.cell.activations import ACTIVATIONS, Activation
from fusedrnn.cell.cells import FAMILIES, Variant, make_cell
from fusedrnn.layout import ParameterLayout, Shapes
from fusedrnn.scalars import as_float, shown

Array = NDArray[Any]

MODES = tuple(FAMILIES)
DTYPES = ("float32", "float64")
BIASES = ("double", "single", "none")
OPTIONS = (
    "projection_size", "state_clip_min", "reset_after", "peepholes", "coupled_gates", "gate_clip", "activations",
    "bias", "reverse",
)  # fmt: skip
"""The fields beyond the four cells in one or two directions: an engine may lack support for any of them."""
MAX_LAYERS = 4096
"""Each layer takes time and memory before the first call, whatever its sizes."""
MAX_BYTES = 2**48
"""The largest array: the address space of common processors."""


@dataclass(frozen=True)
class RNNSpec:
    """A recurrent network: its cell, its sizes and its options.

    Attributes:
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        input_size: I, at least 1.
        hidden_size: H, at least 1; the parameters must take fewer than 2**48 bytes.
        num_layers: L, from 1 to 4096. Layer l > 0 reads the output of layer l - 1.
        bidirectional: Whether each layer runs over the sequence in both directions and concatenates the outputs.
        dropout: Probability in [0, 1) with which training drops elements between layers. Inference ignores it.
        projection_size: P, the size to which an LSTM projects its output, less than H; None for no projection.
        dtype: ``"float32"`` or ``"float64"``.
        state_clip_min: Lower bound of an LSTM's cell state after each step. Give both bounds or neither.
        state_clip_max: Upper bound, at least the lower one.
        state_clip_nan: Whether clipping also replaces NaN in the cell state by the lower bound, as MXNet does.
        reset_after: Whether a GRU's r multiplies the recurrent product: n = tanh(W x + b + r·(U h + c)), as in cuDNN
            and PyTorch. If False, r multiplies the state: n = tanh(W x + b + U (r·h) + c), as in Cho et al. (2014).
        peepholes: Whether an LSTM's gates see the cell state (Gers and Schmidhuber, 2000): i and f the one before the
            step, o the one after it, each through a weight vector (H,).
        coupled_gates: Whether an LSTM's f is 1 - i: it then has the gates i, g, o.
        gate_clip: Pre-activations are clipped to [-gate_clip, gate_clip]; above 0, or None for no clipping.
        activations: The cell's activations, each an :class:`Activation` or its name: in an LSTM of the gates, of g and
            of the cell state; in a GRU of the gates and of n; in a vanilla RNN of its only sum. None for the defaults.
        bias: ``"double"`` for biases of the input and of the state, ``"single"`` for the input's only, ``"none"``.
        reverse: Whether a network of one direction runs from the end of each sequence to its beginning.

    Raises:
        TypeError: A field has the wrong type; the message names the field, its value and what is expected.
        ValueError: A field has an invalid value; the message likewise.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    projection_size: int | None = None
    dtype: str = "float32"
    state_clip_min: float | None = None
    state_clip_max: float | None = None
    state_clip_nan: bool = False
    reset_after: bool = True
    peepholes: bool = False
    coupled_gates: bool = False
    gate_clip: float | None = None
    activations: tuple[Activation, ...] | None = None
    bias: str = "double"
    reverse: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str):
            raise TypeError(f"mode must be a string, one of {', '.join(MODES)}; got {self.mode!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        for name in ("input_size", "hidden_size", "num_layers"):
            self._set(name, positive_int(name, getattr(self, name)))
        self._set("bidirectional", _bool("bidirectional", self.bidirectional))
        dropout = _number("dropout", self.dropout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1); got {self.dropout!r}")
        self._set("dropout", dropout)
        self._set("dtype", _dtype_name(self.dtype))
        self._check_projection()
        self._check_clip()
        self._check_variant()
        self._check_size()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_projection(self) -> None:
        if self.projection_size is None:
            return
        self._set("projection_size", positive_int("projection_size", self.projection_size))
        if self.mode != "lstm":
            raise ValueError(f"projection_size needs mode 'lstm'; got mode {self.mode!r}")
        if self.projection_size >= self.hidden_size:
            raise ValueError(
                f"projection_size must be smaller than hidden_size ({self.hidden_size}); got {self.projection_size}"
            )

    def _check_clip(self) -> None:
        self._set("state_clip_nan", _bool("state_clip_nan", self.state_clip_nan))
        low, high = self.state_clip_min, self.state_clip_max
        if low is None and high is None:
            if self.state_clip_nan:
                raise ValueError("state_clip_nan needs state_clip_min and state_clip_max; got neither")
            return
        if low is None or high is None:
            missing = "state_clip_min" if low is None else "state_clip_max"
            raise ValueError(f"{missing} must be given when the other bound is; got None")
        if self.mode != "lstm":
            raise ValueError(f"state_clip_min and state_clip_max need mode 'lstm'; got mode {self.mode!r}")
        self._set("state_clip_min", _number("state_clip_min", low))
        self._set("state_clip_max", _number("state_clip_max", high))
        if not cast(float, self.state_clip_min) <= cast(float, self.state_clip_max):
            raise ValueError(f"state_clip_min must not exceed state_clip_max; got {low!r} and {high!r}")

    def _check_size(self) -> None:
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers must be at most {MAX_LAYERS}; got {self.num_layers}")
        features = self.input_size + (self.num_layers - 1) * self.output_size + self.num_layers * (self.state_size + 2)
        elements = self.num_directions * self.num_gates * self.hidden_size * features
        if elements * np.dtype(self.dtype).itemsize >= MAX_BYTES:
            raise ValueError(
                f"input_size, hidden_size and num_layers must make parameters of fewer than {MAX_BYTES} bytes; got "
                f"{self.input_size}, {self.hidden_size} and {self.num_layers}"
            )

    def _check_variant(self) -> None:
        for name, mode, default in (("reset_after", "gru", True), ("peepholes", "lstm", False),
                                  ("coupled_gates", "lstm", False)):  # fmt: skip
            self._set(name, _bool(name, getattr(self, name)))
            if getattr(self, name) != default and self.mode != mode:
                raise ValueError(f"{name}={not default} needs mode {mode!r}; got mode {self.mode!r}")
        if self.gate_clip is not None:
            self._set("gate_clip", _number("gate_clip", self.gate_clip))
            if not self.gate_clip > 0:
                raise ValueError(f"gate_clip must be above 0; got {self.gate_clip!r}")
        self._set("activations", self._checked_activations())
        if not isinstance(self.bias, str):
            raise TypeError(f"bias must be one of {', '.join(BIASES)}; got {self.bias!r}")
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}; got {self.bias!r}")
        self._set("reverse", _bool("reverse", self.reverse))
        if self.reverse and self.bidirectional:
            raise ValueError("reverse must be False in a bidirectional network; got True")

    def _checked_activations(self) -> tuple[Activation, ...] | None:
        default = FAMILIES[self.mode].default.activations
        if self.activations is None:
            return None
        expected = f"{len(default)} of {', '.join(ACTIVATIONS)}"
        if not isinstance(self.activations, (tuple, list)):
            raise TypeError(f"activations must be a tuple of {expected}; got {self.activations!r}")
        activations = tuple(a if isinstance(a, Activation) else Activation(a) for a in self.activations)
        if len(activations) != len(default):
            raise ValueError(f"activations must be {expected} in mode {self.mode!r}; got {len(activations)}")
        return None if activations == default else activations

    @cached_property
    def variant(self) -> Variant:
        """The cell with its options."""
        default = FAMILIES[self.mode].default
        state_clip = None
        if self.state_clip_min is not None and self.state_clip_max is not None:
            state_clip = self.state_clip_min, self.state_clip_max, self.state_clip_nan
        return replace(
            default,
            activations=self.activations or default.activations,
            reset_after=self.reset_after,
            peepholes=self.peepholes,
            coupled_gates=self.coupled_gates,
            gate_clip=self.gate_clip,
            state_clip=state_clip,
            projects=self.projection_size is not None,
        )

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """The gates in the order in which weights stack them."""
        return make_cell(self.variant).gates

    @property
    def num_directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def num_gates(self) -> int:
        """G, the gates of the cell: 4 in an LSTM (3 if coupled), 3 in a GRU, 1 in a vanilla RNN."""
        return len(self.gates)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states of the cell: ``("h",)`` or ``("h", "c")``."""
        return FAMILIES[self.mode].states

    @property
    def state_size(self) -> int:
        """S, the size of the output of one direction: P with a projection, else H."""
        return self.projection_size or self.hidden_size

    @property
    def output_size(self) -> int:
        """D·S, the features of the output at each step."""
        return self.num_directions * self.state_size

    @property
    def drops(self) -> bool:
        """Whether training applies dropout: only between layers."""
        return self.dropout > 0 and self.num_layers > 1

    def layer_input_size(self, layer: int) -> int:
        """The features that a layer reads at each step: I in layer 0, D·S in the others."""
        return self.input_size if layer == 0 else self.output_size

    def asks_for(self, option: str) -> bool:
        """Whether one of :data:`OPTIONS` differs from its default."""
        return bool(getattr(self, option) != type(self).__dataclass_fields__[option].default)

    def reverses(self, direction: int) -> bool:
        """Whether direction 0 or 1 runs from the end of each sequence to its beginning."""
        return direction == 1 or self.reverse

    def state_shape(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """The shape (L·D, N, size) of each state for N sequences; the first index is layer·D + direction."""
        rows = self.num_layers * self.num_directions
        return tuple((rows, batch, self.size_of(name)) for name in self.state_names)

    def size_of(self, state: str) -> int:
        """The elements of a state: S of ``"h"``, H of ``"c"``."""
        return self.state_size if state == "h" else self.hidden_size

    def flops(self, steps: int, batch: int, *, training: bool = False) -> int:
        """Floating-point operations of the GEMMs of T steps of N sequences; training counts three times forward."""
        columns = sum(self.layer_input_size(layer) + self.state_size for layer in range(self.num_layers))
        weights = self.num_gates * self.hidden_size * columns
        weights += self.num_layers * self.hidden_size * (self.projection_size or 0)
        forward = 2 * steps * batch * self.num_directions * weights
        return forward * 3 if training else forward

    def parameter_shapes(self, layer: int) -> Shapes:
        """The shapes of the parameters of each direction of a layer, the weights before the biases."""
        rows = self.num_gates * self.hidden_size
        shapes: Shapes = {
            "i2h_weight": (rows, self.layer_input_size(layer)),
            "h2h_weight": (rows, self.state_size),
        }
        if self.projection_size is not None:
            shapes["h2r_weight"] = (self.state_size, self.hidden_size)
        if self.peepholes:
            shapes["peephole_weight"] = ((2 if self.coupled_gates else 3) * self.hidden_size,)
        if self.bias != "none":
            shapes["i2h_bias"] = (rows,)
        if self.bias == "double":
            shapes["h2h_bias"] = (rows,)
        return shapes

    @cached_property
    def layout(self) -> ParameterLayout:
        """Where each weight and bias is in the flat parameter vector."""
        return ParameterLayout(self)


def positive_int(name: str, value: object) -> int:
    """``value`` as an int from 1 to :data:`MAX_BYTES`.

    Raises:
        TypeError: If it is not an integer; the message names the argument.
        ValueError: If it is out of range; the message names the argument.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {shown(value)}")
    if value > MAX_BYTES:
        raise ValueError(f"{name} must be at most {MAX_BYTES}; got {shown(value)}")
    return int(value)


def check_bytes(name: str, value: int, shapes: Iterable[tuple[int, ...]], dtype: DTypeLike) -> None:
    """Raise a ValueError that names the argument if an array of one of these shapes would be too large."""
    item = np.dtype(dtype).itemsize
    if any(math.prod(shape) * item > MAX_BYTES for shape in shapes):
        raise ValueError(f"{name} must make arrays of at most {MAX_BYTES} bytes; got {shown(value)}")


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    number = as_float(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} must be a number; got nan")
    return number


def _dtype_name(value: object) -> str:
    try:
        dtype = np.dtype(cast(Any, value))
        name = dtype.name if dtype.isnative else ""
    except TypeError:
        name = ""
    if value is None or name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {value!r}")
    return name
