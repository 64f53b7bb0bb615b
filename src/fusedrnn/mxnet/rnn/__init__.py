"""The cells of MXNet's rnn module, on NumPy arrays.

A cell describes a network and names its parameters; :meth:`~BaseRNNCell.set_params` sets the arrays, and
:meth:`~BaseRNNCell.unroll` runs it over a sequence, in inference. :class:`FusedRNNCell` runs on the fused operator. The
other cells, including those that :meth:`FusedRNNCell.unfuse` returns, run the reference, cell by cell and step by step.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> fused = FusedRNNCell(num_hidden=5, num_layers=2, mode="lstm", bidirectional=True, prefix="lstm_")
    >>> shapes = fused.param_shapes(input_size=3)
    >>> params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    >>> fused.set_params(params)
    >>> x = rng.standard_normal((7, 4, 3), np.float32)
    >>> outputs, _ = fused.unroll(7, x, layout="TNC")
    >>> outputs.shape
    (7, 4, 10)

    The same parameters, gate by gate, and the same network, cell by cell:

    >>> stack = fused.unfuse()
    >>> gates = fused.unpack_weights(params)
    >>> gates["lstm_l0_i2h_f_weight"].shape
    (5, 3)
    >>> stack.set_params(stack.pack_weights(gates))
    >>> unfused, _ = stack.unroll(7, x, layout="TNC")
    >>> bool(np.allclose(outputs, unfused, atol=1e-5))
    True
"""

from fusedrnn.mxnet.rnn.base import BaseRNNCell
from fusedrnn.mxnet.rnn.fused import FusedRNNCell
from fusedrnn.mxnet.rnn.unfused import BidirectionalCell, GRUCell, LSTMCell, RNNCell, SequentialRNNCell

__all__ = [
    "BaseRNNCell",
    "BidirectionalCell",
    "FusedRNNCell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "SequentialRNNCell",
]
