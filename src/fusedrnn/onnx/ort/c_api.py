"""The parts of ONNX Runtime's C API in use: numbers of functions, the struct of a custom operator, types.

New functions are only added at the end of the API, so the numbers are valid in all later releases. See
``onnxruntime_c_api.h``.
"""

from __future__ import annotations

import ctypes

API_VERSION = 16
"""The version of the API to request: the first in which a kernel may return an error."""

OPERATOR_FIELDS = (
    "version", "CreateKernel", "GetName", "GetExecutionProviderType", "GetInputType", "GetInputTypeCount",
    "GetOutputType", "GetOutputTypeCount", "KernelCompute", "KernelDestroy", "GetInputCharacteristic",
    "GetOutputCharacteristic", "GetInputMemoryType", "GetVariadicInputMinArity", "GetVariadicInputHomogeneity",
    "GetVariadicOutputMinArity", "GetVariadicOutputHomogeneity", "CreateKernelV2", "KernelComputeV2",
)  # fmt: skip
"""The fields of an ``OrtCustomOp`` in that version: the version number, then addresses of functions."""

FLOAT, INT32 = 1, 6
"""Numbers of element types."""
FAIL = 1
"""The error code for a kernel that failed."""

_FUNCTIONS = {
    "CreateStatus": 0, "GetErrorMessage": 2, "CreateCustomOpDomain": 26, "CustomOpDomain_Add": 27,
    "AddCustomOpDomain": 28, "GetTensorMutableData": 51, "GetDimensionsCount": 61, "GetDimensions": 62,
    "GetTensorTypeAndShape": 65, "KernelContext_GetInput": 90, "KernelContext_GetOutput": 91,
    "ReleaseTensorTypeAndShapeInfo": 99,
}  # fmt: skip

_Status = ctypes.c_void_p
_address = ctypes.c_void_p


def function_offset(name: str) -> int:
    """Bytes from the beginning of an ``OrtApi`` to the address of a function."""
    return 8 * _FUNCTIONS[name]


class Api:
    """Functions of an ``OrtApi`` for Python; ``base`` is the address of the ``OrtApiBase``.

    Attributes:
        address: The address of the ``OrtApi``.

    Raises:
        RuntimeError: If this release of ONNX Runtime is too old.
    """

    def __init__(self, base: int) -> None:
        get_api = ctypes.CFUNCTYPE(_address, ctypes.c_uint32)(_word(base))
        address = get_api(API_VERSION)
        if address is None:
            raise RuntimeError(f"ONNX Runtime must have version {API_VERSION} of its C API, as from release 1.16 on")
        self.address: int = address

    def new_domain(self, name: bytes) -> int:
        """The address of a new domain of operators."""
        domain = _address()
        self._call("CreateCustomOpDomain", ctypes.c_char_p(name), ctypes.byref(domain))
        return domain.value or 0

    def add_operator(self, domain: int, operator: int) -> None:
        """Add an operator to a domain, which refers to the struct at this address."""
        self._call("CustomOpDomain_Add", _address(domain), _address(operator))

    def add_domain(self, options: int, domain: int) -> None:
        """Add a domain to session options, which refer to it."""
        self._call("AddCustomOpDomain", _address(options), _address(domain))

    def new_status(self, message: str) -> int:
        """The address of an error, which ONNX Runtime frees."""
        text = ctypes.c_char_p(message.encode(errors="replace"))
        status: int = self._function("CreateStatus", _Status)(ctypes.c_int(FAIL), text)
        return status

    def _call(self, name: str, *arguments: object) -> None:
        status = self._function(name, _Status)(*arguments)
        if status:
            message = self._function("GetErrorMessage", ctypes.c_char_p)(_address(status))
            raise RuntimeError(f"ONNX Runtime's {name} failed: {message.decode(errors='replace')}")

    def _function(self, name: str, result: type) -> ctypes._FuncPointer:
        return ctypes.CFUNCTYPE(result)(_word(self.address + function_offset(name)))


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
