"""MXNet's recurrent interfaces on NumPy arrays, without MXNet.

For recurrent networks, ``from fusedrnn import mxnet as mx`` replaces ``import mxnet as mx``: ``mx.nd.RNN`` is the
operator, ``mx.gluon.rnn`` has the layers, ``mx.rnn`` the cells.

    >>> import numpy as np
    >>> from fusedrnn import mxnet as mx
    >>> layer = mx.gluon.rnn.LSTM(5, num_layers=2, bidirectional=True)
    >>> layer.initialize(seed=0)
    >>> x = np.ones((7, 4, 3), np.float32)
    >>> layer(x).shape
    (7, 4, 10)
    >>> y, backward = layer.train(x)
    >>> backward(np.ones_like(y))["data"].shape
    (7, 4, 3)
    >>> layer.l0_i2h_weight.grad().shape
    (20, 3)
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from fusedrnn.mxnet import nd, rnn

if TYPE_CHECKING:
    from fusedrnn.mxnet import gluon

__all__ = ["gluon", "nd", "rnn"]


def __getattr__(name: str) -> ModuleType:
    # ``fusedrnn.rnn`` imports this package, and needs no layers.
    if name == "gluon":
        return import_module("fusedrnn.mxnet.gluon")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
