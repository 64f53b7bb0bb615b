"""Arrays beside protected memory: to read or write one byte past their edge ends the process."""

import ctypes
import mmap
import sys

import numpy as np

_PAGE = mmap.PAGESIZE
_NONE, _READ = 0, 1

AVAILABLE = sys.platform in ("linux", "darwin")


def _protect(address, size, allowed):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), allowed):
        raise OSError(ctypes.get_errno(), "mprotect")


def fenced(shape, dtype, side):
    """A new array of zeros that ends where a protected page begins (side ``"end"``), or begins where one ends."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    pages = -(-size // _PAGE) * _PAGE
    memory = np.frombuffer(mmap.mmap(-1, pages + _PAGE), np.uint8)
    first = pages - size if side == "end" else _PAGE
    _protect(memory.ctypes.data + (pages if side == "end" else 0), _PAGE, _NONE)
    return memory[first : first + size].view(kind).reshape(shape)


def fenced_copy(array, side):
    """A fenced copy of an array that must not be written: a kernel that writes to it ends the process."""
    copy = fenced(array.shape, array.dtype, side)
    copy[...] = array
    start = copy.ctypes.data // _PAGE * _PAGE
    _protect(start, copy.ctypes.data + copy.nbytes - start, _READ)
    return copy
