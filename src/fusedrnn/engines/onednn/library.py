"""oneDNN's C API (version 3) through ctypes: found, loaded with what it needs, its functions typed and checked."""

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
from fusedrnn.locks import Lock

FILE = "libdnnl.so.3"
PACKAGES = ("onednn", "onednn-cpu-gomp", "onednn-cpu-iomp", "onednn-cpu-tbb")
"""What PyPI calls the library, by what its threads are; all of them put the same file into the same folder."""
_OPENCL = "libintelocl.so"
_MOST_NEEDED = 32
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
    """What a primitive is given: which of its arguments, and the memory."""

    _fields_ = (("arg", c_int), ("memory", c_void_p))


_NEW = POINTER(c_void_p)
_FORWARD = (_NEW, c_void_p, c_int)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "engine_create": (_NEW, c_int, c_size_t),
    "stream_create": (_NEW, c_void_p, c_uint),
    "stream_wait": (c_void_p,),
    "stream_destroy": (c_void_p,),
    "memory_desc_create_with_strides": (_NEW, c_int, POINTER(c_int64), c_int, POINTER(c_int64)),
    "memory_desc_create_with_tag": (_NEW, c_int, POINTER(c_int64), c_int, c_int),
    "memory_desc_clone": (_NEW, c_void_p),
    "memory_desc_destroy": (c_void_p,),
    "memory_create": (_NEW, c_void_p, c_void_p, c_void_p),
    "memory_set_data_handle": (c_void_p, c_void_p),
    "memory_destroy": (c_void_p,),
    "primitive_attr_create": (_NEW,),
    "primitive_attr_set_scratchpad_mode": (c_void_p, c_int),
    "primitive_desc_destroy": (c_void_p,),
    "primitive_create": (_NEW, c_void_p),
    "primitive_execute": (c_void_p, c_void_p, c_int, POINTER(Argument)),
    "primitive_destroy": (c_void_p,),
    "reorder_primitive_desc_create": (_NEW, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    # Of a cell: its descriptors, flags, the forward descriptor that backward takes as a hint, attributes.
    "lstm_forward_primitive_desc_create": (*_FORWARD, c_int, *[c_void_p] * 11, c_uint, c_void_p),
    "lstm_backward_primitive_desc_create": (*_FORWARD, c_int, *[c_void_p] * 22, c_uint, c_void_p, c_void_p),
    **{
        f"{cell}_forward_primitive_desc_create": (*_FORWARD, c_int, *[c_void_p] * 7, c_uint, c_void_p)
        for cell in ("gru", "lbr_gru")
    },
    **{
        f"{cell}_backward_primitive_desc_create": (*_FORWARD, c_int, *[c_void_p] * 14, c_uint, c_void_p, c_void_p)
        for cell in ("gru", "lbr_gru")
    },
    "vanilla_rnn_forward_primitive_desc_create": (
        *_FORWARD, c_int, c_int, *[c_void_p] * 7, c_uint, c_float, c_float, c_void_p,
    ),
    "vanilla_rnn_backward_primitive_desc_create": (
        *_FORWARD, c_int, c_int, *[c_void_p] * 14, c_uint, c_float, c_float, c_void_p, c_void_p,
    ),
}  # fmt: skip


