"""A digest of the code that emits code, however the package is installed: part of the name of every compiled kernel.

The import system is asked for it, not the file system: the package may lie in a zip archive, consist of bytecode alone
or be part of a frozen application. Where what runs cannot be read there is no digest, and no kernel is kept on disk.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import stat
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import BYTECODE_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.util import find_spec
from types import CodeType

PACKAGES = (
    "fusedrnn",
    "fusedrnn.cell",
    "fusedrnn.engines",
    "fusedrnn.engines.cpu",
    "fusedrnn.engines.cpu.kernels",
    "fusedrnn.engines.cpu.launch",
    "fusedrnn.engines.cpu.plan",
    "fusedrnn.engines.cpu.weights",
    "fusedrnn.jit",
    "fusedrnn.runtime",
)
"""Any module in these may change the emitted code; not those of packages further down."""

_READABLE = tuple(SOURCE_SUFFIXES + BYTECODE_SUFFIXES)
_IMPORTED_AT = time.time()


@lru_cache(maxsize=1)
def digest() -> bytes | None:
    """SHA-256 over every module that may change the emitted code; None if one of them cannot be read.

    None as well if a file is newer than this process's import of it: what runs is then not what the file holds.
    """
    total = hashlib.sha256()
    try:
        for name in _modules():
            spec = find_spec(name)
            if spec is None or _changed_since_import(spec):
                return None
            content = _content(name, spec)
            total.update(f"{name} {len(content)}\0".encode() + content)
    except Exception:  # a loader that is not Python's own may raise anything; nothing is lost but the disk
        return None
    return total.digest()


def _modules() -> list[str]:
    """The modules of the packages by name, sorted.

    Raises:
        LookupError: If the import system does not list them all.
    """
    names = set(PACKAGES)
    for package in PACKAGES:
        listed = {f"{package}.{module.name}": module.ispkg for module in pkgutil.iter_modules(_search_path(package))}
        loaded = {name for name in sys.modules if name.rpartition(".")[0] == package}
        if not listed or not loaded <= listed.keys():
            raise LookupError(f"the loader of {package} does not list its modules")
        names.update(name for name, is_package in listed.items() if not is_package)
    return sorted(names)


def _search_path(package: str) -> list[str]:
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


def _changed_since_import(spec: ModuleSpec) -> bool:
    """Whether the module's file, or the archive that it lies in, was replaced after this process imported it."""
    path = spec.origin if spec.has_location else None
    while path:
        try:
            status = os.stat(path)
        except OSError:  # inside an archive, or no file at all
            path = os.path.dirname(path).rstrip(os.sep)
            continue
        # Not the time of modification, which tools set to what they like; on Windows the other is that of creation.
        changed = status.st_mtime if os.name == "nt" else status.st_ctime
        return changed > _IMPORTED_AT and stat.S_ISREG(status.st_mode)
    return False


def _content(name: str, spec: ModuleSpec) -> bytes:
    """The module's file, of source or bytecode; without one the code object that its loader has.

    Raises:
        LookupError: If the loader has neither, as for machine code.
    """
    read, get_code = (getattr(spec.loader, method, None) for method in ("get_data", "get_code"))
    if read and spec.origin and spec.origin.endswith(_READABLE):
        try:
            return bytes(read(spec.origin))
        except OSError:  # a frozen application names a file that is not there
            pass
    code = get_code(name) if get_code else None
    if not isinstance(code, CodeType):
        raise LookupError(f"{name} can be read neither as source nor as bytecode")
    return "\n".join(_described(code)).encode("utf-8", "surrogatepass")


def _described(code: CodeType) -> Iterator[str]:
    """Everything that decides what a code object does. ``marshal`` will not do: its bytes differ between processes."""
    yield repr((code.co_code, getattr(code, "co_exceptiontable", b""), code.co_flags))
    yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount))
    yield repr((code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _described(constant)
        elif isinstance(constant, frozenset):  # in an order that depends on the process's hash seed
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)
