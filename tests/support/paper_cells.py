"""The catalogue of cells as the papers print them: an oracle of torch's functions in float64, with its autograd."""

from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

from fusedrnn import RNNOp, RNNSpec, cells
from fusedrnn.cell import cell, mean, sigmoid, tanh, variance
from fusedrnn.cells import noisy
from fusedrnn.engines.interface import SAVE_POLICIES
from fusedrnn.testing.tolerance import longest_sum, tolerance
from problems import assert_close, assert_gradients_close, problem_of
from variants import Steps, recorded, variant_results


class PaperSteps(Steps):
    """A direction of a layer of a cell in the catalogue, not written in the package's language."""

    def __init__(self, spec, weights):
        self.spec, self.w, self.margin = spec, dict(weights), np.inf
        if spec.heads > 1:
            gates = weights["h2h_weight"].split(spec.hidden_size)
            blocks = [torch.block_diag(*gate.split(spec.hidden_size // spec.heads)) for gate in gates]
            self.w["h2h_weight"] = torch.cat(blocks)

    def __call__(self, x, states):
        self.x = x
        return getattr(self, self.spec.mode_name)(*states)

    def sums(self, operand, first, last):
        """The pre-activations of some gates, for an operand of the recurrent weights."""
        H = self.spec.hidden_size
        return [sum(self.gate(number, self.x, operand, H)) for number in range(first, last)]

    def minimal_gated_unit(self, h):
        f = torch.sigmoid(*self.sums(h, 0, 1))
        n = torch.tanh(*self.sums(f * h, 1, 2))
        return ((1 - f) * h + f * n,)

    def janet(self, h):
        s, c = self.sums(h, 0, 2)
        return (torch.sigmoid(s) * h + (1 - torch.sigmoid(s - 1)) * torch.tanh(c),)

    def ugrnn(self, h):
        g, c = self.sums(h, 0, 2)
        g = torch.sigmoid(g)
        return (g * h + (1 - g) * torch.tanh(c),)

    def li_gru(self, h):
        z, n = self.sums(h, 0, 2)
        self.note(n)
        z = torch.sigmoid(z)
        return (z * h + (1 - z) * torch.relu(n),)

    def cfc(self, h):
        a, b, t = self.sums(h, 0, 3)
        t = torch.sigmoid(t)
        return (torch.tanh(a) * (1 - t) + t * torch.tanh(b),)

    def fast_grnn(self, h):
        (c,) = self.sums(h, 0, 1)
        z, candidate = torch.sigmoid(c + self.w["bias_z"]), torch.tanh(c + self.w["bias_h"])
        zeta, nu = torch.sigmoid(self.w["zeta"]), torch.sigmoid(self.w["nu"])
        return ((zeta * (1 - z) + nu) * candidate + z * h,)

    def lem(self, y, z):
        a, b, candidate = self.sums(y, 0, 3)
        a, b = torch.sigmoid(a), torch.sigmoid(b)
        z = (1 - a) * z + a * torch.tanh(candidate)
        (candidate,) = self.sums(z, 3, 4)
        return (1 - b) * y + b * torch.tanh(candidate), z

    def multiplicative_lstm(self, h, c):
        from_x, from_h = self.gate(0, self.x, h, self.spec.hidden_size)
        i, f, g, o = self.sums(from_x * from_h, 1, 5)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.tanh(c) * torch.sigmoid(o), c

    def slstm(self, h, c, n, m):
        i, f, z, o = self.sums(h, 0, 4)
        f = F.logsigmoid(f) + m
        self.note(i - f)
        m = torch.maximum(f, i)
        i, f = torch.exp(i - m), torch.exp(f - m)
        c, n = f * c + i * torch.tanh(z), f * n + i
        return torch.sigmoid(o) * c / n, c, n, m


    def dreamer_gru(self, h):
        r, n, u = self.sums(h, 0, 3)
        u = torch.sigmoid(u - 1)
        return (u * torch.tanh(torch.sigmoid(r) * n) + (1 - u) * h,)

    def flash_gru(self, h):
        (from_x, from_h), (r, z) = self.gate(2, self.x, h, self.spec.hidden_size), self.sums(h, 0, 2)
        n = torch.tanh(from_x + torch.sigmoid(r) * from_h)
        return (torch.lerp(n, h, torch.sigmoid(z)),)

    def flash_lstm(self, h, c):
        i, f, g, o = self.sums(h, 0, 4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def input_sum(self, number):
        """The pre-activation of a gate that the input alone gives."""
        H = self.spec.hidden_size
        rows = slice(number * H, (number + 1) * H)
        return self.x @ self.w["i2h_weight"][rows].T + self.w["i2h_bias"][rows]

    def ran(self, h, c):
        i, f = map(torch.sigmoid, self.sums(h, 0, 2))
        c = i * self.input_sum(2) + f * c
        return torch.tanh(c), c

    def star(self, h):
        k = torch.sigmoid(*self.sums(h, 0, 1))
        return (torch.tanh((1 - k) * h + k * torch.tanh(self.input_sum(1))),)

    def nbrc(self, h):
        a, c = self.sums(h, 0, 2)
        a, c = 1 + torch.tanh(a), torch.sigmoid(c)
        return (c * h + (1 - c) * torch.tanh(self.input_sum(2) + a * h),)

    def own_output(self, c, h):
        r = torch.sigmoid(*self.sums(c, 0, 1))
        n = torch.tanh(*self.sums(r * h, 1, 2))
        w = self.input_sum(2)
        old_c, h = c, r * h + n
        return n * w + old_c * torch.tanh(h), torch.tanh(old_c * w + h), h

    def everything(self, h, c):
        (r,), w, v = self.sums(h, 0, 1), self.input_sum(3), self.input_sum(4)
        r = torch.sigmoid(r)
        (n,) = self.sums(r * torch.tanh(v) * h, 1, 2)
        n = torch.tanh(n)
        from_x, from_h = self.gate(2, self.x, n * c, self.spec.hidden_size)
        c = torch.tanh(w) * c + r * self.w["beta"]
        return torch.tanh(from_h * self.w["tau"] + from_x) * c + h * n, c + v

    def from_x(self, row):
        """The pre-activation from the input whose weights are the ``row``-th."""
        rows = slice(row * self.spec.hidden_size, (row + 1) * self.spec.hidden_size)
        return self.x @ self.w["i2h_weight"][rows].T + self.w["i2h_bias"][rows]

    def from_h(self, row, operand):
        """The pre-activation from an operand of the recurrent weights, likewise."""
        rows = slice(row * self.spec.hidden_size, (row + 1) * self.spec.hidden_size)
        return operand @ self.w["h2h_weight"][rows].T + self.w["h2h_bias"][rows]

    def early(self, h, c):
        b, o, n, w = map(self.from_x, range(4))
        first = torch.tanh(w) * c + self.w["beta"]
        o = torch.sigmoid(o + self.from_h(2, torch.tanh(self.from_h(0, first)) * h))
        n = torch.tanh(self.w["tau"] * n + self.from_h(3, o * torch.tanh(n) * c))
        return o * n + torch.tanh(self.from_h(1, first) - b) * h, self.w["tau"] * c + o * n

    def products_alone(self, h, c):
        r = torch.sigmoid(self.from_h(0, h) + self.x)
        n = torch.tanh(self.from_h(1, r * c) * self.x)
        return n + r * h, torch.tanh(c * r + n)

    def antisymmetric_rnn(self, h):
        sums = self.from_x(0) + self.from_h(0, h) - self.w["gamma"] * h
        return (h + self.w["epsilon"] * torch.tanh(sums),)

    def gated_antisymmetric_rnn(self, h):
        u = self.from_h(0, h) - self.w["gamma"] * h
        z = torch.sigmoid(self.from_x(1) + u)
        return (h + self.w["epsilon"] * z * torch.tanh(self.from_x(0) + u),)

    def atr(self, h):
        p, q = self.from_x(0), self.from_h(0, h)
        return (torch.sigmoid(p + q) * p + torch.sigmoid(p - q) * h,)

    def fast_rnn(self, h):
        alpha, beta = torch.sigmoid(self.w["alpha"]), torch.sigmoid(self.w["beta"])
        return (alpha * torch.tanh(*self.sums(h, 0, 1)) + beta * h,)

    def intersection_rnn(self, h):
        y_in, h_in, g_y, g_h = self.sums(h, 0, 4)
        self.note(y_in)
        g_y, g_h = torch.sigmoid(g_y), torch.sigmoid(g_h)
        return g_y * self.x + (1 - g_y) * torch.relu(y_in), g_h * h + (1 - g_h) * torch.tanh(h_in)

    def light_ru(self, h):
        f = torch.sigmoid(self.from_x(0) + self.from_h(0, h))
        return ((1 - f) * h + f * torch.tanh(self.from_x(1)),)

    def ltc(self, h):
        f, dt = torch.sigmoid(*self.sums(h, 0, 1)), self.w["dt"]
        return ((h + dt * f * self.w["a"]) / (1 + dt * (self.w["leak"] + f)),)

    def mc_lstm(self, v, c):
        f, i, o, m, n = self.sums(v, 0, 5)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        return torch.sigmoid(o) * torch.tanh(c), torch.sigmoid(m) * torch.tanh(c), c

    def nas(self, h, c):
        from_x, from_h = zip(*(self.gate(number, self.x, h, self.spec.hidden_size) for number in range(8)), strict=True)
        sums = [a + b for a, b in zip(from_x, from_h, strict=True)]
        sums[3] = from_x[3] * from_h[3]
        self.note(sums[1], sums[3])
        functions = {0: torch.sigmoid, 1: torch.relu, 2: torch.sigmoid, 3: torch.relu, 4: torch.tanh, 6: torch.tanh}
        first = [functions.get(number, torch.sigmoid)(one) for number, one in enumerate(sums)]
        second = [torch.tanh(first[0] * first[1]), torch.tanh(first[2] + first[3]), torch.tanh(first[4] * first[5])]
        second.append(torch.sigmoid(first[6] + first[7]))
        c = torch.tanh(second[0] + c) * second[1]
        return torch.tanh(c * torch.tanh(second[2] + second[3])), c

    def original_lstm(self, h, c):
        i, g, o = map(torch.sigmoid, self.sums(h, 0, 3))
        c = c + i * (4 * g - 2)
        return o * (2 * torch.sigmoid(c) - 1), c

    def sgrn(self, h):
        x = self.from_x(0)
        f = torch.sigmoid(x + self.from_h(0, h))
        return (torch.tanh((1 - f) * x + f * h),)

    def co_rnn(self, y, z):
        dt, gamma, epsilon = (self.w[name] for name in ("dt", "gamma", "epsilon"))
        force = torch.tanh(self.from_x(0) + self.from_h(0, y) + self.from_h(1, z))
        z = z + dt * force - dt * gamma * y - dt * epsilon * z
        return y + dt * z, z

    def minimal_rnn(self, h):
        z = torch.tanh(self.from_x(0))
        u = torch.sigmoid(self.from_h(0, h) + self.from_h(1, z))
        return (u * h + (1 - u) * z,)

    def mi_ru(self, h):
        r = torch.sigmoid(*self.sums(h, 0, 1))
        return (self.w["rate"] * h + (1 - self.w["rate"]) * torch.tanh(*self.sums(r * h, 1, 2)),)

    def mut1(self, h):
        r, z = torch.sigmoid(*self.sums(h, 0, 1)), torch.sigmoid(self.from_x(2))
        return (torch.tanh(self.from_h(1, r * h) + torch.tanh(self.from_x(1))) * z + h * (1 - z),)

    def mut2(self, h):
        z, r = map(torch.sigmoid, self.sums(h, 0, 2))
        return (torch.tanh(*self.sums(r * h, 2, 3)) * z + h * (1 - z),)

    def mut3(self, h):
        r, z = torch.sigmoid(*self.sums(h, 0, 1)), torch.sigmoid(*self.sums(torch.tanh(h), 1, 2))
        return (torch.tanh(*self.sums(r * h, 2, 3)) * z + h * (1 - z),)

    def recurrent_highway(self, h):
        for depth in range(3):
            a, t = (self.from_h(2 * depth + number, h) + (0 if depth else self.from_x(number)) for number in range(2))
            t = torch.sigmoid(t)
            h = torch.tanh(a) * t + h * (1 - t)
        return (h,)

    def res_lstm(self, h, c):
        i, f, g, o = self.sums(h, 0, 4)
        i, f = torch.sigmoid(i + self.w["v_i"] * c), torch.sigmoid(f + self.w["v_f"] * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + self.w["v_o"] * c)
        return o * (self.from_h(4, torch.tanh(c)) + self.from_x(4)), c

    def scrn(self, h, c):
        c = (1 - self.w["alpha"]) * self.from_x(1) + self.w["alpha"] * c
        return torch.sigmoid(self.from_h(1, c) + self.from_x(0) + self.from_h(0, h)), c

    def simple_gates(self, h):
        """The candidate's gate and the update gate of SGU and DSGU."""
        z = self.from_x(1) + self.from_h(1, h)
        self.note(z + 2.5, z - 2.5)
        return torch.tanh(self.from_h(0, self.from_x(0) * h)), torch.clamp(0.2 * z + 0.5, 0, 1)

    def sgu(self, h):
        g, z = self.simple_gates(h)
        return ((1 - z) * h + z * F.softplus(g * h),)

    def dsgu(self, h):
        g, z = self.simple_gates(h)
        return ((1 - z) * h + z * torch.sigmoid(self.from_h(2, g * h)),)

    def wmc_lstm(self, h, c):
        i, f, g, o = self.sums(h, 0, 4)
        i, f = (torch.sigmoid(a + torch.tanh(self.from_h(row, c))) for row, a in ((4, i), (5, f)))
        c = f * c + i * torch.tanh(g)
        return torch.sigmoid(o + torch.tanh(self.from_h(6, c))) * torch.tanh(c), c

    def brc(self, h):
        a, c = 1 + torch.tanh(self.from_x(0) + self.w["w_a"] * h), torch.sigmoid(self.from_x(1) + self.w["w_c"] * h)
        return (c * h + (1 - c) * torch.tanh(self.from_x(2) + a * h),)

    def t_rnn(self, h):
        z, f = self.inputs()
        f = torch.sigmoid(f)
        return (f * h + (1 - f) * z,)

    def t_gru(self, h):
        z, f, o = self.inputs()
        return (torch.sigmoid(f) * h + z * torch.tanh(o),)

    def t_lstm(self, c):
        z, f, o = self.inputs()
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * z
        return c * torch.tanh(o), c

    def unicornn(self, y, z):
        dt = self.w["dt"] * torch.sigmoid(self.w["c"])
        z = z - dt * (torch.tanh(self.w["w"] * y + self.from_x(0)) + self.w["alpha"] * y)
        return y + dt * z, z

    def elementwise_moments(self, h, c):
        a, b = (torch.tanh(self.from_x(row)) for row in range(2))
        mean = torch.stack([a * h, c]).mean(dim=(0, 2))[:, None]
        b = b * mean + self.w["beta"] * (a - c).var(dim=1, correction=0, keepdim=True)
        return torch.tanh(b + h), a + (b * c).mean(dim=1, keepdim=True)

    def row_moments(self, h, c):
        a = torch.tanh(*self.sums(h, 0, 1))
        spread = torch.cat([a, h], dim=1).var(dim=1, correction=0, keepdim=True)
        (b,) = self.sums(spread * h, 1, 2)
        level = torch.cat([b * a, c], dim=1).mean(dim=1, keepdim=True)
        return torch.tanh(b) + (c * a).var(dim=1, correction=0, keepdim=True), level.expand(h.shape)

    def chaos_free_network(self, h):
        t, e = map(torch.sigmoid, self.sums(h, 0, 2))
        return (t * torch.tanh(h) + e * torch.tanh(self.input_sum(2)),)

    def normalized_sums(self, h, gates):
        """The normalized pre-activations of all gates together, from the input and from h, with their scales."""
        H, count = self.spec.hidden_size, len(gates)
        parts = [self.gate(number, self.x, h, H) for number in range(count)]
        results = []
        for side, kind in zip(zip(*parts, strict=True), "xh", strict=True):
            weight = torch.cat([self.w[f"{kind}_{gate}"] for gate in gates])
            results.append(F.layer_norm(torch.cat(side, dim=1), (count * H,), weight).chunk(count, dim=1))
        return results

    def layer_norm_lstm(self, h, c):
        from_x, from_h = self.normalized_sums(h, "ifgo")
        i, f, g, o = (a + b + self.w[f"b_{gate}"] for a, b, gate in zip(from_x, from_h, "ifgo", strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, c.shape[1:], self.w["gamma"], self.w["beta"])), c

    def layer_norm_gru(self, h):
        from_x, from_h = self.normalized_sums(h, "zrn")
        z, r = (torch.sigmoid(from_x[i] + from_h[i] + self.w[f"b_{gate}"]) for i, gate in enumerate("zr"))
        n = torch.tanh(from_x[2] + self.w["b_n"] + r * (from_h[2] + self.w["d_n"]))
        return (z * h + (1 - z) * n,)

    def layer_norm_li_gru(self, h):
        parts = [self.gate(number, self.x, h, self.spec.hidden_size) for number in range(2)]
        weight, bias = (torch.cat([self.w[f"{name}_{gate}"] for gate in "zn"]) for name in ("gamma", "beta"))
        x = torch.cat([from_x for from_x, _ in parts], dim=1)
        normalized = F.layer_norm(x, x.shape[1:], weight, bias).chunk(2, dim=1)
        z, n = (a + b for a, (_, b) in zip(normalized, parts, strict=True))
        self.note(n)
        z = torch.sigmoid(z)
        return (z * h + (1 - z) * torch.relu(n),)

    def layer_norm_dreamer_gru(self, h):
        weight, bias = (torch.cat([self.w[f"{name}_{gate}"] for gate in "rnu"]) for name in ("gamma", "beta"))
        sums = torch.cat(self.sums(h, 0, 3), dim=1)
        r, n, u = F.layer_norm(sums, sums.shape[1:], weight, bias).chunk(3, dim=1)
        u = torch.sigmoid(u - 1)
        return (u * torch.tanh(torch.sigmoid(r) * n) + (1 - u) * h,)

    def inputs(self):
        """The pre-activations of all gates of a cell without recurrent weights."""
        return [self.input_sum(number) for number in range(self.spec.num_gates)]

    def positive(self, n):
        """The candidates of the log-space forms, from their pre-activations."""
        self.note(n)
        return torch.where(n >= 0, n + 0.5, torch.sigmoid(n))

    def ind_rnn(self, h):
        a = self.inputs()[0] + self.w["u"] * h
        self.note(a)
        return (torch.relu(a),)

    def sru(self, c):
        z, f, r = self.inputs()
        f, r = torch.sigmoid(f + self.w["v_f"] * c), torch.sigmoid(r + self.w["v_r"] * c)
        c = f * c + (1 - f) * z
        return r * c + (1 - r) * self.x, c

    def sru_projected(self, c):
        z, f, r, k = self.inputs()
        f, r = torch.sigmoid(f + self.w["v_f"] * c), torch.sigmoid(r + self.w["v_r"] * c)
        c = f * c + (1 - f) * z
        return r * c + (1 - r) * k, c

    def qrnn_f(self, h):
        z, f = self.inputs()
        f = torch.sigmoid(f)
        return (f * h + (1 - f) * torch.tanh(z),)

    def qrnn_fo(self, c):
        z, f, o = self.inputs()
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * torch.tanh(z)
        return torch.sigmoid(o) * c, c

    def qrnn_ifo(self, c):
        z, i, f, o = self.inputs()
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        return torch.sigmoid(o) * c, c

    def min_gru(self, h):
        z, n = self.inputs()
        return (torch.lerp(h, n, torch.sigmoid(z)),)

    def min_gru_log(self, h):
        z, n = self.inputs()
        return (torch.lerp(h, self.positive(n), torch.sigmoid(z)),)

    def min_lstm(self, h):
        f, i, n = self.inputs()
        f, i = torch.sigmoid(f), torch.sigmoid(i)
        return (f / (f + i) * h + i / (f + i) * n,)

    def min_lstm_log(self, h):
        f, i, n = self.inputs()
        difference = F.softplus(-f) - F.softplus(-i)
        f, i = torch.exp(-F.softplus(difference)), torch.exp(-F.softplus(-difference))
        return (f * h + i * self.positive(n),)


@cell(gates="r n o w v", states="h c", vectors="beta", scalars="tau")
def everything(x, recurrent, s, p):
    """A cell of no paper: three products, gates of the input alone, states that are read late, own parameters."""
    r = sigmoid(x.r + recurrent(s.h).r)
    c = tanh(x.w) * s.c + r * p.beta
    n = tanh(x.n + recurrent(r * tanh(x.v) * s.h).n)
    o = recurrent(n * s.c).o * p.tau + x.o
    return tanh(o) * c + s.h * n, c + x.v


@cell(gates="r n w", states="c h", output="y")
def own_output(x, recurrent, s):
    """A cell of no paper whose output is no state: two products, a gate of the input alone, a late old state."""
    r = sigmoid(x.r + recurrent(s.c).r)
    n = tanh(x.n + recurrent(r * s.h).n)
    h = r * s.h + n
    return n * x.w + s.c * tanh(h), tanh(s.c * x.w + h), h


@cell(gates="a b", states="h c")
def row_moments(x, recurrent, s):
    """A cell of no paper: a state that is a mean, a product of a variance, and variances whose means are not used."""
    a = tanh(x.a + recurrent(s.h).a)
    b = recurrent(variance(a, s.h) * s.h).b + x.b
    return tanh(b) + variance(s.c * a), mean(b * a, s.c)


@cell(gates="a b o n w", states="h c", vectors="beta", scalars="tau")
def early(x, recurrent, s, p):
    """A cell of no paper: no product of the output, a gate without input, one that its own product's operand reads."""
    h = recurrent(tanh(x.w) * s.c + p.beta)
    o = sigmoid(x.o + recurrent(tanh(h.a) * s.h).o)
    n = tanh(p.tau * x.n + recurrent(o * tanh(x.n) * s.c).n)
    return o * n + tanh(h.b - x.b) * s.h, p.tau * s.c + o * n


@cell(gates="a b", states="h c", vectors="beta")
def elementwise_moments(x, recurrent, s, p):
    """A cell of no paper: means and variances without products, one of another."""
    a = tanh(x.a)
    b = tanh(x.b) * mean(a * s.h, s.c) + p.beta * variance(a - s.c)
    return tanh(b + s.h), a + mean(b * s.c)


@cell(gates="r n", states="h c")
def products_alone(x, recurrent, s):
    """A cell of no paper: no gate has a part from the input, which the equations read as it is."""
    r = sigmoid(recurrent(s.h).r + x.raw)
    n = tanh(recurrent(r * s.c).n * x.raw)
    return n + r * s.h, tanh(s.c * r + n)


CELLS = {name: getattr(cells, name) for name in cells.__all__ if name not in noisy.__all__}
"""The catalogue by name, without the cells that draw random masks."""
HEADS = {"slstm_heads": cells.slstm.with_heads(2), "everything_heads": everything.with_heads(2)}
HEADS["layer_norm_heads"] = cells.layer_norm_dreamer_gru.with_heads(2)
HEADS["early_heads"] = early.with_heads(2)
OF_NO_PAPER = {of.name: of for of in (everything, own_output, row_moments, early, elementwise_moments, products_alone)}
ALL_CELLS = {**CELLS, **OF_NO_PAPER, **HEADS}
ALIKE = {
    "antisymmetric_rnn", "atr", "brc", "co_rnn", "dsgu", "fast_rnn", "flash_gru", "flash_lstm",
    "gated_antisymmetric_rnn", "intersection_rnn", "light_ru", "ltc", "mc_lstm", "mi_ru", "min_gru", "min_gru_log",
    "min_lstm", "minimal_rnn", "mut1", "mut2", "mut3", "nas", "original_lstm", "qrnn_f", "qrnn_fo", "res_lstm", "scrn",
    "sgrn", "sgu", "sru_projected", "t_gru", "t_lstm", "t_rnn", "unicornn",
}  # fmt: skip
"""Cells that kernels compute in the same way as another cell, with parts of that cell's maths."""
KERNEL_CELLS = [name for name in ALL_CELLS if name not in ALIKE]


@cache
def cell_problem(name, shape, **options):
    """A problem of a cell, not near a kink, and the oracle's results."""
    if ALL_CELLS[name].heads > 1:  # of 16 units each
        shape = replace(shape, H=16 * ALL_CELLS[name].heads)
    if ALL_CELLS[name].traced.reads_raw_input:  # as many features as units, in every layer
        shape = replace(shape, I=shape.H, bidirectional=shape.bidirectional and shape.layers == 1)
    spec = RNNSpec(ALL_CELLS[name], shape.I, shape.H, shape.layers, shape.bidirectional, **options)
    smallest = tolerance(np.float32, longest_sum(spec))[1] / 2
    for seed in count():
        problem = problem_of(spec, shape, seed)
        if name.startswith("slstm") and problem.states is not None:
            h, c, n, m = problem.states  # n is a sum of positive numbers, which c is divided by
            problem = replace(problem, states=(h, c, abs(n) + np.float32(0.5), m))
        if recorded(problem, PaperSteps)[2] > smallest:
            return problem, variant_results(problem, steps=PaperSteps)


def train(problem, keep="gates"):
    """The output, the final states and the gradients of a new op."""
    op = RNNOp(problem.spec)
    y, final, reserve = op.forward(
        problem.x, problem.params, problem.states, training=True, lengths=problem.lengths, reserve=keep
    )
    return y, final, op.backward(problem.dy, problem.dstates, reserve)


def check_training(problem, oracle):
    """Check training, whatever is kept."""
    spec = problem.spec
    for keep in SAVE_POLICIES:
        y, final, gradients = train(problem, keep)
        assert_close((y, final), oracle.forward, spec.dtype, spec)
        assert_gradients_close(gradients, oracle.gradients, spec.dtype, spec, *problem.x.shape[:2])
