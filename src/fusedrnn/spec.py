"""What an RNN is: one frozen, validated description."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedrnn.cell.activations import ACTIVATIONS, Activation
from fusedrnn.cell.cells import FAMILIES, Variant, cell_of
from fusedrnn.layout import ParameterLayout
from fusedrnn.scalars import as_float, shown

Array = NDArray[Any]

MODES = tuple(FAMILIES)
DTYPES = ("float32", "float64")
BIASES = ("double", "single", "none")
OPTIONS = (
    "projection_size", "state_clip_min", "reset_after", "peepholes", "coupled_gates", "gate_clip", "activations",
    "bias", "reverse",
)  # fmt: skip
"""What a spec may ask for beyond the four cells in one direction or two: an engine may lack any of it."""
MOST_LAYERS = 4096
"""Layers of a network at most: each takes time and memory before the first call, whatever its sizes."""
MOST_BYTES = 2**48
"""Bytes of an array at most: what the addresses of common processors reach."""


@dataclass(frozen=True)
class RNNSpec:
    """A recurrent network: which cell, its sizes, its depth. Frozen, hashable, validated when made.

    Attributes:
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        input_size: I, at least 1.
        hidden_size: H, at least 1; the parameters must take fewer than 2**48 bytes.
        num_layers: L, from 1 to 4096. Layer l > 0 reads the output of layer l - 1.
        bidirectional: Whether each layer runs over the sequence both ways, its outputs concatenated.
        dropout: Probability in [0, 1) with which training drops elements between layers. Inference ignores it.
        projection_size: P, the size to which an LSTM's output is projected, below H; None for no projection.
        dtype: ``"float32"`` or ``"float64"``.
        state_clip_min: Lower bound for an LSTM's cell state after each step; given if the upper one is.
        state_clip_max: Upper bound, not below the lower one.
        state_clip_nan: Whether clipping also replaces NaN in the cell state (by the lower bound, as MXNet does).
        reset_after: Whether a GRU's r multiplies the recurrent product: n = tanh(W x + b + r·(U h + c)), as in cuDNN
            and PyTorch; if not, it multiplies the state: n = tanh(W x + b + U (r·h) + c), as in Cho et al. (2014).
        peepholes: Whether an LSTM's gates see the cell state: i and f the one before the step, o the one after it, each
            through a weight of its own for each unit.
        coupled_gates: Whether an LSTM's f is 1 - i: it then has the gates i, g, o.
        gate_clip: Bound that the size of a pre-activation is clipped to, above 0; None for no clipping.
        activations: The functions of a cell, each an :class:`Activation` or its name: of an LSTM those of the gates, of
            g and of the cell state; of a GRU those of the gates and of n; of a vanilla RNN its own. None for the usual.
        bias: ``"double"`` for biases of input and of state, ``"single"`` for those of the input alone, ``"none"``.
        reverse: Whether a network of one direction runs from the end of each sequence to its beginning.

    Raises:
        TypeError: A field is of the wrong type; the message names it, what was given and what was expected.
        ValueError: A field has a value that it cannot have; the same.
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
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers must be at most {MOST_LAYERS}; got {self.num_layers}")
        features = self.input_size + (self.num_layers - 1) * self.output_size + self.num_layers * (self.state_size + 2)
        elements = self.num_directions * self.num_gates * self.hidden_size * features
        if elements * np.dtype(self.dtype).itemsize >= MOST_BYTES:
            raise ValueError(
                f"input_size, hidden_size and num_layers must make parameters of fewer than {MOST_BYTES} bytes; got "
                f"{self.input_size}, {self.hidden_size} and {self.num_layers}"
            )

    def _check_variant(self) -> None:
        for name, mode, usual in (("reset_after", "gru", True), ("peepholes", "lstm", False),
                                  ("coupled_gates", "lstm", False)):  # fmt: skip
            self._set(name, _bool(name, getattr(self, name)))
            if getattr(self, name) != usual and self.mode != mode:
                raise ValueError(f"{name}={not usual} needs mode {mode!r}; got mode {self.mode!r}")
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
        given, usual = self.activations, FAMILIES[self.mode].default.activations
        if given is None:
            return None
        wanted = f"{len(usual)} of {', '.join(ACTIVATIONS)}"
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"activations must be a tuple of {wanted}; got {given!r}")
        found = tuple(one if isinstance(one, Activation) else Activation(one) for one in given)
        if len(found) != len(usual):
            raise ValueError(f"activations must be {wanted} in mode {self.mode!r}; got {len(found)}")
        return None if found == usual else found

    @cached_property
    def variant(self) -> Variant:
        """The cell with everything that the spec settles of it."""
        default = FAMILIES[self.mode].default
        clips = self.state_clip_min is not None
        bounds = cast(float, self.state_clip_min), cast(float, self.state_clip_max), self.state_clip_nan
        return replace(
            default,
            activations=self.activations or default.activations,
            reset_after=self.reset_after,
            peepholes=self.peepholes,
            coupled_gates=self.coupled_gates,
            gate_clip=self.gate_clip,
            state_clip=bounds if clips else None,
            projects=self.projection_size is not None,
        )

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """The gates in the order in which weights stack them."""
        return cell_of(self.variant).gates

    @property
    def num_directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def num_gates(self) -> int:
        """G: pre-activations for each hidden unit: 4 in an LSTM (3 if coupled), 3 in a GRU, 1 in a vanilla RNN."""
        return len(self.gates)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states of a cell in order: ``("h",)`` or ``("h", "c")``."""
        return FAMILIES[self.mode].states

    @property
    def state_size(self) -> int:
        """S: size of the output of one direction, the projection's if there is one, else H."""
        return self.projection_size or self.hidden_size

    @property
    def output_size(self) -> int:
        """D·S: features of the output at each step."""
        return self.num_directions * self.state_size

    @property
    def drops(self) -> bool:
        """Whether training drops anything: there must be layers to drop it between."""
        return self.dropout > 0 and self.num_layers > 1

    def layer_input_size(self, layer: int) -> int:
        """Features that a layer reads at each step: I for layer 0, D·S after it."""
        return self.input_size if layer == 0 else self.output_size

    def asks_for(self, option: str) -> bool:
        """Whether one of :data:`OPTIONS` is other than it is if nothing is said."""
        return bool(getattr(self, option) != type(self).__dataclass_fields__[option].default)

    def reverses(self, direction: int) -> bool:
        """Whether that direction, 0 or 1, runs from the end of each sequence to its beginning."""
        return direction == 1 or self.reverse

    def state_shape(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """Shape (L·D, N, size) of each state for a batch of N sequences; index layer·D + direction."""
        rows = self.num_layers * self.num_directions
        return tuple((rows, batch, self.size_of(name)) for name in self.state_names)

    def size_of(self, state: str) -> int:
        """Elements of a state, ``"h"`` or ``"c"``: S or H."""
        return self.state_size if state == "h" else self.hidden_size

    def flops(self, steps: int, batch: int, *, training: bool = False) -> int:
        """Useful floating-point operations of T steps of N sequences: the GEMMs only, times three for training."""
        per_row = sum(self.layer_input_size(layer) + self.state_size for layer in range(self.num_layers))
        multiplied = self.num_gates * self.hidden_size * per_row
        multiplied += self.num_layers * self.hidden_size * (self.projection_size or 0)
        forward = 2 * steps * batch * self.num_directions * multiplied
        return forward * 3 if training else forward

    @cached_property
    def layout(self) -> ParameterLayout:
        """Where each weight and bias lies in the flat parameter vector."""
        return ParameterLayout(self)


def positive_int(name: str, value: object) -> int:
    """``value`` as an int from 1 to :data:`MOST_BYTES`; else the TypeError or ValueError that names the argument."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {shown(value)}")
    if value > MOST_BYTES:
        raise ValueError(f"{name} must be at most {MOST_BYTES}; got {shown(value)}")
    return int(value)


def check_bytes(name: str, value: int, shapes: Iterable[tuple[int, ...]], dtype: DTypeLike) -> None:
    """Raise the ValueError that names the argument if arrays of these shapes, which follow from it, are impossible."""
    item = np.dtype(dtype).itemsize
    if any(math.prod(shape) * item > MOST_BYTES for shape in shapes):
        raise ValueError(f"{name} must make arrays of at most {MOST_BYTES} bytes; got {shown(value)}")


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
