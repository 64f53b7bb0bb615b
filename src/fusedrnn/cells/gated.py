"""Cells whose gates read the input and, through recurrent weights, the output of the previous step."""

from typing import Any

from fusedrnn.cell import cell, exp, maximum, relu, sigmoid, softplus, tanh

__all__ = [
    "antisymmetric_rnn", "atr", "cfc", "chaos_free_network", "dreamer_gru", "fast_grnn", "fast_rnn", "flash_gru",
    "flash_lstm", "gated_antisymmetric_rnn", "intersection_rnn", "janet", "lem", "li_gru", "light_ru", "ltc", "mc_lstm",
    "minimal_gated_unit", "multiplicative_lstm", "nas", "nbrc", "original_lstm", "ran", "sgrn", "slstm", "star",
    "ugrnn",
]  # fmt: skip


@cell(gates="f n")
def minimal_gated_unit(x: Any, recurrent: Any, s: Any) -> Any:
    """Zhou et al., Minimal Gated Unit for Recurrent Neural Networks (2016), https://arxiv.org/abs/1603.09420."""
    f = sigmoid(x.f + recurrent(s.h).f)
    n = tanh(x.n + recurrent(f * s.h).n)
    return s.h + f * (n - s.h)


@cell(gates="f c")
def janet(x: Any, recurrent: Any, s: Any) -> Any:
    """Van der Westhuizen and Lasenby, The unreasonable effectiveness of the forget gate (2018), with β = 1.

    https://arxiv.org/abs/1804.04849
    """
    h = recurrent(s.h)
    f = x.f + h.f
    return sigmoid(f) * s.h + (1.0 - sigmoid(f - 1.0)) * tanh(x.c + h.c)


@cell(gates="g c")
def ugrnn(x: Any, recurrent: Any, s: Any) -> Any:
    """Collins et al., Capacity and Trainability in Recurrent Neural Networks (2017), https://arxiv.org/abs/1611.09913."""
    h = recurrent(s.h)
    c = tanh(x.c + h.c)
    return c + sigmoid(x.g + h.g) * (s.h - c)


@cell(gates="z n")
def li_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Ravanelli et al., Light Gated Recurrent Units for Speech Recognition (2018), without batch normalization.

    https://arxiv.org/abs/1803.10225
    """
    h = recurrent(s.h)
    n = relu(x.n + h.n)
    return n + sigmoid(x.z + h.z) * (s.h - n)


@cell(gates="a b t")
def cfc(x: Any, recurrent: Any, s: Any) -> Any:
    """Hasani et al., Closed-form continuous-time neural networks (2022), without backbone, at steps of time 1.

    https://arxiv.org/abs/2106.13898
    """
    h = recurrent(s.h)
    a = tanh(x.a + h.a)
    return a + sigmoid(x.t + h.t) * (tanh(x.b + h.b) - a)


@cell(
    gates="c", vectors="bias_z bias_h", scalars="zeta nu",
    initial={"bias_z": 1.0, "bias_h": 1.0, "zeta": 1.0, "nu": -4.0},
)  # fmt: skip
def fast_grnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Kusupati et al., FastGRNN (2018), https://arxiv.org/abs/1901.02358; its biases are vectors here."""
    c = x.c + recurrent(s.h).c
    z = sigmoid(c + p.bias_z)
    return (sigmoid(p.zeta) * (1.0 - z) + sigmoid(p.nu)) * tanh(c + p.bias_h) + z * s.h


@cell(gates="r z n")
def flash_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Pöppel et al., FlashRNN (2024), https://arxiv.org/abs/2412.07752: the GRU, for ``flash_gru.with_heads(8)``."""
    h = recurrent(s.h)
    n = tanh(x.n + sigmoid(x.r + h.r) * h.n)
    return n + sigmoid(x.z + h.z) * (s.h - n)


@cell(gates="i f g o", states="h c")
def flash_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Pöppel et al., FlashRNN (2024), https://arxiv.org/abs/2412.07752: the LSTM, for ``flash_lstm.with_heads(8)``."""
    h = recurrent(s.h)
    c = sigmoid(x.f + h.f) * s.c + sigmoid(x.i + h.i) * tanh(x.g + h.g)
    return sigmoid(x.o + h.o) * tanh(c), c


