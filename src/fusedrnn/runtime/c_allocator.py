"""Options of the C library's allocator."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Make the C library of this process keep memory that is freed, instead of returning it to the system.

    By default glibc takes each block of more than 32 MiB from the system, which clears its pages when they are first
    used, and gives it back when it is freed. PyTorch takes its results from the C library, and XLA what a training call
    in JAX saves for its backward: with large arrays both take less time afterwards. The process then holds the largest
    amount of memory that it ever used. This cannot be undone.

    Returns:
        Whether the C library does so. Only glibc has these options.

    Source:
        mallopt(3): ``M_MMAP_MAX`` of 0 and ``M_TRIM_THRESHOLD`` of -1.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, value) == 1 for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))])
