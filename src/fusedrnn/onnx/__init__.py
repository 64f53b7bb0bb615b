"""ONNX's LSTM, GRU and RNN on the fused operator. This package runs models, and reads and writes their weights.

It implements the interface of onnx backends: :func:`prepare`, :func:`run_model`, :func:`run_node`,
:func:`supports_device` and :func:`is_compatible`. :func:`read` returns the recurrent layers of a model as specs and
flat parameter vectors; :func:`write` writes parameters into a model.
"""

from fusedrnn.extras import needed_by

with needed_by("fusedrnn.onnx", "onnx"):
    import onnx as _onnx  # noqa: F401 -- checks that the package is installed

from fusedrnn.onnx.backend import Backend, PreparedModel
from fusedrnn.onnx.ort.accelerated_session import AcceleratedSession, accelerate
from fusedrnn.onnx.ort.report import NodeReport, Report
from fusedrnn.onnx.weight_layout import Part
from fusedrnn.onnx.weights_io import Layer, read
from fusedrnn.onnx.writing import write

is_compatible = Backend.is_compatible
prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device

__all__ = [
    "AcceleratedSession",
    "Backend",
    "Layer",
    "NodeReport",
    "Part",
    "PreparedModel",
    "Report",
    "accelerate",
    "is_compatible",
    "prepare",
    "read",
    "run_model",
    "run_node",
    "supports_device",
    "write",
]
