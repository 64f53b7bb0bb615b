"""OpenVINO on the CPU in full precision, made for latency, tensors shared; inference alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

onnx_model = importlib.import_module("onnx_model")


def facts() -> dict[str, str]:
    """Versions."""
    return {"openvino": openvino.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    if problem.training:
        problem.refuse("inference only")
    if problem.dtype != "float32":
        problem.refuse("computes in float32 whatever the model says")
    core = openvino.Core()
    model = core.read_model(onnx_model.build(problem))
    options = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    x, made = problem.x, []
    request.set_tensor("x", openvino.Tensor(x, shared_memory=True))
    for name in onnx_model.output_names(problem):
        made.append(np.empty(list(request.get_tensor(name).shape), problem.dtype))
        request.set_tensor(name, openvino.Tensor(made[-1], shared_memory=True))

    def run(shared: Any = x) -> Any:  # a tensor does not keep the array that it shares
        request.infer(share_inputs=True, share_outputs=True)
        return made

    return run, lambda values: onnx_model.arrays(problem, values)
