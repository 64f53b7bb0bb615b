"""A fused recurrent-network operator for CPU: vanilla RNN, LSTM and GRU, whole sequences in one call."""

from fusedrnn.cell.activations import Activation
from fusedrnn.frozen_array import frozen
from fusedrnn.layout import ParameterLayout
from fusedrnn.mxnet.nd import rnn
from fusedrnn.mxnet.rnn import BidirectionalCell, FusedRNNCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
from fusedrnn.op.grad_req import Reserve
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.op.stream import Stream
from fusedrnn.runtime.thread_pool import get_num_threads, set_num_threads, thread_limits
from fusedrnn.spec import RNNSpec

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BidirectionalCell",
    "FusedRNNCell",
    "GRUCell",
    "LSTMCell",
    "ParameterLayout",
    "RNNCell",
    "RNNOp",
    "RNNSpec",
    "Reserve",
    "SequentialRNNCell",
    "Stream",
    "__version__",
    "frozen",
    "get_num_threads",
    "rnn",
    "set_num_threads",
    "thread_limits",
]
