"""The layers RNN, LSTM and GRU of MXNet's gluon.rnn, on NumPy arrays."""

from __future__ import annotations

from typing import Literal

from fusedrnn.mxnet.gluon.backward import Layout
from fusedrnn.mxnet.gluon.initializers import Initializer
from fusedrnn.mxnet.gluon.layer import RNNLayer
from fusedrnn.mxnet.gluon.parameter import ParameterDict

__all__ = ["GRU", "LSTM", "RNN", "RNNLayer"]


class RNN(RNNLayer):
    """Vanilla layers: h = act(W_i x + b_i + W_h h + b_h). :class:`RNNLayer` describes the other arguments and errors.

    Args:
        activation: ``"relu"`` or ``"tanh"``.
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
        super().__init__(f"rnn_{activation}", locals())


class LSTM(RNNLayer):
    """LSTM layers, with states h and c. :class:`RNNLayer` describes the other arguments and errors.

    The forget gate's bias has no additional constant, unless the initializer of a bias is ``"lstmbias"``.

    Args:
        projection_size: P, the size of h and of a direction's output, which must be less than H; None for no
            projection.
        h2r_weight_initializer: The initializer of the weights of the projection, as for the other weights.
        state_clip_min: Lower bound of the cell state after each step. Give both bounds or neither.
        state_clip_max: Upper bound of the cell state.
        state_clip_nan: Whether clipping also replaces NaN in the cell state, by the lower bound.
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
        super().__init__("lstm", locals())


class GRU(RNNLayer):
    """GRU layers, reset-after as in MXNet, cuDNN and PyTorch. :class:`RNNLayer` describes the arguments and errors."""

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
        super().__init__("gru", locals())
