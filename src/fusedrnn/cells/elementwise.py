"""Cells without recurrent weights: each unit reads only its own states, so the input GEMM bounds the time of a step.

The parameters hold neither recurrent weights nor their biases.
"""

from typing import Any

from fusedrnn.cell import cell, relu, sigmoid, softplus, tanh, where

__all__ = ["brc", "ind_rnn", "min_gru", "min_gru_log", "min_lstm", "min_lstm_log", "qrnn_f", "qrnn_fo", "qrnn_ifo",
           "sru", "sru_projected", "t_gru", "t_lstm", "t_rnn", "unicornn"]  # fmt: skip


@cell(gates="a", vectors="u", initial={"u": (0.0, 1.0)})
def ind_rnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Li et al., Independently Recurrent Neural Network (2018), https://arxiv.org/abs/1803.04831."""
    return relu(x.a + p.u * s.h)


@cell(gates="z f r", states="c", output="h", vectors="v_f v_r")
def sru(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Lei et al., Simple Recurrent Units for Highly Parallelizable Recurrence (2018), https://arxiv.org/abs/1709.02755.

    The highway connection reads the input itself, which has as many features as there are units. In the paper, the bias
    of z is zero.
    """
    f, r = sigmoid(x.f + p.v_f * s.c), sigmoid(x.r + p.v_r * s.c)
    c = x.z + f * (s.c - x.z)
    return x.raw + r * (c - x.raw), c


@cell(gates="z f r k", states="c", output="h", vectors="v_f v_r")
def sru_projected(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """:data:`sru` for any number of features, https://arxiv.org/abs/1709.02755: gate k is the highway's input."""
    f, r = sigmoid(x.f + p.v_f * s.c), sigmoid(x.r + p.v_r * s.c)
    c = x.z + f * (s.c - x.z)
    return x.k + r * (c - x.k), c


@cell(gates="z f")
def qrnn_f(x: Any, recurrent: Any, s: Any) -> Any:
    """Bradbury et al., Quasi-Recurrent Neural Networks (2016), https://arxiv.org/abs/1611.01576: f-pooling.

    The convolution has width 1; for width 2, let the input hold the features of the previous step too.
    """
    z = tanh(x.z)
    return z + sigmoid(x.f) * (s.h - z)


@cell(gates="z f o", states="c", output="h")
def qrnn_fo(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`qrnn_f` with fo-pooling, https://arxiv.org/abs/1611.01576."""
    z = tanh(x.z)
    c = z + sigmoid(x.f) * (s.c - z)
    return sigmoid(x.o) * c, c


@cell(gates="z i f o", states="c", output="h")
def qrnn_ifo(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`qrnn_f` with ifo-pooling, https://arxiv.org/abs/1611.01576."""
    c = sigmoid(x.f) * s.c + sigmoid(x.i) * tanh(x.z)
    return sigmoid(x.o) * c, c


@cell(gates="z n")
def min_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Feng et al., Were RNNs All We Needed? (2024), https://arxiv.org/abs/2410.01201: minGRU."""
    return s.h + sigmoid(x.z) * (x.n - s.h)


@cell(gates="z n")
def min_gru_log(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`min_gru` as its log-space form defines it, https://arxiv.org/abs/2410.01201: candidates are positive."""
    return s.h + sigmoid(x.z) * (where(x.n < 0, sigmoid(x.n), x.n + 0.5) - s.h)


@cell(gates="f i n")
def min_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Feng et al., Were RNNs All We Needed? (2024), https://arxiv.org/abs/2410.01201: minLSTM, f and i normalized."""
    f, i = sigmoid(x.f), sigmoid(x.i)
    return (f * s.h + i * x.n) / (f + i)


@cell(gates="f i n")
def min_lstm_log(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`min_lstm` as its log-space form defines it, https://arxiv.org/abs/2410.01201: candidates are positive."""
    f = sigmoid(softplus(-x.i) - softplus(-x.f))
    n = where(x.n < 0, sigmoid(x.n), x.n + 0.5)
    return n + f * (s.h - n)


@cell(gates="a c n", vectors="w_a w_c")
def brc(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Vecoven et al., A bio-inspired bistable recurrent cell (2020), https://arxiv.org/abs/2006.05252."""
    n = tanh(x.n + (1.0 + tanh(x.a + p.w_a * s.h)) * s.h)
    return n + sigmoid(x.c + p.w_c * s.h) * (s.h - n)


@cell(gates="z f")
def t_rnn(x: Any, recurrent: Any, s: Any) -> Any:
    """Balduzzi and Ghifary, Strongly-Typed Recurrent Neural Networks (2016), https://arxiv.org/abs/1602.02218."""
    return x.z + sigmoid(x.f) * (s.h - x.z)


@cell(gates="z f o")
def t_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`t_rnn` as a GRU, https://arxiv.org/abs/1602.02218; the input must also hold the previous step's."""
    return sigmoid(x.f) * s.h + x.z * tanh(x.o)


@cell(gates="z f o", states="c", output="h")
def t_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`t_rnn` as an LSTM, https://arxiv.org/abs/1602.02218; the input must also hold the previous step's."""
    c = x.z + sigmoid(x.f) * (s.c - x.z)
    return c * tanh(x.o), c


@cell(
    gates="a", states="y z", vectors="w c", scalars="dt alpha",
    initial={"w": (0.0, 1.0), "c": (-0.1, 0.1), "dt": 0.1, "alpha": 1.0},
)  # fmt: skip
def unicornn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Rusch and Mishra, UnICORNN (2021), https://arxiv.org/abs/2103.05487, where dt and alpha are hyperparameters."""
    dt = p.dt * sigmoid(p.c)
    z = s.z - dt * (tanh(x.a + p.w * s.y) + p.alpha * s.y)
    return s.y + dt * z, z
