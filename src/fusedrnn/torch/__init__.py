"""torch.nn's recurrent modules on the fused operator, with the same constructors, parameters and results.

``from fusedrnn.torch import LSTM`` replaces ``torch.nn.LSTM``; :func:`accelerate` replaces the layers of an existing
model. What the operator does not support (other devices and dtypes, torch.jit.trace, function transforms) runs by
PyTorch's own implementation.
"""

from fusedrnn.extras import needed_by

with needed_by("fusedrnn.torch", "torch"):
    import torch as _torch  # noqa: F401 -- for a clear error if it is missing

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.torch import custom_op as _custom_op  # noqa: F401 -- torch.export.load needs the registered operators
from fusedrnn.torch import tools as _tools
from fusedrnn.torch.cells import GRUCell, LSTMCell, RNNCell
from fusedrnn.torch.conversion import accelerate, restore
from fusedrnn.torch.layer import Layer
from fusedrnn.torch.modules import GRU, LSTM, RNN
from fusedrnn.torch.network_module import Network
from fusedrnn.torch.new_layers import accelerate_new, accelerated
from fusedrnn.torch.quantization import Quantized, quantize
from fusedrnn.torch.reading import ReadLayer, read

_tools.register()

__all__ = [
    "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "Layer", "LayerReport", "Network", "Quantized", "RNNCell", "ReadLayer",
    "Report", "accelerate", "accelerate_new", "accelerated", "quantize", "read", "restore",
]  # fmt: skip
