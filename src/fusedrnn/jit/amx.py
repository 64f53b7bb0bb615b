"""The permission to use the tiles of AMX, which Linux gives to a process that asks for it."""

from __future__ import annotations

import ctypes
import sys

from fusedrnn.jit.target import is_x86

_ARCH_PRCTL = 158
_GET_PERMISSION, _REQUEST_PERMISSION = 0x1022, 0x1023
_TILE_DATA = 18
"""The number that the tiles have among the components of a thread's state."""


def has_permission() -> bool:
    """Whether this process may use tiles."""
    permitted = ctypes.c_uint64()
    refused = _arch_prctl(_GET_PERMISSION, ctypes.byref(permitted))
    return not refused and bool(permitted.value >> _TILE_DATA & 1)


def request_permission() -> bool:
    """Ask for the permission, which lasts until the process ends. Returns whether this process has it."""
    _arch_prctl(_REQUEST_PERMISSION, ctypes.c_ulong(_TILE_DATA))
    return has_permission()


def _arch_prctl(code: int, argument: object) -> int:
    """The result of the system call; not 0 if the system refuses or has no such call."""
    if not sys.platform.startswith("linux") or not is_x86():
        return -1
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_int(code), argument))
