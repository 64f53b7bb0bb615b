"""Recurrent layers shaped like those of MXNet's gluon.rnn, on NumPy arrays."""

from __future__ import annotations

from typing import Literal

from fusedrnn.mxnet.gluon.backward import Layout
from fusedrnn.mxnet.gluon.initializers import Initializer
from fusedrnn.mxnet.gluon.layer import RNNLayer
from fusedrnn.mxnet.gluon.parameter import ParameterDict

__all__ = ["GRU", "LSTM", "RNN", "RNNLayer"]


class RNN(RNNLayer):
    """Vanilla layers: h = act(W_i x + b_i + W_h h + b_h). See :class:`RNNLayer` for what all layers do.

    Args:
        hidden_size: H.
        num_layers: L.
        activation: ``"relu"`` or ``"tanh"``.
        layout: ``"TNC"`` for inputs and outputs (T, N, C), ``"NTC"`` for (N, T, C).
        dropout: Probability with which training drops elements between layers.
        bidirectional: Whether each layer runs both ways.
        i2h_weight_initializer: What :meth:`initialize` fills the input's weights with; None for its own default.
        h2h_weight_initializer: The same for the recurrent weights.
        i2h_bias_initializer: The same for the input's biases; None for zeros.
        h2h_bias_initializer: The same for the recurrent biases.
        input_size: I; 0 if the first call is to say it.
        dtype: ``"float32"`` or ``"float64"``, of parameters, inputs and states.
        use_sequence_length: Whether calls come with ``sequence_length``.
        prefix: What the parameters' full names start with; None for a new one, ``rnn0_``, ``rnn1_``.
        params: Another layer's parameters, to compute with the same; their names and initializers stay theirs.
        backend: The engine to run it, as in :class:`RNNOp`; None for the first that can.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have.
        NotImplementedError: Naming what is asked for and no engine has, when the input size is known.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        activation: Literal["relu", "tanh"] = "relu",
        layout: Layout = "TNC",
        dropout: float = 0.0,
        bidirectional: bool = False,
        i2h_weight_initializer: Initializer = None,
        h2h_weight_initializer: Initializer = None,
        i2h_bias_initializer: Initializer = "zeros",
        h2h_bias_initializer: Initializer = "zeros",
        input_size: int = 0,
        dtype: str = "float32",
        *,
        use_sequence_length: bool = False,
        prefix: str | None = None,
        params: ParameterDict | None = None,
        backend: str | None = None,
    ) -> None:
        if activation not in ("relu", "tanh"):
            raise ValueError(f"activation must be 'relu' or 'tanh'; got {activation!r}")
        options = {"hidden_size": hidden_size, "num_layers": num_layers, "bidirectional": bidirectional,
                   "dropout": dropout, "dtype": dtype}  # fmt: skip
        initializers = {"i2h_weight": i2h_weight_initializer, "h2h_weight": h2h_weight_initializer,
                        "i2h_bias": i2h_bias_initializer, "h2h_bias": h2h_bias_initializer}  # fmt: skip
        super().__init__(
            f"rnn_{activation}", options, input_size, layout, initializers, use_sequence_length, prefix, params, backend
        )


class LSTM(RNNLayer):
    """LSTM layers, with states h and c. See :class:`RNNLayer` for what all layers do.

    Args:
        hidden_size: H.
        num_layers: L.
        layout: ``"TNC"`` for inputs and outputs (T, N, C), ``"NTC"`` for (N, T, C).
        dropout: Probability with which training drops elements between layers.
        bidirectional: Whether each layer runs both ways.
        input_size: I; 0 if the first call is to say it.
        i2h_weight_initializer: What :meth:`initialize` fills the input's weights with; None for its own default.
        h2h_weight_initializer: The same for the recurrent weights.
        i2h_bias_initializer: The same for the input's biases; None for zeros. Nothing is added to the forget gate's
            bias unless it is ``"lstmbias"``.
        h2h_bias_initializer: The same for the recurrent biases.
        projection_size: P, below H: the size of h and of a direction's output; None for no projection.
        h2r_weight_initializer: What fills the weights of the projection.
        state_clip_min: Lower bound of the cell state after each step; given if the upper one is.
        state_clip_max: Upper bound.
        state_clip_nan: Whether clipping replaces NaN in the cell state, by the lower bound.
        dtype: ``"float32"`` or ``"float64"``, of parameters, inputs and states.
        use_sequence_length: Whether calls come with ``sequence_length``.
        prefix: What the parameters' full names start with; None for a new one, ``lstm0_``, ``lstm1_``.
        params: Another layer's parameters, to compute with the same; their names and initializers stay theirs.
        backend: The engine to run it, as in :class:`RNNOp`; None for the first that can.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have.
        NotImplementedError: Naming what is asked for and no engine has, when the input size is known.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        layout: Layout = "TNC",
        dropout: float = 0.0,
        bidirectional: bool = False,
        input_size: int = 0,
        i2h_weight_initializer: Initializer = None,
        h2h_weight_initializer: Initializer = None,
        i2h_bias_initializer: Initializer = "zeros",
        h2h_bias_initializer: Initializer = "zeros",
        projection_size: int | None = None,
        h2r_weight_initializer: Initializer = None,
        state_clip_min: float | None = None,
        state_clip_max: float | None = None,
        state_clip_nan: bool = False,
        dtype: str = "float32",
        *,
        use_sequence_length: bool = False,
        prefix: str | None = None,
        params: ParameterDict | None = None,
        backend: str | None = None,
    ) -> None:
        options = {"hidden_size": hidden_size, "num_layers": num_layers, "bidirectional": bidirectional,
                   "dropout": dropout, "dtype": dtype, "projection_size": projection_size,
                   "state_clip_min": state_clip_min, "state_clip_max": state_clip_max,
                   "state_clip_nan": state_clip_nan}  # fmt: skip
        initializers = {"i2h_weight": i2h_weight_initializer, "h2h_weight": h2h_weight_initializer,
                        "i2h_bias": i2h_bias_initializer, "h2h_bias": h2h_bias_initializer,
                        "h2r_weight": h2r_weight_initializer}  # fmt: skip
        super().__init__(
            "lstm", options, input_size, layout, initializers, use_sequence_length, prefix, params, backend
        )