@cell(gates="a b z y", states="y z")
def lem(x: Any, recurrent: Any, s: Any) -> Any:
    """Rusch et al., Long Expressive Memory for Sequence Modeling (2022), with Δt = 1.

    https://arxiv.org/abs/2110.04744
    """
    y = recurrent(s.y)
    z = s.z + sigmoid(x.a + y.a) * (tanh(x.z + y.z) - s.z)
    return s.y + sigmoid(x.b + y.b) * (tanh(x.y + recurrent(z).y) - s.y), z


@cell(gates="m i f g o", states="h c")
def multiplicative_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Krause et al., Multiplicative LSTM for sequence modelling (2016), https://arxiv.org/abs/1609.07959."""
    m = recurrent(x.m * recurrent(s.h).m)
    c = sigmoid(x.f + m.f) * s.c + sigmoid(x.i + m.i) * tanh(x.g + m.g)
    return tanh(c) * sigmoid(x.o + m.o), c


@cell(gates="i f z o", states="h c n m")
def slstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Beck et al., xLSTM (2024), https://arxiv.org/abs/2405.04517: exponential gates, of one head.

    ``slstm.with_heads(4)`` has four.
    The states c and n are those of the paper times exp(-m). The state m keeps them in range; h does not depend on it.
    """
    h = recurrent(s.h)
    i, f = x.i + h.i, -softplus(-(x.f + h.f)) + s.m
    m = maximum(f, i)
    c = exp(f - m) * s.c + exp(i - m) * tanh(x.z + h.z)
    n = exp(f - m) * s.n + exp(i - m)
    return sigmoid(x.o + h.o) * c / n, c, n, m


@cell(gates="i f c", states="h c")
def ran(x: Any, recurrent: Any, s: Any) -> Any:
    """Lee et al., Recurrent Additive Networks (2017), https://arxiv.org/abs/1705.07393, with h = tanh(c)."""
    h = recurrent(s.h)
    c = sigmoid(x.i + h.i) * x.c + sigmoid(x.f + h.f) * s.c
    return tanh(c), c


@cell(gates="r n u")
def dreamer_gru(x: Any, recurrent: Any, s: Any) -> Any:
    """Hafner et al., Mastering Diverse Domains through World Models (2023), https://arxiv.org/abs/2301.04104.

    This is the last layer of DreamerV3's block GRU, without normalization; ``dreamer_gru.with_heads(8)`` has its
    blocks.
    """
    h = recurrent(s.h)
    n = tanh(sigmoid(x.r + h.r) * (x.n + h.n))
    return s.h + sigmoid(x.u + h.u - 1.0) * (n - s.h)


@cell(gates="k z")
def star(x: Any, recurrent: Any, s: Any) -> Any:
    """Turkoglu et al., Gating Revisited: Deep Multi-layer RNNs That Can Be Trained (2019).

    https://arxiv.org/abs/1911.11033
    """
    return tanh(s.h + sigmoid(x.k + recurrent(s.h).k) * (tanh(x.z) - s.h))


@cell(gates="a c n")
def nbrc(x: Any, recurrent: Any, s: Any) -> Any:
    """Vecoven et al., A bio-inspired bistable recurrent cell (2020), the neuromodulated cell.

    https://arxiv.org/abs/2006.05252
    """
    h = recurrent(s.h)
    n = tanh(x.n + (1.0 + tanh(x.a + h.a)) * s.h)
    return n + sigmoid(x.c + h.c) * (s.h - n)


@cell(gates="t e n", initial={"t.bias": 1.0, "e.bias": -1.0})
def chaos_free_network(x: Any, recurrent: Any, s: Any) -> Any:
    """Laurent and von Brecht, A recurrent neural network without chaos (2016), https://arxiv.org/abs/1612.06212."""
    h = recurrent(s.h)
    return sigmoid(x.t + h.t) * tanh(s.h) + sigmoid(x.e + h.e) * tanh(x.n)


@cell(gates="a", scalars="epsilon gamma", initial={"epsilon": 0.01, "gamma": 0.01})
def antisymmetric_rnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Chang et al., AntisymmetricRNN (2019), https://arxiv.org/abs/1902.09689, for recurrent weights W - Wᵀ.

    torch.nn.utils.parametrize can tie weights in this way. In the paper, ε and γ are hyperparameters.
    """
    return s.h + p.epsilon * tanh(x.a + recurrent(s.h).a - p.gamma * s.h)


@cell(gates="a z", scalars="epsilon gamma", initial={"epsilon": 0.01, "gamma": 0.01})
def gated_antisymmetric_rnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """:data:`antisymmetric_rnn` with a gate that has the same recurrent product, https://arxiv.org/abs/1902.09689."""
    u = recurrent(s.h).a - p.gamma * s.h
    return s.h + p.epsilon * sigmoid(x.z + u) * tanh(x.a + u)


