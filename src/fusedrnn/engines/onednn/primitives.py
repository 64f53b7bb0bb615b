"""What oneDNN computes with, as objects: descriptions of memory, primitives, and one run of a primitive."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from fusedrnn.engines.onednn.library import Argument, Library

_FLOAT32 = 3
_ANY = 1
_IN_ORDER = 1
_ARGUMENT_MD = 255
"""The query for the description of an argument's memory."""

# A primitive's arguments; the gradient of one has its number and DIFF more.
SRC_LAYER, SRC_ITER, SRC_ITER_C = 1, 2, 3
DST_LAYER, DST_ITER, DST_ITER_C = 17, 18, 19
WEIGHTS_LAYER, WEIGHTS_ITER, WEIGHTS_PEEPHOLE, WEIGHTS_PROJECTION, BIAS = 33, 34, 35, 36, 41
WORKSPACE, SCRATCHPAD = 64, 80
DIFF = 128
_FROM, _TO = 1, 17


class Descriptor:
    """The description of float32 in memory.

    Args:
        library: The library.
        dims: Its shape.
        strides: Elements from one to the next in each dimension; None for whatever a primitive likes best.
    """

    def __init__(self, library: Library, dims: Sequence[int], strides: Sequence[int] | None) -> None:
        self.library = library
        numbers = ctypes.c_int64 * len(dims)
        if strides is None:
            self.handle = library.new("memory_desc_create_with_tag", len(dims), numbers(*dims), _FLOAT32, _ANY)
        else:
            self.handle = library.new(
                "memory_desc_create_with_strides", len(dims), numbers(*dims), _FLOAT32, numbers(*strides)
            )

    @classmethod
    def plain(cls, library: Library, *dims: int) -> Descriptor:
        """Of an array that is contiguous."""
        strides = [1]
        for size in reversed(dims[1:]):
            strides.append(strides[-1] * size)
        return cls(library, dims, strides[::-1])

    @classmethod
    def of(cls, library: Library, handle: int) -> Descriptor:
        """A copy of one that the library owns."""
        descriptor = cls.__new__(cls)
        descriptor.library, descriptor.handle = library, library.new("memory_desc_clone", handle)
        return descriptor

    def __del__(self) -> None:
        if handle := getattr(self, "handle", 0):
            self.library.call("memory_desc_destroy", handle)

    @property
    def nbytes(self) -> int:
        """Bytes of such memory; 0 if there is none."""
        return int(self.library.cdll.dnnl_memory_desc_get_size(self.handle))

    def equals(self, other: Descriptor) -> bool:
        """Whether both describe the same."""
        return bool(self.library.cdll.dnnl_memory_desc_equal(self.handle, other.handle))


class Primitive:
    """A computation, prepared.

    Args:
        library: The library.
        name: The function that describes it, without ``_primitive_desc_create``.
        arguments: What that is given.

    Raises:
        OneDNNError: If the library has none of that kind.
    """

    def __init__(self, library: Library, name: str, *arguments: Any) -> None:
        self.library = library
        self.description = library.new(f"{name}_primitive_desc_create", *arguments)
        self.handle = library.new("primitive_create", self.description)
        self.scratch = self.descriptor(SCRATCHPAD).nbytes

    def __del__(self) -> None:
        if handle := getattr(self, "handle", 0):
            self.library.call("primitive_destroy", handle)
        if handle := getattr(self, "description", 0):
            self.library.call("primitive_desc_destroy", handle)

    def descriptor(self, argument: int) -> Descriptor:
        """How it wants an argument to lie."""
        query = self.library.cdll.dnnl_primitive_desc_query_md
        return Descriptor.of(self.library, query(self.description, _ARGUMENT_MD, argument))


class Run:
    """A primitive with its arguments at hand, for one call at a time.

    Args:
        primitive: The primitive.
        arguments: Which arguments it is given.
    """

    def __init__(self, primitive: Primitive, arguments: Sequence[int]) -> None:
        self._primitive, library = primitive, primitive.library
        self._library = library
        self._memories: dict[int, int] = {}
        for argument in arguments:
            descriptor = primitive.descriptor(argument)
            self._memories[argument] = library.new("memory_create", descriptor.handle, library.engine, None)
        pairs = [Argument(argument, memory) for argument, memory in self._memories.items()]
        self._arguments = (Argument * len(pairs))(*pairs)

    def __del__(self) -> None:
        for memory in getattr(self, "_memories", {}).values():
            self._library.call("memory_destroy", memory)

    def __call__(self, stream: int, addresses: Mapping[int, int]) -> None:
        """Run it on memory at these addresses."""
        library = self._library
        for argument, memory in self._memories.items():
            library.call("memory_set_data_handle", memory, addresses[argument])
        library.call("primitive_execute", self._primitive.handle, stream, len(self._arguments), self._arguments)


class Reorder:
    """What copies memory from one layout to another, for one call at a time.

    Args:
        library: The library.
        before: The one layout.
        after: The other.

    Attributes:
        scratch: Bytes of scratch that it needs.

    Raises:
        OneDNNError: If the library cannot do it.
    """

    def __init__(self, library: Library, before: Descriptor, after: Descriptor) -> None:
        engine = library.engine
        primitive = Primitive(library, "reorder", before.handle, engine, after.handle, engine, library.attributes)
        self.scratch = primitive.scratch
        self._run = Run(primitive, (_FROM, _TO, *([SCRATCHPAD] if self.scratch else [])))

    def __call__(self, stream: int, source: int, target: int, scratch: int) -> None:
        """Copy from one address to another."""
        self._run(stream, {_FROM: source, _TO: target, SCRATCHPAD: scratch})


class Stream:
    """Primitives given to it run one after the other.

    Args:
        library: The library.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self.handle = library.new("stream_create", library.engine, _IN_ORDER)

    def __del__(self) -> None:
        if handle := getattr(self, "handle", 0):
            self._library.call("stream_destroy", handle)

    def wait(self) -> None:
        """Until all of them have run."""
        self._library.call("stream_wait", self.handle)
