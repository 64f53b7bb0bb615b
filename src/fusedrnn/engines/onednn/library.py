"""oneDNN's C API (version 3) through ctypes: finds and loads the library, declares and checks its functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fusedrnn import env
from fusedrnn.extras import needs
from fusedrnn.locks import Lock

FILE = "libdnnl.so.3"
PACKAGES = ("onednn", "onednn-cpu-gomp", "onednn-cpu-iomp", "onednn-cpu-tbb")
"""PyPI's packages of the library, one for each CPU runtime. All of them install the same file in the same folder."""
_OPENCL_DRIVER = "libintelocl.so"
_VERSION = 3

SUCCESS, OUT_OF_MEMORY, UNIMPLEMENTED = 0, 1, 3
_STATUS = {OUT_OF_MEMORY: "out of memory", 2: "invalid arguments", UNIMPLEMENTED: "unimplemented", 5: "runtime error"}
SEQUENTIAL, OPENMP, TBB, SYCL = 1, 2, 4, 512
RUNTIMES = {SEQUENTIAL: "sequential", OPENMP: "OpenMP", TBB: "TBB", SYCL: "SYCL"}
_CPU = 1
_USER_SCRATCHPAD = 1


@contextmanager
def opencl_driver(path: Path) -> Iterator[None]:
    """Let OpenCL's loader find this driver inside the block, unless the environment names drivers already."""
    variables = "OCL_ICD_FILENAMES", "OCL_ICD_VENDORS"
    if any(name in os.environ for name in variables) or not path.is_file():
        yield
        return
    os.environ[variables[0]] = str(path)
    try:
        yield
    finally:
        del os.environ[variables[0]]


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", c_int),
        ("minor", c_int),
        ("patch", c_int),
        ("hash", c_char_p),
        ("cpu_runtime", c_uint),
        ("gpu_runtime", c_uint),
    )


class Argument(ctypes.Structure):
    """An argument of a primitive: its number, and the handle of its memory."""

    _fields_ = (("arg", c_int), ("memory", c_void_p))


_NEW = POINTER(c_void_p)


def _cell_signatures(cell: str) -> dict[str, tuple[Any, ...]]:
    """The functions that create a cell's primitive descriptors, from one memory descriptor for each array.

    The one for backward also takes a memory descriptor for each gradient, and forward's primitive descriptor as a hint.
    """
    activation, slopes = ((c_int,), (c_float, c_float)) if cell == "vanilla_rnn" else ((), ())
    begin = c_int, _NEW, c_void_p, c_int, *activation, c_int
    arrays = (c_void_p,) * (11 if cell == "lstm" else 7)
    return {
        f"{cell}_forward_primitive_desc_create": (*begin, *arrays, c_uint, *slopes, c_void_p),
        f"{cell}_backward_primitive_desc_create": (*begin, *arrays, *arrays, c_uint, *slopes, c_void_p, c_void_p),
    }


# The result and the parameters of each function. A c_int is a status, except that of memory_desc_equal.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "version": (POINTER(_Version),),
    "engine_create": (c_int, _NEW, c_int, c_size_t),
    "engine_get_count": (c_size_t, c_int),
    "stream_create": (c_int, _NEW, c_void_p, c_uint),
    "stream_wait": (c_int, c_void_p),
    "stream_destroy": (c_int, c_void_p),
    "memory_desc_create_with_strides": (c_int, _NEW, c_int, POINTER(c_int64), c_int, POINTER(c_int64)),
    "memory_desc_create_with_tag": (c_int, _NEW, c_int, POINTER(c_int64), c_int, c_int),
    "memory_desc_clone": (c_int, _NEW, c_void_p),
    "memory_desc_destroy": (c_int, c_void_p),
    "memory_desc_get_size": (c_size_t, c_void_p),
    "memory_desc_equal": (c_int, c_void_p, c_void_p),
    "memory_create": (c_int, _NEW, c_void_p, c_void_p, c_void_p),
    "memory_set_data_handle": (c_int, c_void_p, c_void_p),
    "memory_destroy": (c_int, c_void_p),
    "primitive_attr_create": (c_int, _NEW),
    "primitive_attr_set_scratchpad_mode": (c_int, c_void_p, c_int),
    "primitive_desc_query_md": (c_void_p, c_void_p, c_int, c_int),
    "primitive_desc_destroy": (c_int, c_void_p),
    "primitive_create": (c_int, _NEW, c_void_p),
    "primitive_execute": (c_int, c_void_p, c_void_p, c_int, POINTER(Argument)),
    "primitive_destroy": (c_int, c_void_p),
    "reorder_primitive_desc_create": (c_int, _NEW, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    **_cell_signatures("lstm"),
    **_cell_signatures("gru"),
    **_cell_signatures("lbr_gru"),
    **_cell_signatures("vanilla_rnn"),
}


