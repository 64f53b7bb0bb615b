"""LSTM, GRU and vanilla RNN as textbooks print them: to read first, and to test everything else against.

One direction of one layer. ``x`` (T, N, I) is the input, ``h`` and ``c`` (N, H) the initial states, ``W`` (G·H, I) and
``U`` (G·H, H) the weights of input and state, ``b`` and ``d`` (G·H,) their biases. Forward returns the outputs
(T, N, H), the final states, and what backward needs of each step. Backward takes the gradients of the outputs and of
the final states, and returns those of x, W, U, b, d and the initial states.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedrnn.arrays import Array


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def lstm(x: Array, h: Array, c: Array, W: Array, U: Array, b: Array, d: Array) -> tuple[Any, ...]:
    """Gates i, f, g, o."""
    y, saved = [], []
    for x_t in x:
        a_i, a_f, a_g, a_o = np.split(x_t @ W.T + b + h @ U.T + d, 4, axis=1)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        saved.append((h, c, i, f, g, o))
        c = f * c + i * g
        h = o * np.tanh(c)
        y.append(h)
    return np.stack(y), h, c, saved


def lstm_backward(x: Array, saved: list[Any], W: Array, U: Array, dy: Array, dh: Array, dc: Array) -> tuple[Any, ...]:
    """The gradients of :func:`lstm`."""
    da = np.empty((*x.shape[:2], len(W)), x.dtype)
    for t in reversed(range(len(x))):
        _, c, i, f, g, o = saved[t]
        tanh_c = np.tanh(f * c + i * g)
        dh = dh + dy[t]
        dc = dc + dh * o * (1 - tanh_c**2)
        di, df, dg, do = dc * g, dc * c, dc * i, dh * tanh_c
        da[t] = np.hstack([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)])
        dh, dc = da[t] @ U, dc * f
    return *_weight_gradients(x, np.stack([h for h, *_ in saved]), W, da, da), dh, dc


def gru(x: Array, h: Array, W: Array, U: Array, b: Array, d: Array) -> tuple[Any, ...]:
    """Gates r, z, n; r multiplies the recurrent product, as in cuDNN and PyTorch."""
    y, saved = [], []
    for x_t in x:
        x_r, x_z, x_n = np.split(x_t @ W.T + b, 3, axis=1)
        h_r, h_z, h_n = np.split(h @ U.T + d, 3, axis=1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = np.tanh(x_n + r * h_n)
        saved.append((h, r, z, n, h_n))
        h = (1 - z) * n + z * h
        y.append(h)
    return np.stack(y), h, saved


def gru_backward(x: Array, saved: list[Any], W: Array, U: Array, dy: Array, dh: Array) -> tuple[Any, ...]:
    """The gradients of :func:`gru`."""
    da_x, da_h = np.empty((2, *x.shape[:2], len(W)), x.dtype)
    for t in reversed(range(len(x))):
        h, r, z, n, h_n = saved[t]
        dh = dh + dy[t]
        dz, dn = dh * (h - n) * z * (1 - z), dh * (1 - z) * (1 - n**2)
        dr = dn * h_n * r * (1 - r)
        da_x[t], da_h[t] = np.hstack([dr, dz, dn]), np.hstack([dr, dz, dn * r])
        dh = dh * z + da_h[t] @ U
    return *_weight_gradients(x, np.stack([h for h, *_ in saved]), W, da_x, da_h), dh


def gru_reset_before(x: Array, h: Array, W: Array, U: Array, b: Array, d: Array) -> tuple[Any, ...]:
    """Gates r, z, n; r multiplies the state, as in Cho et al. (2014)."""
    H = h.shape[1]
    y, saved = [], []
    for x_t in x:
        x_r, x_z, x_n = np.split(x_t @ W.T + b, 3, axis=1)
        h_r, h_z = np.split(h @ U[: 2 * H].T + d[: 2 * H], 2, axis=1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = np.tanh(x_n + (r * h) @ U[2 * H :].T + d[2 * H :])
        saved.append((h, r, z, n))
        h = (1 - z) * n + z * h
        y.append(h)
    return np.stack(y), h, saved


def gru_reset_before_backward(x: Array, saved: list[Any], W: Array, U: Array, dy: Array, dh: Array) -> tuple[Any, ...]:
    """The gradients of :func:`gru_reset_before`."""
    H = dh.shape[1]
    da = np.empty((*x.shape[:2], len(W)), x.dtype)
    for t in reversed(range(len(x))):
        h, r, z, n = saved[t]
        dh = dh + dy[t]
        dz, dn = dh * (h - n) * z * (1 - z), dh * (1 - z) * (1 - n**2)
        drh = dn @ U[2 * H :]  # the gradient of r·h
        dr = drh * h * r * (1 - r)
        da[t] = np.hstack([dr, dz, dn])
        dh = dh * z + drh * r + da[t][:, : 2 * H] @ U[: 2 * H]
    dx, dW, dU, db, dd = _weight_gradients(x, np.stack([h for h, *_ in saved]), W, da, da)
    rh = np.stack([r * h for h, r, *_ in saved])
    dU[2 * H :] = np.tensordot(da[:, :, 2 * H :], rh, ((0, 1), (0, 1)))
    return dx, dW, dU, db, dd, dh


def rnn(x: Array, h: Array, W: Array, U: Array, b: Array, d: Array, relu: bool = False) -> tuple[Any, ...]:
    """One gate, with tanh or ReLU."""
    y, saved = [], []
    for x_t in x:
        saved.append(h)
        a = x_t @ W.T + b + h @ U.T + d
        h = np.maximum(a, 0) if relu else np.tanh(a)
        y.append(h)
    return np.stack(y), h, saved


def rnn_backward(
    x: Array, saved: list[Any], W: Array, U: Array, y: Array, dy: Array, dh: Array, relu: bool = False
) -> tuple[Any, ...]:
    """The gradients of :func:`rnn`, whose output is ``y``."""
    da = np.empty((*x.shape[:2], len(W)), x.dtype)
    for t in reversed(range(len(x))):
        da[t] = (dh + dy[t]) * ((y[t] > 0) if relu else 1 - y[t] ** 2)
        dh = da[t] @ U
    return *_weight_gradients(x, np.stack(saved), W, da, da), dh


def _weight_gradients(x: Array, h: Array, W: Array, da_x: Array, da_h: Array) -> tuple[Any, ...]:
    """The gradients of x, W, U, b and d, from those of the two parts of the pre-activations."""
    dW, dU = np.tensordot(da_x, x, ((0, 1), (0, 1))), np.tensordot(da_h, h, ((0, 1), (0, 1)))
    return da_x @ W, dW, dU, da_x.sum(axis=(0, 1)), da_h.sum(axis=(0, 1))