class OneDNNError(RuntimeError):
    """A function of the library failed."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"oneDNN's {name} failed: {_STATUS.get(status, f'status {status}')}")
        self.status = status


class Library:
    """The library once loaded: its functions as attributes without their prefix, its engine, how it runs threads.

    Args:
        path: The file.

    Attributes:
        path: The same.
        version: Its version as text.
        runtime: What its threads are: one of :data:`RUNTIMES`.
        engine: Its engine for this processor.
        attributes: Of every primitive: scratch is the caller's, so that any number of threads may run it.

    Raises:
        ImportError: If it or what it needs is not there, or it is another version, or finds no processor to run on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cdll = _loaded(str(path), path.parent)
        version = self._version()
        if version.major != _VERSION:
            raise ImportError(f"{path} is oneDNN {version.major}.{version.minor}; expected {_VERSION}.x")
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self.runtime: int = version.cpu_runtime
        if self.runtime not in RUNTIMES:
            known = ", ".join(RUNTIMES.values())
            raise ImportError(f"{path} has the CPU runtime {self.runtime}; expected one of {known}")
        self._functions = {name: self._function(name, types) for name, types in _SIGNATURES.items()}
        self.cdll.dnnl_memory_desc_get_size.restype = c_size_t
        self.cdll.dnnl_memory_desc_get_size.argtypes = (c_void_p,)
        self.cdll.dnnl_memory_desc_equal.argtypes = (c_void_p, c_void_p)
        self.cdll.dnnl_primitive_desc_query_md.restype = c_void_p
        self.cdll.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        self.cdll.dnnl_engine_get_count.restype = c_size_t
        # SYCL runs on processors through OpenCL, whose driver lies where its loader does not look.
        with opencl_driver(path.parent / _OPENCL):
            count = self.cdll.dnnl_engine_get_count(_CPU)
        if not count:
            raise ImportError(
                f"{path} runs on {RUNTIMES[self.runtime]}, which finds no CPU here; expected {_OPENCL} of the package "
                "intel-opencl-rt beside it, or OCL_ICD_FILENAMES to name it (onednn-cpu-gomp needs neither)"
            )
        self.engine = self.new("engine_create", _CPU, 0)
        self.attributes = self.new("primitive_attr_create")
        self.call("primitive_attr_set_scratchpad_mode", self.attributes, _USER_SCRATCHPAD)

    def _version(self) -> Any:
        try:
            self.cdll.dnnl_version.restype = POINTER(_Version)
            return self.cdll.dnnl_version().contents
        except AttributeError:
            raise ImportError(f"{self.path} is not oneDNN: it has no dnnl_version") from None

    def _function(self, name: str, types: tuple[Any, ...]) -> Callable[..., int]:
        try:
            function: Any = getattr(self.cdll, f"dnnl_{name}")
        except AttributeError:
            raise ImportError(f"{self.path}, oneDNN {self.version}, has no dnnl_{name}") from None
        function.argtypes, function.restype = types, c_int
        checked: Callable[..., int] = function
        return checked

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            MemoryError: If it says that there is no memory.
            OneDNNError: If it says that it failed otherwise.
        """
        status = self._functions[name](*arguments)
        if status == OUT_OF_MEMORY:
            raise MemoryError(f"oneDNN's dnnl_{name} failed: {_STATUS[status]}")
        if status != SUCCESS:
            raise OneDNNError(f"dnnl_{name}", status)

    def new(self, name: str, *arguments: Any) -> int:
        """Call a function that makes something, and return that.

        Raises:
            OneDNNError: If it says that it failed.
        """
        handle = c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0


_lock = Lock()


def load() -> Library:
    """The library, loaded once.

    Raises:
        ImportError: Saying what is missing and what to install.
    """
    with _lock:
        return _load()


@lru_cache(maxsize=1)
def _load() -> Library:
    return Library(find())


def find() -> Path:
    """The library's path: ``FUSEDRNN_ONEDNN``, else a file of one of its packages.

    Raises:
        ImportError: If it is not there.
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
    raise ImportError(f"oneDNN is not installed: pip install 'fusedrnn[onednn]' brings its {FILE}")


def _loaded(name: str, folder: Path) -> ctypes.CDLL:
    """Load a library, before it those that it needs and that lie in the same folder, where no loader looks.

    Raises:
        ImportError: Naming the file that is missing.
    """
    missing = ""
    for _ in range(_MOST_NEEDED):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            needed = str(error).split(":")[0]
            if needed in (name, missing) or not (folder / needed).is_file():
                raise ImportError(f"oneDNN cannot be loaded: {error}") from None
            missing = needed
            _kept.append(_loaded(str(folder / needed), folder))
    raise ImportError(f"oneDNN cannot be loaded: {name} needs more than {_MOST_NEEDED} other libraries")


# What the library needs stays loaded with it.
_kept: list[ctypes.CDLL] = []