class GRU(RNNLayer):
    """GRU layers, reset-after as in MXNet, cuDNN and PyTorch. See :class:`RNNLayer` for what all layers do.

    Args:
        hidden_size: H.
        num_layers: L.
        layout: ``"TNC"`` for inputs and outputs (T, N, C), ``"NTC"`` for (N, T, C).
        dropout: Probability with which training drops elements between layers.
        bidirectional: Whether each layer runs both ways.
        input_size: I; 0 if the first call is to say it.
        i2h_weight_initializer: What :meth:`initialize` fills the input's weights with; None for its own default.
        h2h_weight_initializer: The same for the recurrent weights.
        i2h_bias_initializer: The same for the input's biases; None for zeros.
        h2h_bias_initializer: The same for the recurrent biases.
        dtype: ``"float32"`` or ``"float64"``, of parameters, inputs and states.
        use_sequence_length: Whether calls come with ``sequence_length``.
        prefix: What the parameters' full names start with; None for a new one, ``gru0_``, ``gru1_``.
        params: Another layer's parameters, to compute with the same; their names and initializers stay theirs.
        backend: The engine to run it, as in :class:`RNNOp`; None for the first that can.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has a value that it cannot have.
        NotImplementedError: Naming what is asked for and no engine has, when the input size is known.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        layout: Layout = "TNC",
        dropout: float = 0.0,
        bidirectional: bool = False,
        input_size: int = 0,
        i2h_weight_initializer: Initializer = None,
        h2h_weight_initializer: Initializer = None,
        i2h_bias_initializer: Initializer = "zeros",
        h2h_bias_initializer: Initializer = "zeros",
        dtype: str = "float32",
        *,
        use_sequence_length: bool = False,
        prefix: str | None = None,
        params: ParameterDict | None = None,
        backend: str | None = None,
    ) -> None:
        options = {"hidden_size": hidden_size, "num_layers": num_layers, "bidirectional": bidirectional,
                   "dropout": dropout, "dtype": dtype}  # fmt: skip
        initializers = {"i2h_weight": i2h_weight_initializer, "h2h_weight": h2h_weight_initializer,
                        "i2h_bias": i2h_bias_initializer, "h2h_bias": h2h_bias_initializer}  # fmt: skip
        super().__init__("gru", options, input_size, layout, initializers, use_sequence_length, prefix, params, backend)