class OneDNNError(RuntimeError):
    """A function of the library failed."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"oneDNN's {name} failed: {_STATUS.get(status, f'status {status}')}")
        self.status = status


class Library:
    """oneDNN, loaded from the file ``path``.

    Attributes:
        cdll: The library in ctypes.
        version: Its version as text.
        runtime: Its CPU runtime, a key of :data:`RUNTIMES`.
        engine: The handle of its CPU engine.
        attributes: The handle of the attributes of all primitives: the caller provides the scratchpad, so that calls
            on several threads can share a primitive.

    Raises:
        ImportError: If a file is missing, if the library is not oneDNN 3, if it finds no CPU to run on, or if it fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cdll = _load_with_dependencies(str(path), path.parent)
        if not hasattr(self.cdll, "dnnl_version"):
            raise ImportError(f"{path} is not oneDNN: it has no dnnl_version")
        version = self._declare("version", *_SIGNATURES["version"])().contents
        if version.major != _VERSION:
            raise ImportError(f"{path} is oneDNN {version.major}.{version.minor}; expected {_VERSION}.x")
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.runtime: int = version.cpu_runtime
        if self.runtime not in RUNTIMES:
            known = ", ".join(RUNTIMES.values())
            raise ImportError(f"{path} has the CPU runtime {self.runtime}; expected one of {known}")
        self._functions = {name: self._declare(name, *types) for name, types in _SIGNATURES.items()}
        # SYCL runs on CPUs through OpenCL, whose loader does not look for drivers in the library's folder.
        with opencl_driver(path.parent / _OPENCL_DRIVER):
            count = self.query("engine_get_count", _CPU)
        if not count:
            raise ImportError(
                f"{path} runs on {RUNTIMES[self.runtime]}, which finds no CPU here; expected {_OPENCL_DRIVER} of the "
                "package intel-opencl-rt beside it, or OCL_ICD_FILENAMES to name it (onednn-cpu-gomp needs neither)"
            )
        try:
            self.engine = self.new("engine_create", _CPU, 0)
            self.attributes = self.new("primitive_attr_create")
            self.call("primitive_attr_set_scratchpad_mode", self.attributes, _USER_SCRATCHPAD)
        except OneDNNError as error:
            raise ImportError(f"{path} cannot be used: {error}") from error

    def _declare(self, name: str, result: Any, *parameters: Any) -> Callable[..., Any]:
        function: Any = getattr(self.cdll, f"dnnl_{name}", None)
        if function is None:
            raise ImportError(f"{self.path}, oneDNN {self.version}, has no dnnl_{name}")
        function.restype, function.argtypes = result, parameters
        declared: Callable[..., Any] = function
        return declared

    def query(self, name: str, *arguments: Any) -> Any:
        """Call a function that returns a value and cannot fail."""
        return self._functions[name](*arguments)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            MemoryError: If there is no memory.
            OneDNNError: If the function fails otherwise.
        """
        status = self._functions[name](*arguments)
        if status == OUT_OF_MEMORY:
            raise MemoryError(f"oneDNN's dnnl_{name} failed: {_STATUS[status]}")
        if status != SUCCESS:
            raise OneDNNError(f"dnnl_{name}", status)

    def new(self, name: str, *arguments: Any) -> int:
        """Call a function that creates an object, and return the object's handle; raises what :meth:`call` raises."""
        handle = c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0


_lock = Lock()


def load() -> Library:
    """The library, loaded once.

    Raises:
        ImportError: If it is missing or unusable; the message says what to install.
    """
    with _lock:
        return _load()


@lru_cache(maxsize=1)
def _load() -> Library:
    return Library(find())


def find() -> Path:
    """The library's path: ``FUSEDRNN_ONEDNN``, else a file of one of its packages.

    Raises:
        ImportError: If there is no such file.
    """
    path = env.onednn()
    if path is not None:
        if not path.is_file():
            raise ImportError(f"FUSEDRNN_ONEDNN must be the path of oneDNN's {FILE}; got {path}, which is no file")
        return path
    for package in PACKAGES:
        try:
            files = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == FILE:
                return Path(os.path.realpath(str(file.locate())))
    raise ImportError(needs("backend='onednn'", "onednn"))


def _load_with_dependencies(name: str, folder: Path) -> ctypes.CDLL:
    """Load a library after its dependencies in the same folder, where the system's loader does not look.

    Raises:
        ImportError: If a file is missing; the message names it.
    """
    tried = {name}
    while True:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            dependency = str(error).split(":")[0]
            if dependency in tried or not (folder / dependency).is_file():
                raise ImportError(f"oneDNN cannot be loaded: {error}") from None
            tried.add(dependency)
            _load_with_dependencies(str(folder / dependency), folder)
