"""LSTM and GRU with random masks inside a step, at the rates of their papers.

A rate is a constant of a cell. To change rates, name the masks: ``zoneout_lstm.with_rates(c=0.3, h=0.1)``.
"""

from typing import Any

from fusedrnn.cell import cell, dropout, sigmoid, tanh, zoneout

__all__ = ["dropout_gru", "dropout_lstm", "variational_gru", "variational_lstm", "zoneout_gru", "zoneout_lstm"]


@cell(gates="i f g o", states="h c")
def zoneout_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Krueger et al., Zoneout (2017), https://arxiv.org/abs/1606.01305, with rate 0.5 for c and 0.05 for h."""
    h = recurrent(s.h)
    c = sigmoid(x.f + h.f) * s.c + sigmoid(x.i + h.i) * tanh(x.g + h.g)
    h = sigmoid(x.o + h.o) * tanh(c)
    return zoneout("h", s.h, h, 0.05), zoneout("c", s.c, c, 0.5)


@cell(gates="r z n")
def zoneout_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Krueger et al., Zoneout (2017), https://arxiv.org/abs/1606.01305, with rate 0.1."""
    h = recurrent(s.h)
    n = tanh(x.n + sigmoid(x.r + h.r) * h.n)
    return zoneout("h", s.h, n + sigmoid(x.z + h.z) * (s.h - n), 0.1)


@cell(gates="i f g o", states="h c")
def dropout_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Semeniuta et al., Recurrent Dropout without Memory Loss (2016), https://arxiv.org/abs/1603.05118, rate 0.25."""
    h = recurrent(s.h)
    c = sigmoid(x.f + h.f) * s.c + sigmoid(x.i + h.i) * dropout("g", tanh(x.g + h.g), 0.25)
    return sigmoid(x.o + h.o) * tanh(c), c


@cell(gates="r z n")
def dropout_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Semeniuta et al., Recurrent Dropout without Memory Loss (2016), https://arxiv.org/abs/1603.05118, rate 0.25."""
    h = recurrent(s.h)
    n, z = tanh(x.n + sigmoid(x.r + h.r) * h.n), sigmoid(x.z + h.z)
    return (1.0 - z) * dropout("n", n, 0.25) + z * s.h


@cell(gates="i f g o", states="h c")
def variational_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Gal and Ghahramani, Dropout in Recurrent Neural Networks (2016), https://arxiv.org/abs/1512.05287, rate 0.25.

    The cell has the mask of h, the same for all gates and steps. For the mask of the input, use dropout before the
    layer.
    """
    h = recurrent(dropout("h", s.h, 0.25, per="sequence"))
    c = sigmoid(x.f + h.f) * s.c + sigmoid(x.i + h.i) * tanh(x.g + h.g)
    return sigmoid(x.o + h.o) * tanh(c), c


@cell(gates="r z n")
def variational_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Gal and Ghahramani, Dropout in Recurrent Neural Networks (2016), https://arxiv.org/abs/1512.05287, rate 0.25.

    The cell has the mask of h in products, the same for all gates and steps. For the mask of the input, use dropout
    before the layer.
    """
    h = recurrent(dropout("h", s.h, 0.25, per="sequence"))
    n = tanh(x.n + sigmoid(x.r + h.r) * h.n)
    return n + sigmoid(x.z + h.z) * (s.h - n)
