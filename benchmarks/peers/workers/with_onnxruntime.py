"""ONNX Runtime: one node for each layer, prepacked weights, bound inputs and outputs; inference only.

Its dynamic quantization supports LSTMs, with a scale for each row of a weight.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

rnn_graph = importlib.import_module("rnn_graph")


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
    model = _quantized(work) if work.compute == "int8" else rnn_graph.build(work)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x, values = onnxruntime.OrtValue.ortvalue_from_numpy(work.x), []
    binding.bind_ortvalue_input("x", x)
    for output in session.get_outputs():
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(output.shape, work.dtype)))
        binding.bind_ortvalue_output(output.name, values[-1])

    def run(keep_alive: Any = x) -> Any:  # a binding does not hold references to its arrays
        session.run_with_iobinding(binding)
        return values

    return run, lambda result: rnn_graph.arrays(work, [value.numpy() for value in result])


def _quantized(work: Workload) -> bytes:
    if work.mode != "lstm":
        work.refuse("quantizes no recurrent layer but LSTM")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        model, quantized = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        model.write_bytes(rnn_graph.build(work))
        options = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": not _has_vnni()}
        quantize_dynamic(model, quantized, op_types_to_quantize=["LSTM"], **options)
        return quantized.read_bytes()


def _has_vnni() -> bool:
    """Whether the processor has an exact product of int8. Else sums saturate in 16 bits, unless weights have 7 bits."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
