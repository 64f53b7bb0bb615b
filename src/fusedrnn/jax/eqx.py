"""Equinox layers that run a whole sequence on the fused operator, with the parameters of Equinox's cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fusedrnn.extras import needed_by
from fusedrnn.jax.array_layout import Piece
from fusedrnn.jax.param_arrays import ParamArrays
from fusedrnn.jax.rnn import rnn, uncut
from fusedrnn.spec import DTYPES, RNNSpec

with needed_by("fusedrnn.jax.eqx", "equinox"):
    import equinox as eqx

__all__ = ["GRU", "LSTM"]

Array = Any

_FIELDS = "weight_ih", "weight_hh", "bias", "bias_n", "input_size", "hidden_size", "use_bias"


class LSTM(eqx.Module):
    """``eqx.nn.LSTMCell`` over a sequence.

    The constructor, the fields and the initial values are those of the cell. A call takes one sequence, as is usual in
    Equinox; ``jax.vmap`` of a call is one call of the operator for all sequences.

    Attributes:
        weight_ih: (4·H, I).
        weight_hh: (4·H, H).
        bias: (4·H,); None with ``use_bias=False``.
        input_size: I.
        hidden_size: H.
        use_bias: Whether there is a bias.

    Example:
        >>> import jax
        >>> from fusedrnn.jax.eqx import LSTM
        >>> layer = LSTM(3, 5, key=jax.random.key(0))
        >>> y, (h, c) = layer(jax.numpy.ones((7, 3)))
        >>> y.shape, h.shape
        ((7, 5), (5,))
    """

    weight_ih: Array
    weight_hh: Array
    bias: Array | None
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(self, input_size: int, hidden_size: int, use_bias: bool = True, dtype: Any = None, *, key: Array):
        _copy_fields(eqx.nn.LSTMCell(input_size, hidden_size, use_bias, dtype, key=key), self)

    @classmethod
    def from_cell(cls, cell: Any) -> LSTM:
        """The layer with the arrays of an ``eqx.nn.LSTMCell``.

        Raises:
            TypeError: If ``cell`` has another class.
        """
        _check_cell(cell, eqx.nn.LSTMCell)
        layer: LSTM = _copy_fields(cell, object.__new__(cls))
        return layer

    def to_cell(self) -> Any:
        """The ``eqx.nn.LSTMCell`` with the arrays of this layer."""
        return _copy_fields(self, object.__new__(eqx.nn.LSTMCell))

    def __call__(
        self,
        x: Array,
        state: tuple[Array, Array] | None = None,
        *,
        length: Array | None = None,
        reverse: bool = False,
        key: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Run the sequence.

        Args:
            x: (T, I).
            state: (h, c) before the first step, each (H,), as the cell takes them; None for zeros.
            length: The number of valid steps, an integer from 0 to T; None for T. The output is zero after these.
            reverse: Whether to run from the end to the beginning.
            key: Has no effect, as in Equinox's cells.

        Returns:
            The output (T, H), and the final (h, c).

        Raises:
            TypeError: If the common dtype of parameters, input and state is not float32 or float64, or ``state`` is not
                a pair.
            ValueError: If an operand or an array of the layer has the wrong shape.
        """
        if state is not None and not (isinstance(state, (tuple, list)) and len(state) == 2):
            raise TypeError(f"state must be (h, c); got {type(state).__name__}")
        y, (h, c) = _run(self, "lstm", x, state, length, reverse)
        return y, (h, c)


class GRU(eqx.Module):
    """``eqx.nn.GRUCell`` over a sequence; see :class:`LSTM`.

    Attributes:
        weight_ih: (3·H, I).
        weight_hh: (3·H, H).
        bias: (3·H,); None with ``use_bias=False``.
        bias_n: The bias of the recurrent product of n, (H,); None with ``use_bias=False``.
        input_size: I.
        hidden_size: H.
        use_bias: Whether there are biases.
    """

    weight_ih: Array
    weight_hh: Array
    bias: Array | None
    bias_n: Array | None
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(self, input_size: int, hidden_size: int, use_bias: bool = True, dtype: Any = None, *, key: Array):
        _copy_fields(eqx.nn.GRUCell(input_size, hidden_size, use_bias, dtype, key=key), self)

    @classmethod
    def from_cell(cls, cell: Any) -> GRU:
        """The layer with the arrays of an ``eqx.nn.GRUCell``.

        Raises:
            TypeError: If ``cell`` has another class.
        """
        _check_cell(cell, eqx.nn.GRUCell)
        layer: GRU = _copy_fields(cell, object.__new__(cls))
        return layer

    def to_cell(self) -> Any:
        """The ``eqx.nn.GRUCell`` with the arrays of this layer."""
        return _copy_fields(self, object.__new__(eqx.nn.GRUCell))

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        *,
        length: Array | None = None,
        reverse: bool = False,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """Run the sequence.

        Args:
            x: (T, I).
            state: h before the first step, (H,); None for zeros.
            length: The number of valid steps, an integer from 0 to T; None for T. The output is zero after these.
            reverse: Whether to run from the end to the beginning.
            key: Has no effect, as in Equinox's cells.

        Returns:
            The output (T, H), and the final h.

        Raises:
            TypeError: If the common dtype of parameters, input and state is not float32 or float64.
            ValueError: If an operand or an array of the layer has the wrong shape.
        """
        y, (h,) = _run(self, "gru", x, None if state is None else (state,), length, reverse)
        return y, h


