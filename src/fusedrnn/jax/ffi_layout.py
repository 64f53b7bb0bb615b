"""Byte offsets of what a handler reads in the structs of XLA's foreign function interface, by its C API.

They are from ``xla/ffi/api/c_api.h``, which jaxlib ships. Later versions have added fields to the ends of structs, but
have not moved these. :mod:`fusedrnn.jax.handler_kernel` checks the sizes of the structs of a call before it reads them.
"""

from __future__ import annotations

STRUCT_SIZE, EXTENSION = 0, 8
"""Every struct begins with its size, in the version of the library that wrote it, and the address of an extension."""

# XLA_FFI_CallFrame, with XLA_FFI_Args, _Rets and _Attrs inside; each holds a count and the address of an array of
# addresses.
FRAME_API = 16
NUM_ARGS, ARGS, NUM_RETS, RETS, NUM_ATTRS, ATTR_NAMES, ATTRS = 56, 72, 96, 112, 136, 152, 160
MIN_FRAME_SIZE = 168

# XLA_FFI_Extension_Base and XLA_FFI_Metadata_Extension, in a call that asks for the version of the handler.
EXTENSION_TYPE, METADATA_EXTENSION, EXTENSION_METADATA = 8, 1, 24
METADATA_MAJOR, METADATA_MINOR, METADATA_TRAITS = 24, 28, 32
API_VERSION = 0, 1
"""The oldest version that the handler works with; XLA accepts every version up to its own."""

# XLA_FFI_Buffer, XLA_FFI_Scalar, XLA_FFI_ByteSpan.
BUFFER_DATA, BUFFER_RANK, BUFFER_DIMS, MIN_BUFFER_SIZE = 24, 32, 40, 48
SCALAR_VALUE = 8
SPAN_ADDRESS, SPAN_SIZE = 0, 8

# XLA_FFI_Api and XLA_FFI_Error_Create_Args.
API_ERROR_CREATE = 48
ERROR_ARGS_SIZE, ERROR_MESSAGE, ERROR_CODE = 28, 16, 24
INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8