@cell(gates="a")
def atr(x: Any, recurrent: Any, s: Any) -> Any:
    """Zhang et al., Addition-Subtraction Twin-Gated Recurrent Network (2018), https://arxiv.org/abs/1810.12546."""
    q = recurrent(s.h).a
    return sigmoid(x.a + q) * x.a + sigmoid(x.a - q) * s.h


@cell(gates="c", scalars="alpha beta", initial={"alpha": -3.0, "beta": 3.0})
def fast_rnn(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Kusupati et al., FastGRNN (2018), https://arxiv.org/abs/1901.02358: FastRNN, without gates."""
    return sigmoid(p.alpha) * tanh(x.c + recurrent(s.h).c) + sigmoid(p.beta) * s.h


@cell(gates="a b u v", output="y")
def intersection_rnn(x: Any, recurrent: Any, s: Any) -> Any:
    """Collins et al., Capacity and Trainability in Recurrent Neural Networks (2017), https://arxiv.org/abs/1611.09913.

    This is the +RNN. Its output is a weighted mean that includes the input, which has as many features as there are
    units.
    """
    h = recurrent(s.h)
    y, n = relu(x.a + h.a), tanh(x.b + h.b)
    return y + sigmoid(x.u + h.u) * (x.raw - y), n + sigmoid(x.v + h.v) * (s.h - n)


@cell(gates="f n")
def light_ru(x: Any, recurrent: Any, s: Any) -> Any:
    """Ye et al., Light Recurrent Unit (2024), https://doi.org/10.3390/electronics13163204."""
    return s.h + sigmoid(x.f + recurrent(s.h).f) * (tanh(x.n) - s.h)


@cell(gates="f", vectors="a leak", scalars="dt", initial={"leak": 1.0, "dt": 1.0})
def ltc(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Hasani et al., Liquid Time-constant Networks (2020), https://arxiv.org/abs/2006.04439.

    This is one step of the fused solver of the paper, where f is a sigmoid and the leak is 1 / τ. For six steps for
    each input, repeat each input six times and let dt be 1 / 6.
    """
    f = sigmoid(x.f + recurrent(s.h).f)
    return (s.h + p.dt * f * p.a) / (1.0 + p.dt * (p.leak + f))


@cell(gates="f i o m n", states="v c", output="h")
def mc_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Memory-controller LSTM of a workshop paper (2017), as https://arxiv.org/abs/2510.21252 has it: v is recurrent."""
    v = recurrent(s.v)
    c = sigmoid(x.f + v.f) * s.c + sigmoid(x.i + v.i) * tanh(x.n + v.n)
    return sigmoid(x.o + v.o) * tanh(c), sigmoid(x.m + v.m) * tanh(c), c


@cell(gates="a b c d e f i j", states="h c")
def nas(x: Any, recurrent: Any, s: Any) -> Any:
    """Zoph and Le, Neural Architecture Search (2016), https://arxiv.org/abs/1611.01578: the language cell."""
    h = recurrent(s.h)
    u = tanh(sigmoid(x.a + h.a) * relu(x.b + h.b))
    c = tanh(u + s.c) * tanh(sigmoid(x.c + h.c) + relu(x.d * h.d))
    v = tanh(tanh(x.e + h.e) * sigmoid(x.f + h.f))
    return tanh(c * tanh(v + sigmoid(tanh(x.i + h.i) + sigmoid(x.j + h.j)))), c


@cell(gates="i g o", states="h c")
def original_lstm(x: Any, recurrent: Any, s: Any) -> Any:
    """Hochreiter and Schmidhuber, Long Short-Term Memory (1997), https://doi.org/10.1162/neco.1997.9.8.1735.

    There is no forget gate. The paper's two functions, between -2 and 2 and between -1 and 1, are written as tanh.
    """
    h = recurrent(s.h)
    c = s.c + 2.0 * sigmoid(x.i + h.i) * tanh(0.5 * (x.g + h.g))
    return sigmoid(x.o + h.o) * tanh(0.5 * c), c


@cell(gates="a")
def sgrn(x: Any, recurrent: Any, s: Any) -> Any:
    """Simple gated recurrent network (2021), https://doi.org/10.1049/gtd2.12056."""
    return tanh(x.a + sigmoid(x.a + recurrent(s.h).a) * (s.h - x.a))
