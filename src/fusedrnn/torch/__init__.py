"""PyTorch modules that run on the fused operator: torch.nn's, with the same constructors, parameters and results.

``from fusedrnn.torch import LSTM`` takes the place of ``torch.nn.LSTM``; :func:`accelerate` turns the layers of a
model that is there already. What the operator does not serve (other devices and dtypes, projections, autocast,
tracing, function transforms) runs on PyTorch's own implementation.
"""

from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.layers import GRU, LSTM, RNN
from fusedrnn.torch.swap import Layer, Report, accelerate, restore

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "Layer", "RNNCell", "Report", "accelerate", "restore"]
