"""ONNX Runtime: one node a layer, prepacked weights, bound inputs and outputs; inference only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

onnx_model = importlib.import_module("onnx_model")


def facts() -> dict[str, str]:
    """Versions."""
    return {"onnxruntime": onnxruntime.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    if work.training:
        work.refuse("inference only")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = work.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(onnx_model.build(work), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x, values = onnxruntime.OrtValue.ortvalue_from_numpy(work.x), []
    binding.bind_ortvalue_input("x", x)
    for output in session.get_outputs():
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(output.shape, work.dtype)))
        binding.bind_ortvalue_output(output.name, values[-1])

    def run(keep_alive: Any = x) -> Any:  # a binding does not hold references to its arrays
        session.run_with_iobinding(binding)
        return values

    return run, lambda result: onnx_model.arrays(work, [value.numpy() for value in result])
