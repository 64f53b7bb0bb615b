"""The cells of flax.nnx as specs and flat parameter vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from fusedrnn.cell.activations import Activation
from fusedrnn.jax.array_layout import Piece
from fusedrnn.jax.param_arrays import ParamArrays
from fusedrnn.layout import Kind
from fusedrnn.spec import DTYPES, RNNSpec

Array = Any
Value = TypeVar("Value")

ACTIVATIONS: dict[Callable[..., Any], Activation] = {
    jax.nn.sigmoid: Activation("sigmoid"),
    jnp.tanh: Activation("tanh"),
    jax.nn.relu: Activation("relu"),
    jax.nn.elu: Activation("elu", 1.0),
    jax.nn.soft_sign: Activation("softsign"),
    jax.nn.softplus: Activation("softplus"),
}
"""The activations that JAX's functions compute. Flax exports the same functions."""
OTHER_DERIVATIVES: dict[Callable[..., Any], str] = {jax.nn.leaky_relu: "at 0", jax.nn.hard_sigmoid: "at -3 and 3"}
"""The functions of JAX whose derivative is another one than the operator's, and where."""


@dataclass(frozen=True)
class CellForm:
    """The attributes of a cell of flax that hold what a spec describes.

    Attributes:
        mode: The mode of the spec; for a simple cell, it depends on the activation.
        inputs: The linear layers that read the input, in the order of the gates.
        recurrent: The linear layers that read the state, likewise.
        bias_is_recurrent: Whether the recurrent layers have the biases; else those of the input have them.
        functions: The attributes that hold the activations.
    """

    mode: str
    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    bias_is_recurrent: bool
    functions: tuple[str, ...]


_LSTM_FUNCTIONS = ("gate_fn", "activation_fn", "activation_fn")
FORMS: dict[type, CellForm] = {
    nnx.LSTMCell: CellForm("lstm", ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"), True, _LSTM_FUNCTIONS),
    nnx.OptimizedLSTMCell: CellForm("lstm", ("dense_i",), ("dense_h",), True, _LSTM_FUNCTIONS),
    nnx.GRUCell: CellForm("gru", ("dense_i",), ("dense_h",), False, ("gate_fn", "activation_fn")),
    nnx.SimpleCell: CellForm("rnn_tanh", ("dense_i",), ("dense_h",), False, ("activation_fn",)),
}
_NAMES = ", ".join(cls.__name__ for cls in FORMS)


def refusal(cell: Any) -> str:
    """Why the operator does not run a cell with any arguments; empty if it runs it."""
    form = FORMS.get(type(cell))
    if form is None:
        base = next((cls.__name__ for cls in FORMS if isinstance(cell, cls)), "")
        kind = f"{type(cell).__name__}, a subclass of {base}" if base else type(cell).__name__
        return f"its cell is {kind}; the operator has {_NAMES}"
    for name in dict.fromkeys(form.functions):
        function = getattr(cell, name)
        if _entry(ACTIVATIONS, function) is None:
            points = _entry(OTHER_DERIVATIVES, function)
            reason = "which the operator does not have"
            if points:
                reason = f"whose derivative {points} differs from the operator's"
            return f"its {name} is {getattr(function, '__name__', function)}, {reason}"
    if getattr(cell, "residual", False):
        return "its cell adds the state within the activation (residual=True)"
    return _refused_linear(form, cell)


def _refused_linear(form: CellForm, cell: Any) -> str:
    """Why the operator does not compute some linear layer of a cell; empty if it computes all."""
    for name, is_recurrent in _linears(form):
        linear = getattr(cell, name)
        if type(linear) is not nnx.Linear:
            return f"its cell's {name} is {type(linear).__name__}, not nnx.Linear"
        has_bias = is_recurrent == form.bias_is_recurrent
        is_plain = linear.dot_general is jax.lax.dot_general and linear.promote_dtype is promote_dtype
        unchanged = is_plain and linear.precision is None and linear.preferred_element_type is None
        if not unchanged or has_bias != (linear.bias is not None):
            return f"its cell's {name} is not the linear layer that flax makes there by default"
        # This also works for a model from nnx.eval_shape, whose parameters have no values.
        kernel = linear.kernel.get_value() if isinstance(linear.kernel, nnx.Variable) else linear.kernel
        dtype = jnp.dtype(kernel.dtype if linear.dtype is None else linear.dtype).name
        if dtype not in DTYPES:
            return f"its cell computes in {dtype}, with sums rounded to it; the operator has {' and '.join(DTYPES)}"
    return ""


def _linears(form: CellForm) -> Iterator[tuple[str, bool]]:
    """The names of the linear layers, and whether each reads the state, in the order of their arrays."""
    yield from ((name, False) for name in form.inputs)
    yield from ((name, True) for name in form.recurrent)


def _entry(table: Mapping[Callable[..., Any], Value], function: Any) -> Value | None:
    try:
        return table.get(function)
    except TypeError:  # an object without a hash
        return None


def spec_of(cell: Any, dtype: str, *, reverse: bool = False, bidirectional: bool = False) -> RNNSpec:
    """The spec of one layer of a cell that the operator supports."""
    functions = tuple(ACTIVATIONS[getattr(cell, name)] for name in FORMS[type(cell)].functions)
    mode = FORMS[type(cell)].mode
    return _spec(mode, cell.in_features, cell.hidden_features, dtype, functions, reverse, bidirectional)


@lru_cache(maxsize=256)
def _spec(
    mode: str, I: int, H: int, dtype: str, activations: tuple[Activation, ...], reverse: bool, bidirectional: bool
) -> RNNSpec:
    if mode == "rnn_tanh" and activations == (Activation("relu"),):
        mode = "rnn_relu"
    return RNNSpec(
        mode, I, H, bidirectional=bidirectional, dtype=dtype, activations=activations, bias="single", reverse=reverse
    )


def dtype_of(cell: Any, inputs: Array, states: Sequence[Array]) -> str | None:
    """The dtype in which a cell computes by flax's rules; None if it is not the same everywhere or not supported.

    Args:
        cell: A cell that the operator supports.
        inputs: The input.
        states: The states before the first step, h first.
    """
    dtypes = {np.dtype(state.dtype) for state in states}
    for name, is_recurrent in _linears(FORMS[type(cell)]):
        linear = getattr(cell, name)
        dtype = linear.dtype
        if dtype is None:
            dtype = jnp.result_type(states[0] if is_recurrent else inputs, *_arrays_of(linear))
            dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, jnp.float32)
        dtypes.add(np.dtype(dtype))
    names = {dtype.name for dtype in dtypes}
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else None


