"""The variants of the cells, and an oracle for them: torch's functions in float64, step by step, with its autograd."""

from dataclasses import replace
from functools import cache, partial
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

from fusedrnn import RNNSpec
from fusedrnn.cell.activations import Activation
from fusedrnn.cell.cells import Cell
from fusedrnn.testing.tolerance import longest_sum, tolerance
from oracles import Results, without
from problems import problem_of

# Name: mode, and fields of the spec.
VARIANTS = {
    "projection": ("lstm", {"projection_size": 0.5}),
    "state-clip": ("lstm", {"state_clip_min": -0.3, "state_clip_max": 0.2}),
    "state-clip-nan": ("lstm", {"state_clip_min": -0.25, "state_clip_max": 0.25, "state_clip_nan": True}),
    "projection-clip": ("lstm", {"projection_size": 0.3, "state_clip_min": -0.3, "state_clip_max": 0.2}),
    "peepholes": ("lstm", {"peepholes": True}),
    "coupled": ("lstm", {"coupled_gates": True}),
    "coupled-peepholes": ("lstm", {"coupled_gates": True, "peepholes": True, "bias": "single"}),
    "lstm-gate-clip": ("lstm", {"gate_clip": 0.4}),
    "lstm-activations": (
        "lstm",
        {"activations": (Activation("hard_sigmoid"), Activation("softsign"), Activation("scaled_tanh", 1.7, 0.6))},
    ),
    "lstm-all": (
        "lstm",
        {
            "projection_size": 0.6, "peepholes": True, "gate_clip": 0.9, "state_clip_min": -0.5, "state_clip_max": 0.5,
            "activations": (Activation("sigmoid"), Activation("elu", 0.7), Activation("tanh")), "bias": "single",
        },
    ),
    "lstm-single-bias": ("lstm", {"bias": "single"}),
    "lstm-no-bias": ("lstm", {"bias": "none"}),
    "reset-before": ("gru", {"reset_after": False}),
    "reset-before-single-bias": ("gru", {"reset_after": False, "bias": "single"}),
    "reset-before-all": (
        "gru",
        {"reset_after": False, "gate_clip": 0.5, "activations": (Activation("hard_sigmoid"), Activation("elu"))},
    ),
    "gru-gate-clip": ("gru", {"gate_clip": 0.3}),
    "gru-activations": ("gru", {"activations": (Activation("hard_sigmoid", 0.3, 0.4), Activation("softsign"))}),
    "gru-no-bias": ("gru", {"bias": "none"}),
    "gru-single-bias": ("gru", {"bias": "single"}),
    "affine": ("rnn_tanh", {"activations": (Activation("affine", 0.6, 0.1),)}),
    "leaky-relu": ("rnn_relu", {"activations": (Activation("leaky_relu", 0.2),)}),
    "thresholded-relu": ("rnn_relu", {"activations": (Activation("thresholded_relu", 0.1),)}),
    "softplus": ("rnn_tanh", {"activations": (Activation("softplus"),)}),
    "elu": ("rnn_relu", {"activations": (Activation("elu"),)}),
    "vanilla-clip": ("rnn_tanh", {"gate_clip": 0.2}),
    "vanilla-no-bias": ("rnn_relu", {"bias": "none"}),
}  # fmt: skip


def varied(spec, name):
    """A spec with the fields of a variant; a projection's size is a fraction of the hidden size."""
    _, options = VARIANTS[name]
    options = dict(options)
    if "projection_size" in options:
        options["projection_size"] = max(1, int(options["projection_size"] * spec.hidden_size))
    return replace(spec, **options)


def possible(name, hidden):
    """Whether the variant exists with that hidden size."""
    return not (hidden == 1 and "projection_size" in VARIANTS[name][1])


