"""A shared object with one function, which jumps to an address of this process.

ONNX Runtime takes custom operators from a shared object, in which it calls a function by name. This module writes such
a file in the ELF format of Linux, without a compiler or linker. The file exists only in memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from typing import NamedTuple

_ET_DYN, _PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 3, 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT = 0, 4, 5, 6, 10, 11
_GLOBAL_FUNCTION = 1 << 4 | 2
_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES = 64, 56, 24
# Segments of different permissions must not share a page. No page is larger than this.
_MAX_PAGE = 1 << 16


class _Processor(NamedTuple):
    """ELF's number of an architecture, and code that jumps to the address stored after it."""

    machine: int
    jump: bytes


_X86_64 = _Processor(62, bytes.fromhex("f30f1efa ff2500000000"))  # endbr64; jmp [rip]
_AARCH64 = _Processor(183, bytes.fromhex("50000058 00021fd6"))  # ldr x16, .+8; br x16
_PROCESSORS = {"x86_64": _X86_64, "amd64": _X86_64, "aarch64": _AARCH64}


def is_supported() -> bool:
    """Whether this system loads such files."""
    return sys.platform == "linux" and platform.machine().lower() in _PROCESSORS and sys.maxsize > 1 << 32


def load_shared_object(name: str, address: int) -> str:
    """Load a shared object whose function ``name`` is the function at an address; return its path.

    The object stays loaded, and the path valid, until the process ends: for a path from which it has loaded an object,
    the dynamic linker returns that object without reading the file again.
    """
    descriptor = os.memfd_create(f"{name}.so")
    os.write(descriptor, _image(_PROCESSORS[platform.machine().lower()], name.encode(), address))
    path = f"/proc/self/fd/{descriptor}"
    _loaded.append(ctypes.CDLL(path))
    return path


_loaded: list[ctypes.CDLL] = []


def _image(processor: _Processor, name: bytes, address: int) -> bytes:
    """The file: headers, symbols and code in a read-only segment, the dynamic section in a writable segment."""
    strings = b"\0" + name + b"\0"
    symbols_at = _HEADER_BYTES + 4 * _SEGMENT_BYTES
    hash_at = symbols_at + 2 * _SYMBOL_BYTES
    # A hash table of one bucket: the numbers of buckets and of symbols, the first symbol, and the links between
    # symbols.
    hash_table = struct.pack("<5I", 1, 2, 1, 0, 0)
    strings_at = hash_at + len(hash_table)
    code_at = _round_up(strings_at + len(strings), 16)
    code = processor.jump + struct.pack("<Q", address)
    dynamic_at = _round_up(code_at + len(code), 16)
    entries = (
        (_DT_HASH, hash_at), (_DT_SYMTAB, symbols_at), (_DT_STRTAB, strings_at), (_DT_STRSZ, len(strings)),
        (_DT_SYMENT, _SYMBOL_BYTES), (_DT_NULL, 0),
    )  # fmt: skip
    dynamic = b"".join(struct.pack("<2q", *entry) for entry in entries)
    writable = dynamic_at, _MAX_PAGE + dynamic_at, len(dynamic)
    segments = (
        _segment(_PT_LOAD, _READ | _EXECUTE, 0, 0, code_at + len(code), _MAX_PAGE),
        _segment(_PT_LOAD, _READ | _WRITE, *writable, _MAX_PAGE),
        _segment(_PT_DYNAMIC, _READ | _WRITE, *writable, 8),
        _segment(_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 16),  # without it the stack would become executable
    )
    symbols = bytes(_SYMBOL_BYTES) + struct.pack("<IBBHQQ", 1, _GLOBAL_FUNCTION, 0, 1, code_at, len(code))
    parts = {
        0: _header(processor.machine, len(segments)), _HEADER_BYTES: b"".join(segments), symbols_at: symbols,
        hash_at: hash_table, strings_at: strings, code_at: code, dynamic_at: dynamic,
    }  # fmt: skip
    image = bytearray(dynamic_at + len(dynamic))
    for offset, part in parts.items():
        image[offset : offset + len(part)] = part
    return bytes(image)


def _header(machine: int, num_segments: int) -> bytes:
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    sizes = _HEADER_BYTES, _SEGMENT_BYTES, num_segments, 0, 0, 0
    return struct.pack("<16s2HI3QI6H", identity, _ET_DYN, machine, 1, 0, _HEADER_BYTES, 0, 0, *sizes)


def _segment(kind: int, permissions: int, offset: int, address: int, size: int, alignment: int) -> bytes:
    return struct.pack("<2I6Q", kind, permissions, offset, address, address, size, size, alignment)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
