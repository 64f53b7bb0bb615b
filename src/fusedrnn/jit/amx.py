"""The tiles of AMX: the permission to use them, which Linux gives to a process that asks for it, and instructions.

A thread has eight tiles, here each of 16 rows of 64 bytes.
"""

from __future__ import annotations

import ctypes
import sys

from llvmlite import ir

from fusedrnn.jit.builder import I64, VOID, Function
from fusedrnn.jit.target import is_x86

NUM_TILES, TILE_ROWS, ROW_BYTES = 8, 16, 64
_I8 = ir.IntType(8)
_CONFIG_BYTES = 64
_PALETTE, _ROW_BYTES_OFFSETS, _ROWS_OFFSET = 1, (16, 24), 48
"""Where in a configuration the bytes of the tiles' rows are, 16-bit numbers, and the numbers of rows, 8-bit ones."""

_ARCH_PRCTL = 158
_GET_PERMISSION, _REQUEST_PERMISSION = 0x1022, 0x1023
_TILE_DATA = 18
"""The number of the tiles among the components of a thread's state."""


def has_permission() -> bool:
    """Whether this process may use tiles."""
    permitted = ctypes.c_uint64()
    refused = _arch_prctl(_GET_PERMISSION, ctypes.byref(permitted))
    return not refused and bool(permitted.value >> _TILE_DATA & 1)


def request_permission() -> bool:
    """Ask for the permission, which is for good. Returns whether this process has it."""
    _arch_prctl(_REQUEST_PERMISSION, ctypes.c_ulong(_TILE_DATA))
    return has_permission()


def _arch_prctl(code: int, argument: object) -> int:
    """The result of the system call: 0, or not if the system refuses or has no such call."""
    if not sys.platform.startswith("linux") or not is_x86():
        return -1
    return int(ctypes.CDLL(None).syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_int(code), argument))


def configure_tiles(f: Function) -> None:
    """Give all tiles their shape, and zeros."""
    config = f.alloca(_CONFIG_BYTES)
    f.fill_zero(config, f.constant(_CONFIG_BYTES))
    f.store(_PALETTE, config)
    for offset in _ROW_BYTES_OFFSETS:
        f.store(_repeated(ROW_BYTES, 16), config + offset)
    f.store(_repeated(TILE_ROWS, 8), config + _ROWS_OFFSET)
    f.intrinsic("llvm.x86.ldtilecfg", VOID, [f.pointer(config)])
    for tile in range(NUM_TILES):
        f.intrinsic("llvm.x86.tilezero", VOID, [_I8(tile)])


def multiply_tiles(f: Function, instruction: str, sums: int, left: int, right: int) -> None:
    """Add the product of two tiles to the tile ``sums``, by the instruction of that name."""
    f.intrinsic(f"llvm.x86.{instruction}", VOID, [_I8(tile) for tile in (sums, left, right)])


def release_tiles(f: Function) -> None:
    """Put the tiles into their initial state, so that the system need not save them."""
    f.intrinsic("llvm.x86.tilerelease", VOID, [])


def _repeated(number: int, bits: int) -> int:
    """A 64-bit integer that holds the number again and again."""
    return sum(number << shift for shift in range(0, I64.width, bits))
