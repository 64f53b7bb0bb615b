"""The engines behind the operator, registered: importing this package makes them known and loads none of them."""

from __future__ import annotations

from fusedrnn.engines import registry
from fusedrnn.spec import OPTIONS, RNNSpec


def _cpu(spec: RNNSpec) -> registry.Engine:
    from fusedrnn.engines.cpu.engine import CPUEngine

    return CPUEngine(spec)


def _reference(spec: RNNSpec) -> registry.Engine:
    from fusedrnn.engines.reference.engine import ReferenceEngine

    return ReferenceEngine(spec)


def _cudnn(spec: RNNSpec) -> registry.Engine:
    try:
        from fusedrnn.engines.cudnn import engine as cudnn
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NotImplementedError("torch is not installed (pip install 'fusedrnn[torch]')") from error
    return cudnn.make(spec)


def _onednn(spec: RNNSpec) -> registry.Engine:
    from fusedrnn.engines.onednn.engine import OneDNNEngine

    return OneDNNEngine(spec)


registry.register(
    "cpu",
    _cpu,
    registry.Supports(options=OPTIONS),
    order=100,
    description="kernels generated for this processor",
)
registry.register(
    "cudnn",
    _cudnn,
    registry.Supports(dropout=False, options=("projection_size", "bias", "reverse")),  # its masks are not ours
    order=500,
    device="cuda",
    automatic=False,  # arrays are on the processor: whether the way to the device and back is worth it, no one knows
    description="cuDNN, by way of PyTorch",
)
registry.register(
    "onednn",
    _onednn,
    registry.Supports(
        dtypes=("float32",),
        lengths=False,
        dropout=False,
        options=("projection_size", "reset_after", "peepholes", "bias", "reverse"),
    ),
    order=500,
    automatic=False,  # a library that is there by chance must not change what runs
    description="oneDNN's primitives",
)
registry.register(
    "reference",
    _reference,
    registry.Supports(options=OPTIONS),
    order=1000,
    automatic=False,  # several times slower: nobody wants that unasked
    description="NumPy, cell by cell",
)