# Expressions that are zero at the kinks of a function. The functions without an entry have no kinks.
_KINKS = {
    "relu": lambda x, a, b: (x,),
    "leaky_relu": lambda x, a, b: (x,),
    "thresholded_relu": lambda x, a, b: (x - a,),
    "hard_sigmoid": lambda x, a, b: (a * x + b, a * x + b - 1),
    "elu": lambda x, a, b: (x,),
}
FUNCTIONS = {
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "relu": lambda x, a, b: F.relu(x),
    "affine": lambda x, a, b: a * x + b,
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "thresholded_relu": lambda x, a, b: F.threshold(x, a, 0.0),
    "scaled_tanh": lambda x, a, b: a * torch.tanh(b * x),
    "hard_sigmoid": lambda x, a, b: torch.clamp(a * x + b, 0, 1),
    "elu": lambda x, a, b: F.elu(x, a),
    "softsign": lambda x, a, b: F.softsign(x),
    "softplus": lambda x, a, b: F.softplus(x, threshold=40),
}
_DEFAULTS = {
    "lstm": ("sigmoid", "tanh", "tanh"),
    "gru": ("sigmoid", "tanh"),
    "rnn_tanh": ("tanh",),
    "rnn_relu": ("relu",),
}


class Steps:
    """A direction of a layer, written from the papers and from ONNX's specification, not from the package's cells."""

    def __init__(self, spec, weights):
        self.spec, self.w = spec, weights
        activations = spec.activations or tuple(Activation(name) for name in _DEFAULTS[spec.mode])
        self.functions = [partial(self.activate, activation) for activation in activations]
        self.margin = np.inf

    def projected(self, x):
        """What a residual connection adds: the product of the input and the last rows of its weights."""
        rows, bias = self.w["i2h_weight"][-self.spec.hidden_size :], self.w.get("i2h_bias")
        return x @ rows.T + (0 if bias is None else bias[-self.spec.hidden_size :])

    def note(self, *distances):
        """Note distances from a kink; ``margin`` is the smallest."""
        self.margin = min(self.margin, *(float(distance.detach().abs().min()) for distance in distances))

    def activate(self, activation, x):
        parameters = activation.alpha, activation.beta
        if activation.name in _KINKS:
            self.note(*_KINKS[activation.name](x, *parameters))
        return FUNCTIONS[activation.name](x, *parameters)

    def clip(self, a):
        bound = self.spec.gate_clip
        if bound is None:
            return a
        self.note(a - bound, a + bound)
        return torch.clamp(a, -bound, bound)

    def bias(self, kind, H, gate):
        bias = self.w.get(kind)
        return 0 if bias is None else bias[gate * H : (gate + 1) * H]

    def gate(self, number, x, operand, H):
        """The pre-activation of a gate: from the input, and from the operand of the recurrent weights."""
        rows = slice(number * H, (number + 1) * H)
        from_x = x @ self.w["i2h_weight"][rows].T + self.bias("i2h_bias", H, number)
        from_h = operand @ self.w["h2h_weight"][rows].T + self.bias("h2h_bias", H, number)
        return from_x, from_h

    def __call__(self, x, states):
        return getattr(self, self.spec.mode.split("_")[0])(x, states, self.spec.hidden_size)

    def rnn(self, x, states, H):
        (h,) = states
        return (self.functions[0](self.clip(sum(self.gate(0, x, h, H)))),)

    def gru(self, x, states, H):
        (h,) = states
        f, g = self.functions
        r, z = (f(self.clip(sum(self.gate(number, x, h, H)))) for number in (0, 1))
        if self.spec.reset_after:
            from_x, from_h = self.gate(2, x, h, H)
            n = g(self.clip(from_x + r * from_h))
        else:
            n = g(self.clip(sum(self.gate(2, x, r * h, H))))
        return ((1 - z) * n + z * h,)

    def lstm(self, x, states, H):
        spec = self.spec
        h, c = states
        f, g, output = self.functions
        order = "igo" if spec.coupled_gates else "ifgo"
        sums = {gate: sum(self.gate(number, x, h, H)) for number, gate in enumerate(order)}
        peepholes = {}
        if spec.peepholes:
            gates = "io" if spec.coupled_gates else "ifo"
            peepholes = dict(zip(gates, self.w["peephole_weight"].split(H), strict=True))
        i = f(self.clip(sums["i"] + peepholes.get("i", 0) * c))
        forget = 1 - i if spec.coupled_gates else f(self.clip(sums["f"] + peepholes.get("f", 0) * c))
        c = forget * c + i * g(self.clip(sums["g"]))
        if spec.state_clip_min is not None:
            self.note(c - spec.state_clip_min, c - spec.state_clip_max)
            c = torch.clamp(c, spec.state_clip_min, spec.state_clip_max)
            if spec.state_clip_nan:
                c = torch.where(torch.isnan(c), spec.state_clip_min, c)
        h = f(self.clip(sums["o"] + peepholes.get("o", 0) * c)) * output(c)
        return (h @ self.w["h2r_weight"].T if spec.projection_size else h), c