def has_its_sizes(cell: Any) -> bool:
    """Whether the parameters' shapes match the cell's sizes; outside its ``vmap``, a mapped cell has other shapes."""
    form, I, H = FORMS[type(cell)], cell.in_features, cell.hidden_features
    for name, is_recurrent in _linears(form):
        linear = getattr(cell, name)
        rows = _num_gates(form) * H // len(form.inputs)
        shapes = [(H if is_recurrent else I, rows), (rows,)]
        arrays = _arrays_of(linear)
        if [array.shape for array in arrays] != shapes[: len(arrays)]:
            return False
    return True


def _num_gates(form: CellForm) -> int:
    return {"lstm": 4, "gru": 3}.get(form.mode, 1)


def _arrays_of(linear: Any) -> list[Array]:
    """The kernel and the bias, which are variables or, in a model of pure values, arrays."""
    return [variable[...] for variable in (linear.kernel, linear.bias) if variable is not None]


def params_of(spec: RNNSpec, cells: Sequence[Any]) -> ParamArrays:
    """The parameters of the cells of a layer, one cell for each direction, all of the same class."""
    form = FORMS[type(cells[0])]
    arrays: list[Array] = []
    numbers: list[dict[Kind, list[int]]] = []
    for cell in cells:
        by_kind: dict[Kind, list[int]] = {"i2h_weight": [], "h2h_weight": [], "i2h_bias": []}
        for name, is_recurrent in _linears(form):
            kinds: list[Kind] = ["h2h_weight" if is_recurrent else "i2h_weight", "i2h_bias"]
            for kind, array in zip(kinds, _arrays_of(getattr(cell, name)), strict=False):
                by_kind[kind].append(len(arrays))
                arrays.append(array.astype(spec.dtype))
        numbers.append(by_kind)
    order = [number for entry in spec.layout for number in numbers[entry.direction][entry.kind]]
    return ParamArrays.of(arrays, [Piece(number, 0, arrays[number].shape[-1]) for number in order])
