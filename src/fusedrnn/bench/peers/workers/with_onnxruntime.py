"""ONNX Runtime: one node a layer, weights packed ahead, inputs and outputs bound; inference alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from fusedrnn.bench.peers.workers.protocol import Problem

onnx_model = importlib.import_module("onnx_model")


def facts() -> dict[str, str]:
    """Versions."""
    return {"onnxruntime": onnxruntime.__version__}


def prepare(problem: Problem) -> tuple[Any, Any]:
    """The call to be timed, and what makes arrays of its result."""
    if problem.training:
        problem.refuse("inference only")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(onnx_model.build(problem), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x, made = onnxruntime.OrtValue.ortvalue_from_numpy(problem.x), []
    binding.bind_ortvalue_input("x", x)
    for output in session.get_outputs():
        made.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(output.shape, problem.dtype)))
        binding.bind_ortvalue_output(output.name, made[-1])

    def run(shared: Any = x) -> Any:  # a binding does not keep the arrays behind its values
        session.run_with_iobinding(binding)
        return made

    return run, lambda values: onnx_model.arrays(problem, [value.numpy() for value in values])
