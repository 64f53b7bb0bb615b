"""Times cells of the catalogue and the packages that published them, in turns, in an environment with the packages.

``python -m benchmarks.published_cells.contenders OPTIONS`` takes one argument, the options as JSON, and prints a line
of JSON for each figure.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedrnn
from benchmarks.published_cells import recurrences
from benchmarks.timed_rows import take_turns
from fusedrnn import cells
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.testing.tolerance import longest_sum, tolerance
from fusedrnn.torch import Layer

_HEADS = 4
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """The sizes of a comparison.

    Attributes:
        cell: The cell of the catalogue.
        steps: T.
        batch: N.
        features: I.
        hidden: H.
    """

    cell: str
    steps: int
    batch: int
    features: int
    hidden: int


WORKLOADS = (
    Workload("sru", 128, 32, 256, 256),
    Workload("sru", 128, 32, 512, 512),
    Workload("slstm", 512, 16, 32, 512),
    Workload("slstm", 512, 16, 512, 512),
    Workload("min_gru_log", 512, 16, 256, 256),
    Workload("min_gru_log", 512, 16, 512, 512),
)


def sru(layer: Layer) -> tuple[Forward, Sequence[Tensor]]:
    """The package's C++ kernel, which a scripted module runs. It is for inference alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its CUDA kernels cannot be compiled here
        package = importlib.import_module("sru")
    own = package.SRUCell(layer.input_size, layer.hidden_size, rescale=False)
    weight, v_f, v_r, bias = (parameter.detach() for parameter in layer.parameters())
    bias[: layer.hidden_size] = 0.0  # as in the paper
    gates = weight.view(3, layer.hidden_size, layer.input_size)
    own.weight.data = gates.permute(2, 1, 0).reshape(layer.input_size, -1).contiguous()
    own.weight_c.data = torch.cat((v_f, v_r))
    own.bias.data = bias[layer.hidden_size :].clone()
    scripted = torch.jit.script(own.eval())
    return lambda x: scripted(x)[0], []


def slstm(layer: Layer) -> tuple[Forward, Sequence[Tensor]]:
    """The loop of the package flashrnn that needs no GPU, behind one product for the inputs of all steps.

    Without gradients it is the package's backend "vanilla"; with them, "vanilla_fwbw", which is faster in training.
    """
    vanilla = importlib.import_module("flashrnn.flashrnn.vanilla")
    differentiable = importlib.import_module("flashrnn.flashrnn.vanilla_fwbw.fwbw").slstm_pt_fwbw
    pointwise = vanilla.flashrnn_pointwise_function_registry["slstm"]
    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    weight, recurrent, bias, recurrent_bias = parameters
    head = _HEADS, layer.hidden_size // _HEADS

    def forward(x: Tensor) -> Tensor:
        gates = F.linear(x, weight, bias).view(*x.shape[:2], 4, *head)
        matrices, biases = recurrent.view(4, *head, -1), recurrent_bias.view(4, *head)
        if torch.is_grad_enabled():
            states = x.new_zeros(4, x.shape[1], *head)
            h: Tensor = differentiable(states, gates.transpose(0, 1), matrices, biases)[0][:, 0]
        else:
            states = x.new_zeros(1, x.shape[1], 4, *head)
            by_head = matrices.permute(1, 3, 0, 2)
            h = vanilla.flashrnn_forward(gates, states, by_head, biases, pointwise)[0][:, :, 0]
        return h.flatten(-2)

    return forward, parameters


def min_gru_log(layer: Layer) -> tuple[Forward, Sequence[Tensor]]:
    """The package minGRU-pytorch: a parallel scan in log space. Its batch comes first, and it has no biases."""
    package = importlib.import_module("minGRU_pytorch.minGRU")
    own = package.minGRU(layer.input_size)
    weight, bias = (parameter.detach() for parameter in layer.parameters())
    bias.zero_()
    own.to_hidden_and_gate.weight.data = torch.cat(tuple(reversed(weight.chunk(2)))).contiguous()
    return lambda x: own(x.transpose(0, 1)).transpose(0, 1), list(own.parameters())


PACKAGES: Mapping[str, Callable[[Layer], tuple[Forward, Sequence[Tensor]]]] = {
    "sru": sru, "slstm": slstm, "min_gru_log": min_gru_log
}  # fmt: skip
"""By the name of the cell, what gives the package's function and its parameters, of the same values as a layer's.

A package without a backward pass has no parameters.
"""


def infer(forward: Forward, x: Tensor) -> Tensor:
    """The output."""
    with torch.inference_mode():
        return forward(x)


def train(forward: Forward, parameters: Sequence[Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the input; those of all parameters are computed too."""
    return torch.autograd.grad(forward(x), (x, *parameters), dy)[0]


def figures_of(workload: Workload, seconds: float, peak: RunPeak) -> Iterator[dict[str, Any]]:
    """The medians of the package and of the fused layer, inference and training.

    Raises:
        AssertionError: If outputs or gradients of the input differ by more than rounding.
    """
    torch.manual_seed(0)
    cell = getattr(cells, workload.cell)
    layer = Layer(cell.with_heads(_HEADS) if workload.cell == "slstm" else cell, workload.features, workload.hidden)
    forward, parameters = PACKAGES[workload.cell](layer)
    x, dy = (torch.randn(workload.steps, workload.batch, size) for size in (workload.features, workload.hidden))
    x.requires_grad_(bool(parameters))
    fused: Forward = lambda x: layer(x)[0]  # noqa: E731
    calls = {"inference": (partial(infer, forward, x), partial(infer, fused, x))}
    if parameters:
        own = list(layer.parameters())
        calls["training"] = (partial(train, forward, parameters, x, dy), partial(train, fused, own, x, dy))
    relative, absolute = tolerance("float32", longest_sum(layer.spec) * workload.steps)
    for phase, (package, ours) in calls.items():
        torch.testing.assert_close(ours(), package(), rtol=relative, atol=absolute)
        timings = take_turns({"package": package, "fused": ours}, seconds, peak)
        yield {"phase": phase, **{name: timing.median for name, timing in timings.items()}}


def main(options: Mapping[str, Any]) -> None:
    """Print the figures."""
    torch.set_num_threads(options["threads"])
    fusedrnn.set_num_threads(options["threads"])
    peak = RunPeak("float32", options["threads"])
    for workload in WORKLOADS:
        if workload.cell in options["parts"]:
            for figure in figures_of(workload, options["seconds"], peak):
                print(json.dumps({**vars(workload), **figure}), flush=True)
    if "recurrences" in options["parts"]:
        for figure in recurrences.figures(options["seconds"], peak):
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
