"""The engines behind the operator. Importing this package registers them and loads none."""

from __future__ import annotations

from fusedrnn.engines.interface import Capabilities, Engine
from fusedrnn.engines.registry import register
from fusedrnn.extras import needs
from fusedrnn.spec import OPTIONS, RNNSpec


def _cpu(spec: RNNSpec) -> Engine:
    from fusedrnn.engines.cpu.engine import CPUEngine

    return CPUEngine(spec)


def _reference(spec: RNNSpec) -> Engine:
    from fusedrnn.engines.reference.engine import ReferenceEngine

    return ReferenceEngine(spec)


def _cudnn(spec: RNNSpec) -> Engine:
    try:
        from fusedrnn.engines.cudnn import engine as cudnn
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NotImplementedError(needs("backend='cudnn'", "torch")) from error
    return cudnn.make(spec)


def _onednn(spec: RNNSpec) -> Engine:
    from fusedrnn.engines.onednn.engine import OneDNNEngine

    return OneDNNEngine(spec)


register(
    "cpu",
    _cpu,
    Capabilities(resets=True, all_states=True, cells=True, options=OPTIONS),
    order=100,
    description="kernels generated for this processor",
)
register(
    "cudnn",
    _cudnn,
    Capabilities(dropout=False, options=("projection_size", "bias", "reverse")),  # its dropout masks differ from ours
    order=500,
    device="cuda",
    automatic=False,  # arrays are in host memory: only the caller knows whether copying them to a device pays
    description="cuDNN, by way of PyTorch",
)
register(
    "onednn",
    _onednn,
    Capabilities(
        dtypes=("float32",),
        lengths=False,
        dropout=False,
        options=("projection_size", "reset_after", "peepholes", "bias", "reverse"),
    ),
    order=500,
    automatic=False,  # installing a library must not change results
    description="oneDNN's primitives",
)
register(
    "reference",
    _reference,
    Capabilities(resets=True, all_states=True, cells=True, options=OPTIONS),
    order=1000,
    automatic=False,  # several times slower than the others
    description="NumPy, cell by cell",
)
