"""Cells with layer normalization: means and variances over the units of a row.

The scales and biases of the normalization are vectors of the cells. The bias of a product is added before the
normalization. Specs with ``bias="none"`` have the equations and the number of parameters of the papers and of haste
(https://github.com/lmnt-com/haste).
"""

from typing import Any

from fusedrnn.cell import cell, layer_norm, relu, sigmoid, tanh

__all__ = ["layer_norm_dreamer_gru", "layer_norm_gru", "layer_norm_li_gru", "layer_norm_lstm"]


@cell(
    gates="i f g o", states="h c", vectors="x_i x_f x_g x_o h_i h_f h_g h_o b_i b_f b_g b_o gamma beta",
    initial={f"{part}_{gate}": float(part != "b") for part in "xhb" for gate in "ifgo"} | {"gamma": 1.0, "beta": 0.0},
)  # fmt: skip
def layer_norm_lstm(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Ba et al., Layer Normalization (2016), https://arxiv.org/abs/1607.06450: normalizes all gates together, and c."""
    h = recurrent(s.h)
    from_x, from_h = layer_norm(x.i, x.f, x.g, x.o), layer_norm(h.i, h.f, h.g, h.o)
    scales = (p.x_i, p.h_i, p.b_i), (p.x_f, p.h_f, p.b_f), (p.x_g, p.h_g, p.b_g), (p.x_o, p.h_o, p.b_o)
    i, f, g, o = (u * a + v * b + bias for a, b, (u, v, bias) in zip(from_x, from_h, scales, strict=True))
    c = sigmoid(f) * s.c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(p.gamma * layer_norm(c) + p.beta), c


@cell(
    gates="z r n", vectors="x_z x_r x_n h_z h_r h_n b_z b_r b_n d_n",
    initial={f"{part}_{gate}": float(part != "b") for part in "xhb" for gate in "zrn"} | {"d_n": 0.0},
)  # fmt: skip
def layer_norm_gru(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Ba et al., Layer Normalization (2016), https://arxiv.org/abs/1607.06450, as in haste: r multiplies U h."""
    h = recurrent(s.h)
    (z, r, n), (h_z, h_r, h_n) = layer_norm(x.z, x.r, x.n), layer_norm(h.z, h.r, h.n)
    z = sigmoid(p.x_z * z + p.h_z * h_z + p.b_z)
    r = sigmoid(p.x_r * r + p.h_r * h_r + p.b_r)
    n = tanh(p.x_n * n + p.b_n + r * (p.h_n * h_n + p.d_n))
    return n + z * (s.h - n)


@cell(
    gates="z n", vectors="gamma_z gamma_n beta_z beta_n",
    initial={"gamma_z": 1.0, "gamma_n": 1.0, "beta_z": 0.0, "beta_n": 0.0},
)  # fmt: skip
def layer_norm_li_gru(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Ravanelli et al., Light Gated Recurrent Units for Speech Recognition (2018), with layer normalization.

    https://arxiv.org/abs/1803.10225; the paper has batch normalization where this cell has layer normalization of the
    input.
    """
    h, (z, n) = recurrent(s.h), layer_norm(x.z, x.n)
    n = relu(p.gamma_n * n + p.beta_n + h.n)
    return n + sigmoid(p.gamma_z * z + p.beta_z + h.z) * (s.h - n)


@cell(
    gates="r n u", vectors="gamma_r gamma_n gamma_u beta_r beta_n beta_u",
    initial={f"{name}_{gate}": float(name == "gamma") for name in ("gamma", "beta") for gate in "rnu"},
)  # fmt: skip
def layer_norm_dreamer_gru(x: Any, recurrent: Any, s: Any, p: Any) -> Any:
    """Hafner et al., Mastering Diverse Domains through World Models (2023), https://arxiv.org/abs/2301.04104.

    The sums of all gates are normalized together; ``with_heads(8)`` has DreamerV3's blocks.
    """
    h = recurrent(s.h)
    r, n, u = layer_norm(x.r + h.r, x.n + h.n, x.u + h.u)
    n = tanh(sigmoid(p.gamma_r * r + p.beta_r) * (p.gamma_n * n + p.beta_n))
    return s.h + sigmoid(p.gamma_u * u + p.beta_u - 1.0) * (n - s.h)
