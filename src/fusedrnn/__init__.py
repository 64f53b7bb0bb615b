"""A fused recurrent-network operator for CPU: vanilla RNN, LSTM and GRU, whole sequences in one call."""

from fusedrnn.activations import Activation
from fusedrnn.constants import frozen
from fusedrnn.engine.threads import get_num_threads, set_num_threads, thread_limits
from fusedrnn.layout import ParameterLayout
from fusedrnn.mxnet.nd import rnn
from fusedrnn.operator import RNNOp
from fusedrnn.requests import Reserve
from fusedrnn.rnncells import BidirectionalCell, FusedRNNCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell
from fusedrnn.spec import RNNSpec
from fusedrnn.stream import Stream

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