def run(spec, x, states, weights, lengths, steps=Steps):
    """All layers and directions: the output and the final states, and the smallest distance from a kink."""
    T = len(x)
    last, margin = [], np.inf
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            step = steps(spec, {kind: weights[layer, direction, kind] for kind in spec.layout.kinds})
            current = tuple(state[len(last)] for state in states)
            y = [None] * T
            for t in reversed(range(T)) if spec.reverse or direction == 1 else range(T):
                new = output, *_ = step(x[t], current)
                if isinstance(spec.mode, Cell) and spec.mode.output is not None:
                    new = new[1:]
                if spec.residual == "projection":
                    output = output + step.projected(x[t])
                active = torch.ones(x.shape[1], 1, dtype=bool) if lengths is None else (t < lengths)[:, None]
                y[t] = torch.where(active, output, 0)
                current = tuple(torch.where(active, *pair) for pair in zip(new, current, strict=True))
            outputs.append(torch.stack(y))
            last.append(current)
            margin = min(margin, step.margin)
        y = torch.cat(outputs, dim=2)
        if spec.residual == "identity" and y.shape == x.shape:
            active = torch.ones(x.shape[:2], dtype=bool) if lengths is None else torch.arange(T)[:, None] < lengths
            y = y + torch.where(active[:, :, None], x, 0)
        x = y
    return (x, *(torch.stack(column) for column in zip(*last, strict=True))), margin


def recorded(problem, steps=Steps):
    """A run of the oracle: the leaves of the graph, and what :func:`run` returns."""
    spec = problem.spec
    x, params, states = problem.astype(np.float64)
    if states is None:
        states = tuple(np.zeros(shape) for shape in spec.state_shape(x.shape[1]))
    leaves = [torch.tensor(array, requires_grad=True) for array in (x, params, *states)]
    weights = {
        (w.layer, w.direction, w.kind): leaves[1][w.offset : w.offset + w.size].view(w.shape) for w in spec.layout
    }
    lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)
    return leaves, *run(spec, leaves[0], leaves[2:], weights, lengths, steps)


def variant_results(problem, absent="nothing", steps=Steps):
    """The results of the oracle, without the gradients that ``absent`` names."""
    return variant_results_by_absence(problem, (absent,), steps)[absent]


def variant_results_by_absence(problem, absent, steps=Steps):
    """The results of the oracle for each of several absences, of one forward pass."""
    leaves, results, _ = recorded(problem, steps)
    return {name: _differentiate(problem, leaves, results, name) for name in absent}


def _differentiate(problem, leaves, results, absent):
    dy, dstates = without(problem.spec, *problem.gradients_as(np.float64), absent)
    dresults = (dy, *(dstates or (None,) * (len(results) - 1)))
    pairs = [(result, torch.tensor(d)) for result, d in zip(results, dresults, strict=True) if d is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(outputs, leaves, cotangents, **options)
    dx, dparams, *dinitial = (gradient.numpy() for gradient in gradients)
    y, *final = (result.detach().numpy() for result in results)
    return Results(y, tuple(final), (dx, dparams, tuple(dinitial)))


@cache
def variant_problem(name, shape, reverse=False):
    """A problem of a variant, and its results; not near a kink, where rounding in float32 would change gradients."""
    spec = variant_spec(name, shape.I, shape.H, shape.layers, shape.bidirectional, reverse=reverse)
    smallest = tolerance(np.float32, longest_sum(spec))[1] / 2
    for seed in count():
        problem = problem_of(spec, shape, seed)
        if recorded(problem)[2] > smallest:
            return problem, variant_results(problem)


def variant_spec(name, I, H, layers=1, bidirectional=False, dtype="float32", **more):
    """The spec of a variant."""
    return varied(RNNSpec(VARIANTS[name][0], I, H, layers, bidirectional, dtype=dtype, **more), name)
