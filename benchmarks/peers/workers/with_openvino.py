"""OpenVINO on the CPU in full precision or bfloat16, tuned for latency, with shared tensors; inference only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

rnn_graph = importlib.import_module("rnn_graph")


def facts() -> dict[str, str]:
    """Versions."""
    return {"openvino": openvino.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    if work.training:
        work.refuse("inference only")
    if work.dtype != "float32":
        work.refuse("computes in float32 even if the model is in float64")
    core = openvino.Core()
    if work.compute == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        work.refuse("computes in bfloat16 only on processors with its instructions")
    model = core.read_model(rnn_graph.build(work))
    options = {
        "INFERENCE_NUM_THREADS": work.threads,
        "INFERENCE_PRECISION_HINT": "bf16" if work.compute == "bfloat16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    x, values = work.x, []
    request.set_tensor("x", openvino.Tensor(x, shared_memory=True))
    for name in rnn_graph.output_names(work):
        values.append(np.empty(list(request.get_tensor(name).shape), work.dtype))
        request.set_tensor(name, openvino.Tensor(values[-1], shared_memory=True))

    def run(keep_alive: Any = x) -> Any:  # a tensor does not hold a reference to the array that it shares
        request.infer(share_inputs=True, share_outputs=True)
        return values

    return run, lambda result: rnn_graph.arrays(work, result)
