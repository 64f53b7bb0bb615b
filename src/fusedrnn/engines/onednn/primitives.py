"""oneDNN's C API as objects: memory descriptors, primitives, streams, and primitives with their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np

from fusedrnn.engines.onednn.library import Argument, Library
from fusedrnn.runtime.buffers import aligned_empty

_FLOAT32 = 3
_ANY = 1
_IN_ORDER = 1
_QUERY_ARGUMENT = 255

# Numbers of a primitive's arguments; the gradient of an argument has that number plus DIFF.
SRC, DST = (1, 2, 3), (17, 18, 19)
"""The sequence, h and c that a primitive reads, and those that it writes."""
WEIGHTS_LAYER, WEIGHTS_ITER, WEIGHTS_PEEPHOLE, WEIGHTS_PROJECTION, BIAS = 33, 34, 35, 36, 41
WORKSPACE, SCRATCHPAD = 64, 80
DIFF = 128
_FROM, _TO = 1, 17


class Handle:
    """An object of the library, which its functions take. ``destroy`` is called when the last reference goes."""

    def __init__(self, library: Library, destroy: str, create: str, *arguments: Any) -> None:
        self.library, self._destroy = library, destroy
        self._as_parameter_ = library.new(create, *arguments)  # what ctypes passes for this object

    def __del__(self) -> None:
        if hasattr(self, "_as_parameter_"):
            self.library.call(self._destroy, self)


class Descriptor(Handle):
    """The shape and the layout of a float32 array in memory; ``create`` is without the prefix ``memory_desc_``."""

    def __init__(self, library: Library, create: str, *arguments: Any) -> None:
        super().__init__(library, "memory_desc_destroy", f"memory_desc_{create}", *arguments)

    @classmethod
    def any_layout(cls, library: Library, dims: Sequence[int]) -> Descriptor:
        """The descriptor of an array whose layout a primitive chooses."""
        return cls(library, "create_with_tag", len(dims), _int64s(dims), _FLOAT32, _ANY)

    @classmethod
    def strided(cls, library: Library, dims: Sequence[int], strides: Sequence[int] | None = None) -> Descriptor:
        """The descriptor of an array with these strides, in elements; without them, of a contiguous one."""
        if strides is None:
            strides = [*accumulate(reversed(dims[1:]), mul, initial=1)][::-1]
        return cls(library, "create_with_strides", len(dims), _int64s(dims), _FLOAT32, _int64s(strides))

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 for none."""
        return int(self.library.query("memory_desc_get_size", self))

    def equals(self, other: Descriptor) -> bool:
        """Whether both describe the same layout."""
        return bool(self.library.query("memory_desc_equal", self, other))


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class Primitive(Handle):
    """A computation on arrays of fixed layouts. ``name`` lacks the ending ``_primitive_desc_create``.

    Attributes:
        description: Its primitive descriptor.
        scratch: Bytes of its scratchpad.

    Raises:
        OneDNNError: If the library has no such primitive.
    """

    def __init__(self, library: Library, name: str, *arguments: Any) -> None:
        self.description = Handle(library, "primitive_desc_destroy", f"{name}_primitive_desc_create", *arguments)
        super().__init__(library, "primitive_destroy", "primitive_create", self.description)
        self.scratch = self.descriptor(SCRATCHPAD).nbytes

    def descriptor(self, argument: int) -> Descriptor:
        """The layout of an argument."""
        layout = self.library.query("primitive_desc_query_md", self.description, _QUERY_ARGUMENT, argument)
        return Descriptor(self.library, "clone", layout)


class BoundPrimitive:
    """A primitive with memory objects for its arguments and its scratchpad, used by one call at a time."""

    def __init__(self, primitive: Primitive, arguments: Sequence[int]) -> None:
        self.primitive, library = primitive, primitive.library
        numbers = (*arguments, SCRATCHPAD) if primitive.scratch else arguments
        self._memories = [
            Handle(library, "memory_destroy", "memory_create", primitive.descriptor(number), library.engine, None)
            for number in numbers
        ]
        # As integers, which ctypes passes faster.
        self._handles = [(number, m._as_parameter_) for number, m in zip(numbers, self._memories, strict=True)]
        self._arguments = (Argument * len(numbers))(*[Argument(*pair) for pair in self._handles])

    def __call__(self, stream: Stream, addresses: Mapping[int, int]) -> None:
        """Run it with its arguments at these addresses."""
        call = self.primitive.library.call
        for number, memory in self._handles:
            call("memory_set_data_handle", memory, addresses[number])
        call("primitive_execute", self.primitive, stream, len(self._arguments), self._arguments)


class Reorder(BoundPrimitive):
    """Copies an array from one layout to another, for one call at a time.

    Raises:
        OneDNNError: If the library cannot convert between these layouts.
    """

    def __init__(self, library: Library, source: Descriptor, target: Descriptor) -> None:
        engine = library.engine
        primitive = Primitive(library, "reorder", source, engine, target, engine, library.attributes)
        super().__init__(primitive, (_FROM, _TO))
        self._scratch = aligned_empty((primitive.scratch,), np.uint8)

    def copy(self, stream: Stream, source: int, target: int) -> None:
        """Copy from address ``source`` to address ``target``."""
        self(stream, {_FROM: source, _TO: target, SCRATCHPAD: self._scratch.ctypes.data})


class Stream(Handle):
    """A queue of primitives, which run in order."""

    def __init__(self, library: Library) -> None:
        super().__init__(library, "stream_destroy", "stream_create", library.engine, _IN_ORDER)

    def wait(self) -> None:
        """Wait until all primitives of the stream have run."""
        self.library.call("stream_wait", self)
