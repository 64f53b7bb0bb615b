"""PyTorch modules that run on the fused operator: torch.nn's, with the same constructors, parameters and results.

``from fusedrnn.torch import LSTM`` takes the place of ``torch.nn.LSTM``; :func:`accelerate` turns the layers of a
model that is there already. What the operator does not serve (other devices and dtypes, autocast,
tracing, function transforms) runs on PyTorch's own implementation.
"""

try:
    import torch as _torch  # noqa: F401 -- so that its absence is told in words
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("fusedrnn.torch needs PyTorch; install it with: pip install 'fusedrnn[torch]'") from error

from fusedrnn.torch import custom_op as _custom_op  # noqa: F401 -- programs that torch.export.load reads need it
from fusedrnn.torch import flops, pruning, scripting
from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.conversion import Layer, Report, accelerate, restore
from fusedrnn.torch.modules import GRU, LSTM, RNN
from fusedrnn.torch.new_layers import accelerate_new, accelerated
from fusedrnn.torch.reading import ReadLayer, read

flops.register()
pruning.register()
scripting.register()

__all__ = [
    "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "Layer", "RNNCell", "ReadLayer", "Report", "accelerate",
    "accelerate_new", "accelerated", "read", "restore",
]  # fmt: skip
