"""Cells with several recurrent products in a step: of states, of gates, and of values computed from them.

Gates that come from a product alone have no input weights.
"""

from typing import Any

from fusedrnn.cell import Activation, cell, sigmoid, softplus, tanh

__all__ = [
    "co_rnn", "dsgu", "mi_ru", "minimal_rnn", "mut1", "mut2", "mut3", "recurrent_highway", "res_lstm", "scrn", "sgu",
    "wmc_lstm",
]  # fmt: skip
_hard_sigmoid: Any = Activation("hard_sigmoid")


@cell(
    gates="y z", states="y z", scalars="dt gamma epsilon", initial={"dt": 0.1, "gamma": 1.0, "epsilon": 1.0},
)  # fmt: skip
def co_rnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Rusch and Mishra, Coupled Oscillatory Recurrent Neural Network (2020), https://arxiv.org/abs/2010.00951.

    In the paper, dt, γ and ε are hyperparameters.
    """
    force = tanh(x.y + recurrent(s.y).y + recurrent(s.z).z)
    z = s.z + p.dt * (force - p.gamma * s.y - p.epsilon * s.z)
    return s.y + p.dt * z, z


@cell(gates="u v z")
def minimal_rnn(x: Any, recurrent: Any, s: Any) -> Any:
    """Chen, MinimalRNN (2017), https://arxiv.org/abs/1711.06788; the input passes through one layer with tanh."""
    z = tanh(x.z)
    return z + sigmoid(recurrent(s.h).u + recurrent(z).v) * (s.h - z)


@cell(gates="r n", scalars="rate", initial={"rate": 0.5})
def mi_ru(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Minion recurrent unit (2026), https://doi.org/10.1016/j.neucom.2026.132847; its rate is a hyperparameter."""
    r = sigmoid(x.r + recurrent(s.h).r)
    n = tanh(x.n + recurrent(r * s.h).n)
    return n + p.rate * (s.h - n)


@cell(gates="r n z")
def mut1(x: Any, recurrent: Any, s: Any) -> Any:
    """Jozefowicz et al., An Empirical Exploration of Recurrent Network Architectures (2015): MUT1.

    https://proceedings.mlr.press/v37/jozefowicz15.html; here tanh is of a projection of x, for any number of features.
    """
    r = sigmoid(x.r + recurrent(s.h).r)
    n = tanh(tanh(x.n) + recurrent(r * s.h).n)
    return s.h + sigmoid(x.z) * (n - s.h)


@cell(gates="z r n")
def mut2(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`mut1`'s MUT2, https://proceedings.mlr.press/v37/jozefowicz15.html; here r has a projection of x, not x."""
    h = recurrent(s.h)
    n = tanh(x.n + recurrent(sigmoid(x.r + h.r) * s.h).n)
    return s.h + sigmoid(x.z + h.z) * (n - s.h)


@cell(gates="r z n")
def mut3(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`mut1`'s MUT3, https://proceedings.mlr.press/v37/jozefowicz15.html."""
    r = sigmoid(x.r + recurrent(s.h).r)
    z = sigmoid(x.z + recurrent(tanh(s.h)).z)
    n = tanh(x.n + recurrent(r * s.h).n)
    return s.h + z * (n - s.h)


@cell(gates="h1 t1 h2 t2 h3 t3")
def recurrent_highway(x: Any, recurrent: Any, s: Any) -> Any:
    """Zilly et al., Recurrent Highway Networks (2016), https://arxiv.org/abs/1607.03474: depth 3, coupled gates."""
    u = recurrent(s.h)
    h = s.h + sigmoid(x.t1 + u.t1) * (tanh(x.h1 + u.h1) - s.h)
    u = recurrent(h)
    h = h + sigmoid(u.t2) * (tanh(u.h2) - h)
    u = recurrent(h)
    return h + sigmoid(u.t3) * (tanh(u.h3) - h)


@cell(gates="i f g o p r", states="h c", vectors="v_i v_f v_o")
def res_lstm(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Kim et al., Residual LSTM (2017), https://arxiv.org/abs/1701.03360, with peepholes and a projected shortcut."""
    h = recurrent(s.h)
    i, f = sigmoid(x.i + h.i + p.v_i * s.c), sigmoid(x.f + h.f + p.v_f * s.c)
    c = f * s.c + i * tanh(x.g + h.g)
    return sigmoid(x.o + h.o + p.v_o * c) * (recurrent(tanh(c)).p + x.r), c


@cell(gates="h p c", states="h c", scalars="alpha", initial={"alpha": 0.95})
def scrn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Mikolov et al., Learning Longer Memory in Recurrent Neural Networks (2014), https://arxiv.org/abs/1412.7753.

    The output is h; the context c is the second state. In the paper, α is a hyperparameter.
    """
    c = x.c + p.alpha * (s.c - x.c)
    return sigmoid(x.h + recurrent(s.h).h + recurrent(c).p), c


@cell(gates="g z")
def sgu(x: Any, recurrent: Any, s: Any) -> Any:
    """Gao and Glowacka, Deep Gate Recurrent Neural Network (2016), https://arxiv.org/abs/1604.02910: simple unit."""
    g = tanh(recurrent(x.g * s.h).g)
    return s.h + _hard_sigmoid(x.z + recurrent(s.h).z) * (softplus(g * s.h) - s.h)


@cell(gates="g z o")
def dsgu(x: Any, recurrent: Any, s: Any) -> Any:
    """:data:`sgu` with a projection of its output and a sigmoid, https://arxiv.org/abs/1604.02910: the deep unit."""
    g = tanh(recurrent(x.g * s.h).g)
    z = _hard_sigmoid(x.z + recurrent(s.h).z)
    return s.h + z * (sigmoid(recurrent(g * s.h).o) - s.h)


@cell(gates="i f g o u v w", states="h c")
def wmc_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Landi et al., Working Memory Connections for LSTM (2021), https://arxiv.org/abs/2109.00020."""
    h, m = recurrent(s.h), recurrent(s.c)
    i, f = sigmoid(x.i + h.i + tanh(m.u)), sigmoid(x.f + h.f + tanh(m.v))
    c = f * s.c + i * tanh(x.g + h.g)
    return sigmoid(x.o + h.o + tanh(recurrent(c).w)) * tanh(c), c
