"""A fused recurrent-network operator for CPU: vanilla RNN, LSTM and GRU, whole sequences in one call."""

import importlib
from typing import TYPE_CHECKING, Any

from fusedrnn.cell.activations import Activation
from fusedrnn.frozen_array import frozen
from fusedrnn.layout import ParameterLayout
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op.network_op import NetworkOp
from fusedrnn.op.reserve import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.op.stream import Stream
from fusedrnn.op.streams import Streams
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.runtime.thread_pool import get_num_threads, set_num_threads, thread_limits
from fusedrnn.spec import RNNSpec

if TYPE_CHECKING:  # for static checkers: names that __getattr__ imports at first use
    from fusedrnn.initial_params import init_params
    from fusedrnn.mxnet.nd import rnn
    from fusedrnn.mxnet.rnn import BidirectionalCell, FusedRNNCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
    from fusedrnn.runtime.c_allocator import keep_freed_memory

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BidirectionalCell",
    "FusedRNNCell",
    "GRUCell",
    "LSTMCell",
    "NetworkOp",
    "NetworkSpec",
    "ParameterLayout",
    "QuantizedParams",
    "RNNCell",
    "RNNOp",
    "RNNSpec",
    "Reserve",
    "SequentialRNNCell",
    "Stream",
    "Streams",
    "__version__",
    "frozen",
    "get_num_threads",
    "init_params",
    "keep_freed_memory",
    "rnn",
    "set_num_threads",
    "thread_limits",
]
_CELLS = ("BidirectionalCell", "FusedRNNCell", "GRUCell", "LSTMCell", "RNNCell", "SequentialRNNCell")
_MXNET = {"rnn": "fusedrnn.mxnet.nd", **dict.fromkeys(_CELLS, "fusedrnn.mxnet.rnn")}
_LAZY = {
    "init_params": "fusedrnn.initial_params", "keep_freed_memory": "fusedrnn.runtime.c_allocator", **_MXNET
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import adapters, the catalogue of cells, and names that few programs need, at first use."""
    if name in ("cells", "jax", "keras", "mxnet", "onnx", "torch"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
