"""The training of examples/train_ddp.py in float64 on torch.nn, and how far other results may be from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from examples.train_ddp import Forecaster, waves
from fusedrnn import RNNSpec
from fusedrnn.testing.tolerance import gradient_tolerance, longest_sum, tolerance

STEPS, BATCH, LENGTH, HIDDEN, LR, MOMENTUM, SEED = 12, 10, 9, 17, 0.05, 0.9, 3
SIZES = ["--steps", STEPS, "--batch", BATCH, "--length", LENGTH, "--hidden", HIDDEN, "--lr", LR, "--seed", SEED]


@dataclass(frozen=True)
class Exact:
    """What torch.nn computes in float64 on the joined batch, in one process, and how large gradients were."""

    losses: list
    parameters: dict
    largest_gradient: float
    sum_of_gradients: float


@cache
def exact():
    torch.manual_seed(SEED)
    model = Forecaster(HIDDEN, nn.LSTM).double()
    moved = [torch.zeros_like(p) for p in model.parameters()]
    losses, largest, total = [], 0.0, 0.0
    for step in range(STEPS):
        data = waves(BATCH, LENGTH, SEED + step).double()
        loss = (model(data[:, :-1]) - data[:, 1:]).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient, velocity in zip(model.parameters(), gradients, moved, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(LR * velocity)
        losses.append(loss.item())
        largest = max(largest, *(g.abs().max().item() for g in gradients))
        total = max(total, sum(g.abs().sum().item() for g in gradients))
    return Exact(losses, {n: p.numpy().copy() for n, p in model.state_dict().items()}, largest, total)


def bounds(dtype):
    """How far losses and parameters may lie from the exact ones.

    The error of a gradient moves a parameter by lr times the error in its own step and, by momentum, also in all later
    steps: by lr / (1 - momentum) times the error in total. The gradient of each step may be wrong by the tolerance for
    gradients, and the parameter is rounded once a step. Training does not enlarge an error that is so small, since the
    losses fall.

    A loss moves with the parameters by no more than its gradient says. It moves with the rounding of each output by
    twice the residual; the root mean square of the residuals is the square root of the loss.
    """
    spec = RNNSpec("lstm", 1, HIDDEN, 2)
    actual = exact()
    _, gradient = gradient_tolerance(dtype, spec, LENGTH, BATCH, actual.largest_gradient)
    weight = max(np.abs(p).max() for p in actual.parameters.values())
    parameters = STEPS * (LR / (1 - MOMENTUM) * gradient + np.finfo(dtype).eps * weight)
    _, output = tolerance(dtype, longest_sum(spec))
    return actual.sum_of_gradients * parameters + 2 * max(actual.losses) ** 0.5 * output, parameters
