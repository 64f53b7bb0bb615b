"""The spec of a Keras cell, or the reason why it has none."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras

from fusedrnn.cell.activations import Activation
from fusedrnn.spec import RNNSpec

_MODES = {keras.layers.LSTMCell: "lstm", keras.layers.GRUCell: "gru", keras.layers.SimpleRNNCell: "rnn_tanh"}
"""Keras's cells, with the mode and the default activations of each."""
ACTIVATIONS = {
    keras.activations.tanh: Activation("tanh"),
    keras.activations.sigmoid: Activation("sigmoid"),
    keras.activations.relu: Activation("relu"),
    keras.activations.linear: Activation("affine"),
    keras.activations.hard_sigmoid: Activation("hard_sigmoid", 1 / 6, 0.5),
    keras.activations.softsign: Activation("softsign"),
    keras.activations.softplus: Activation("softplus"),
    keras.activations.elu: Activation("elu"),
    keras.activations.leaky_relu: Activation("leaky_relu", 0.2),
}
"""Our activations for Keras's functions with their default arguments."""
FORMATS = {"float32": ("float32", None), "float64": ("float64", None), "bfloat16": ("float32", "bfloat16")}
"""The dtype and the format of GEMM operands for each dtype in which a Keras layer computes."""
_GATE_ORDERS: dict[Any, tuple[int, ...]] = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2)}
"""Keras's index of each of our gates, of a GRU r z n. It is also our index of each of Keras's gates, z r h."""


def cells_of(cell: Any) -> Sequence[Any]:
    """The cells that run one after the other at each step."""
    return tuple(cell.cells) if type(cell) is keras.layers.StackedRNNCells else (cell,)


def refusal(cell: Any) -> str:
    """Why the operator does not run a cell, or a cell of a stack; empty if it runs it."""
    cells = cells_of(cell)
    if len(cells) == 1 and cells[0] is not cell:
        return "its cell is a stack of one, whose states Keras nests in a way of their own"
    for each in cells:
        if type(each) not in _MODES:
            return f"its cell is a {type(each).__name__}"
        for name in ("activation", "recurrent_activation"):
            function = getattr(each, name, None)
            if function is not None and _activation(function) is None:
                return f"its {name} is {getattr(function, '__name__', type(function).__name__)}"
        if each.compute_dtype not in FORMATS:
            return f"it computes in {each.compute_dtype}; ours are {', '.join(FORMATS)}"
    # Its loss has a term for the output of each step.
    if any([each.activity_regularizer is not None for each in (cell, *cells)]):
        return "its cell has an activity_regularizer"
    return ""


def note(cell: Any) -> str:
    """The part of training that Keras runs for a supported cell; empty for none."""
    if any(each.recurrent_dropout > 0 for each in cells_of(cell)):
        return "with recurrent_dropout training runs Keras's own loop"
    return ""


def draws_masks_of_ours(cell: Any) -> bool:
    """Whether dropout of a cell in training is a single mask of the input, which can be applied before the operator."""
    return bool(cell.recurrent_dropout == 0 and cell.dropout < 1 and getattr(cell, "implementation", 2) != 1)


def spec_of(cell: Any, compute_dtype: str, bidirectional: bool = False) -> RNNSpec:
    """The spec of a built cell that has no :func:`refusal`, for tensors of that dtype.

    The spec has two biases; a bias that the Keras cell lacks is zero.
    """
    names = ("recurrent_activation", "activation", "activation") if hasattr(cell, "unit_forget_bias") else (
        ("recurrent_activation", "activation") if hasattr(cell, "reset_after") else ("activation",)
    )  # fmt: skip
    activations = tuple([getattr(cell, name).__name__ for name in names])
    dtype, compute = FORMATS[compute_dtype]
    reset_after = getattr(cell, "reset_after", True)
    size, units = cell.kernel.shape[0], cell.units
    return named_spec(_MODES[type(cell)], size, units, bidirectional, dtype, compute, reset_after, activations)


def named_spec(
    mode: str, size: int, units: int, bidirectional: bool, dtype: str, compute: str | None, reset_after: bool,
    activations: tuple[str, ...],
) -> RNNSpec:  # fmt: skip
    """The spec of a mode with Keras's activations of these names; always the same object."""
    return _cached_spec(mode, size, units, bidirectional, dtype, compute, reset_after, activations)


@functools.lru_cache(maxsize=256)
def _cached_spec(
    mode: str, size: int, units: int, bidirectional: bool, dtype: str, compute: str | None, reset_after: bool,
    names: tuple[str, ...],
) -> RNNSpec:  # fmt: skip
    if mode == "rnn_tanh" and names == ("relu",):
        mode = "rnn_relu"
    by_name = {function.__name__: activation for function, activation in ACTIVATIONS.items()}
    return RNNSpec(
        mode, size, units, bidirectional=bidirectional, dtype=dtype, compute=compute, reset_after=reset_after,
        activations=tuple(by_name[name] for name in names),
    )  # fmt: skip


def gate_order(spec: RNNSpec) -> tuple[int, ...]:
    """Keras's index of each gate of the spec."""
    return _GATE_ORDERS.get(spec.mode, (0,))


def _activation(function: Any) -> Activation | None:
    try:
        return ACTIVATIONS.get(function)
    except TypeError:  # an object that cannot be hashed
        return None