def _check_cell(cell: Any, expected: type) -> None:
    if type(cell) is not expected:
        raise TypeError(f"cell must be an equinox.nn.{expected.__name__}; got {type(cell).__name__}")


def _copy_fields(source: Any, module: Any) -> Any:
    for name in _FIELDS:
        if hasattr(source, name):
            object.__setattr__(module, name, getattr(source, name))  # modules are frozen
    return module


def _run(
    layer: Any, mode: str, x: Array, states: Sequence[Array] | None, length: Array | None, reverse: bool
) -> tuple[Array, list[Array]]:
    """The output and the final states of one sequence."""
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] != layer.input_size:
        raise ValueError(f"x must have shape (T, {layer.input_size}); got {x.shape}: map over more axes with jax.vmap")
    arrays = _arrays_of(layer, mode)
    if states is not None:
        states = [_row("state", state, (layer.hidden_size,))[None] for state in states]
    dtype = jnp.result_type(x, *arrays.values(), *(states or ())).name
    if dtype not in DTYPES:
        operands = "x and the parameters" if states is None else "x, the parameters and the state"
        raise TypeError(f"{operands} must give {' or '.join(DTYPES)}; they give {dtype}")
    bias = "double" if "bias_n" in arrays else "single" if layer.use_bias else "none"
    spec = RNNSpec(mode, layer.input_size, layer.hidden_size, dtype=dtype, bias=bias, reverse=reverse)
    if states is not None:
        states = [state.astype(dtype) for state in states]
    lengths = None if length is None else _row("length", length, ())
    y, final = rnn(spec, _params(spec, arrays), x.astype(dtype)[None], states, lengths, batch_first=True)
    return y[0], [state[0, 0] for state in final]


def _row(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """An operand of one sequence with an axis for the batch."""
    array = uncut(value)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {array.shape}")
    return array[None]


def _arrays_of(layer: Any, mode: str) -> dict[str, Array]:
    """The arrays that the cell reads, by field."""
    I, H = layer.input_size, layer.hidden_size
    rows = {"lstm": 4, "gru": 3}[mode] * H
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, I), "weight_hh": (rows, H)}
    if layer.use_bias:
        shapes["bias"] = (rows,)
        if mode == "gru":
            shapes["bias_n"] = (H,)
    arrays = {name: getattr(layer, name) for name in shapes}
    for name, array in arrays.items():
        own = None if array is None else jnp.shape(array)
        if own != shapes[name]:
            hint = ": map over an ensemble with equinox.filter_vmap" if own and own[1:] == shapes[name] else ""
            raise ValueError(f"{name} must have shape {shapes[name]}; got {own}{hint}")
    return arrays


def _params(spec: RNNSpec, arrays: Mapping[str, Array]) -> ParamArrays:
    by_kind = {"i2h_weight": arrays["weight_ih"], "h2h_weight": arrays["weight_hh"], "i2h_bias": arrays.get("bias")}
    if spec.bias == "double":  # a GRU's recurrent bias, which Equinox has for n only
        zeros = jnp.zeros_like(arrays["bias"][: -spec.hidden_size])
        by_kind["h2h_bias"] = jnp.concatenate([zeros, arrays["bias_n"]])
    # The arrays in the order of the vector. The elements of each are in that order already.
    vectors = [jnp.reshape(by_kind[entry.kind], -1).astype(spec.dtype) for entry in spec.layout]
    return ParamArrays.of(vectors, [Piece(number, 0, vector.size) for number, vector in enumerate(vectors)])
