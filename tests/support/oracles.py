"""Outputs, final states and all gradients of a problem by torch.nn and by the reference, in float64."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn.engines.reference import forward as reference
from fusedrnn.engines.reference.backward import backward
from fusedrnn.testing.tolerance import longest_sum, tolerance
from problems import make_problem


@dataclass(frozen=True)
class Results:
    """The results of training."""

    y: np.ndarray
    states: tuple
    gradients: tuple  # dx, dparams, the tuple of the initial states' gradients

    @property
    def forward(self):
        return self.y, self.states


def torch_module(spec, params):
    """The module of torch.nn with these parameters, in float64."""
    options = {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional, "dtype": torch.float64}
    if spec.mode.startswith("rnn"):
        module = torch.nn.RNN(spec.input_size, spec.hidden_size, nonlinearity=spec.mode[4:], **options)
    else:
        module = getattr(torch.nn, spec.mode.upper())(spec.input_size, spec.hidden_size, **options)
    named = spec.layout.unpack(params.astype(np.float64), names="torch")
    module.load_state_dict({name: torch.from_numpy(value) for name, value in named.items()})
    return module


class TorchRun:
    """A forward pass of torch.nn, and the gradients by its autograd.

    torch.nn does not accept empty sequences. They are left out: their outputs are zeros, and their states and the
    gradients of their states pass through.
    """

    def __init__(self, spec, x, params, states, lengths, training=True):
        self.spec, self.x = spec, x
        self.rows = np.arange(x.shape[1]) if lengths is None else np.flatnonzero(lengths)
        initial = [np.zeros(shape) for shape in spec.state_shape(x.shape[1])] if states is None else states
        self.y = np.zeros((*x.shape[:2], spec.output_size))
        self.states = tuple(state.copy() for state in initial)
        if self.rows.size:
            with torch.set_grad_enabled(training):
                self._run(params, initial, lengths)

    def _run(self, params, initial, lengths):
        rows = self.rows
        self.module = torch_module(self.spec, params)
        arrays = [self.x[:, rows], *(state[:, rows] for state in initial)]
        self.leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
        data, *states = self.leaves
        if lengths is not None:
            data = pack_padded_sequence(data, torch.from_numpy(lengths[rows]), enforce_sorted=False)
        y, after = self.module(data, states[0] if len(states) == 1 else tuple(states))
        if lengths is not None:
            y, _ = pad_packed_sequence(y, total_length=len(self.x))
        self.results = (y, *(after if isinstance(after, tuple) else (after,)))
        self.y[:, rows] = y.detach().numpy()
        for state, value in zip(self.states, self.results[1:], strict=True):
            state[:, rows] = value.detach().numpy()

    def backward(self, dy, dstates):
        """The gradients of the input, the flat parameters and the initial states; None stands for zeros."""
        dx, dparams = np.zeros_like(self.x), np.zeros(self.spec.layout.size)
        shapes = self.spec.state_shape(self.x.shape[1])
        dresults = (dy, *(dstates or (None,) * len(shapes)))
        dinitial = tuple(
            np.zeros(shape) if grad is None else grad.copy() for shape, grad in zip(shapes, dresults[1:], strict=True)
        )
        pairs = zip(getattr(self, "results", ()), dresults, strict=False)
        pairs = [(result, grad) for result, grad in pairs if grad is not None]
        if pairs:
            named = dict(self.module.named_parameters())
            gradients = torch.autograd.grad(
                [result for result, _ in pairs],
                [*self.leaves, *named.values()],
                [torch.tensor(grad[:, self.rows]) for _, grad in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            values = [gradient.numpy() for gradient in gradients]
            for array, rows in zip((dx, *dinitial), values, strict=False):
                array[:, self.rows] = rows
            layout = replace(self.spec, dtype="float64").layout
            dparams = layout.pack(dict(zip(named, values[len(self.leaves) :], strict=True)), names="torch")
        return dx, dparams, dinitial


def absences(spec):
    """The gradients of results that may be absent, by name: nothing, one, or those of all states."""
    return ("nothing", "dy", "dstates", *(f"d{name}_n" for name in spec.state_names))


def without(spec, dy, dstates, absent):
    """The gradients of results without those that ``absent``, one of :func:`absences`, names."""
    if absent == "dy":
        return None, dstates
    if absent == "dstates":
        return dy, None
    return dy, tuple(
        None if absent == f"d{name}_n" else grad for name, grad in zip(spec.state_names, dstates, strict=True)
    )


def torch_results(problem):
    """The results of torch.nn, by absence."""
    x, params, states = problem.astype(np.float64)
    run = TorchRun(problem.spec, x, params, states, problem.lengths)
    dresults = problem.gradients_as(np.float64)
    return {
        absent: Results(run.y, run.states, run.backward(*without(problem.spec, *dresults, absent)))
        for absent in absences(problem.spec)
    }


def reference_results(problem, seed=0, absent="nothing"):
    """The results of the reference."""
    x, params, states = problem.astype(np.float64)
    y, final, tape = reference.train(problem.spec, x, params, states, problem.lengths, seed)
    dresults = without(problem.spec, *problem.gradients_as(np.float64), absent)
    return Results(y, final, backward(problem.spec, tape, *dresults))


def near_kink(problem, seed=0):
    """Whether rounding in float32 might move a ReLU's pre-activation across zero, where its slope jumps."""
    spec = problem.spec
    if spec.mode != "rnn_relu":
        return False
    x, params, states = problem.astype(np.float64)
    _, _, tape = reference.train(spec, x, params, states, problem.lengths, seed)
    nearest = np.inf
    for index, trail in enumerate(tape.directions):
        layer, direction = divmod(index, spec.num_directions)
        weights = reference.layer_weights(spec, params, layer, direction)
        inputs = tape.inputs[layer][:: 1 - 2 * direction]
        sums = inputs @ weights["i2h_weight"].T + weights["i2h_bias"] + weights["h2h_bias"]
        sums += np.stack([before for (before,) in trail.states[:-1]]) @ weights["h2h_weight"].T
        nearest = min(nearest, np.abs(sums).min())
    return bool(nearest < tolerance(np.float32, longest_sum(spec))[1] / 2)


@cache
def seed_of(mode, shape):
    """The first seed whose problem is not near a kink."""
    return next(seed for seed in count() if not near_kink(make_problem(mode, shape, seed=seed)))


def training_problem(mode, shape, dtype="float32"):
    """A problem in which the rounding of sums changes only the last digits of gradients."""
    return make_problem(mode, shape, dtype, seed_of(mode, shape))


@cache
def expected(mode, shape):
    """Outputs and final states in inference, computed once for all dtypes, targets and numbers of threads."""
    problem = make_problem(mode, shape)
    x, params, states = problem.astype(np.float64)
    run = TorchRun(problem.spec, x, params, states, problem.lengths, training=False)
    return (run.y, run.states), reference.forward(problem.spec, x, params, states, problem.lengths)


@cache
def expected_training(mode, shape):
    """The results of torch.nn, by absence, and of the reference, for all dtypes, targets and numbers of threads."""
    problem = training_problem(mode, shape)
    return torch_results(problem), reference_results(problem)


@cache
def expected_dropout(mode, shape):
    """A problem with dropout, a seed, and the results of the reference, which has the same mask as the engines."""
    problem = training_problem(mode, shape)
    problem = replace(problem, spec=replace(problem.spec, dropout=0.4))
    seed = next(seed for seed in count(2**63 + 5) if not near_kink(problem, seed))
    return problem, seed, reference_results(problem, seed)
