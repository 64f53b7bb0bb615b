"""A hash of the code that emits a kernel, and of nothing else: part of the name of the kernel's object file.

It covers the module that emits the kernel and all modules of this package that it imports, directly or not. They are
read through the import system, not the file system: the package may lie in a zip archive, consist of bytecode alone or
be part of a frozen application. If a module cannot be read, there is no hash, and no kernel is kept on disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import BYTECODE_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.util import find_spec
from types import CodeType
from typing import NamedTuple

_PACKAGE = "fusedrnn"
_BUILDER = "fusedrnn.jit.builder"
_COMPILER = "fusedrnn.jit.compiler"
# Modules of emitters import these to load the code for the target in force. The target is itself a part of the file's
# name, and neither module changes what is emitted for a target.
_NOT_COVERED = {"fusedrnn.jit.loader", "fusedrnn.jit.host"}
_SOURCE, _READABLE = tuple(SOURCE_SUFFIXES), tuple(SOURCE_SUFFIXES + BYTECODE_SUFFIXES)
_IMPORT = re.compile(rb"^[ \t]*(?:from|import) (fusedrnn[\w.]*)(?: import (\([^)]*\)|[^\n]*))?", re.MULTILINE)
_IMPORTED_AT = time.time()


@lru_cache(maxsize=64)
def digest(emitter: str) -> bytes | None:
    """SHA-256 of the module ``emitter``, all that it imports and the compiler; None if one of them cannot be read.

    Also None if one of the files has changed since this process imported it: the code that runs is then not the code in
    the file.
    """
    total = hashlib.sha256()
    try:
        for name in sorted(covered_modules(emitter)):
            content = _module(name).content
            total.update(f"{name} {len(content)}\0".encode() + content)
    except Exception:  # import systems may raise anything; all that is lost is the cache
        return None
    return total.digest()


def covered_modules(emitter: str) -> set[str]:
    """The modules of this package that may change the machine code of a kernel that the module ``emitter`` emits.

    Raises:
        LookupError: If one of them cannot be read, or if ``emitter`` cannot emit code: then it is the wrong module.
    """
    names = _imported_by(emitter)
    if _BUILDER not in names:
        raise LookupError(f"{emitter} does not import {_BUILDER}")
    return names | _imported_by(_COMPILER)


def _imported_by(module: str) -> set[str]:
    """A module and all modules of this package that it imports, directly or not."""
    names: set[str] = set()
    pending = {module}
    while pending:
        names.add(name := pending.pop())
        pending |= _module(name).imports - names - _NOT_COVERED
    return names


class _Module(NamedTuple):
    """The content of a module, and the modules of this package that it imports, also inside functions."""

    content: bytes
    imports: frozenset[str]


@lru_cache(maxsize=256)
def _module(name: str) -> _Module:
    """Read a module; a LookupError says that it cannot be read, or has changed since this process imported it."""
    spec = find_spec(name)
    if spec is None or _changed_since_import(spec):
        raise LookupError(f"{name} is not there, or has changed since it was imported")
    content = _file(spec)
    if content is not None and str(spec.origin).endswith(_SOURCE):
        imports = _source_imports(content)
    else:
        code = _code(name, spec)
        imports = _bytecode_imports(code)
        if content is None:
            content = "\n".join(_description(code)).encode("utf-8", "surrogatepass")
    return _Module(content, frozenset(module for pair in imports for module in _modules(*pair)))


def _source_imports(source: bytes) -> Iterator[tuple[str, set[str]]]:
    """Modules and packages that source code imports from, and the names that it imports from each."""
    for module, names in _IMPORT.findall(source):
        yield module.decode(), set(re.findall(r"\w+", names.decode()))


def _bytecode_imports(code: CodeType) -> Iterator[tuple[str, set[str]]]:
    """The same for bytecode, where ``from a.b import c`` is the name ``a.b`` and a constant ``("c",)``."""
    constants = {name for names in code.co_consts if isinstance(names, tuple) for name in names}
    for module in code.co_names:
        if module == _PACKAGE or module.startswith(f"{_PACKAGE}."):
            yield module, constants.intersection(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode_imports(constant)


def _modules(module: str, names: set[str]) -> Iterator[str]:
    """The modules that an import names. A package itself is left out: its code defines nothing that emitters use."""
    spec = find_spec(module)
    if spec is None or spec.submodule_search_locations is None:
        yield module
    else:
        yield from (f"{module}.{name}" for name in names if find_spec(f"{module}.{name}"))


def _changed_since_import(spec: ModuleSpec) -> bool:
    """Whether the module's file, or the archive it lies in, was replaced after this process imported it."""
    path = spec.origin if spec.has_location else None
    while path:
        try:
            status = os.stat(path)
        except OSError:  # inside an archive, or no file at all
            path = os.path.dirname(path).rstrip(os.sep)
            continue
        # Tools can set the time of modification to any value, but not ctime. On Windows, ctime is the time of creation.
        changed = status.st_mtime if os.name == "nt" else status.st_ctime
        return changed > _IMPORTED_AT and stat.S_ISREG(status.st_mode)
    return False


def _file(spec: ModuleSpec) -> bytes | None:
    """The module's file, source or bytecode; None if it has none."""
    read = getattr(spec.loader, "get_data", None)
    if read and spec.origin and spec.origin.endswith(_READABLE):
        try:
            return bytes(read(spec.origin))
        except OSError:  # a frozen application names a file that is not there
            pass
    return None


def _code(name: str, spec: ModuleSpec) -> CodeType:
    """The module's code object; a LookupError says that the loader has none, as for machine code."""
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(name) if get_code else None
    if not isinstance(code, CodeType):
        raise LookupError(f"{name} can be read neither as source nor as bytecode")
    return code


def _description(code: CodeType) -> Iterator[str]:
    """Everything that decides what a code object does. The bytes of ``marshal`` differ between processes."""
    yield repr((code.co_code, getattr(code, "co_exceptiontable", b""), code.co_flags))
    yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount))
    yield repr((code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _description(constant)
        elif isinstance(constant, frozenset):  # its order depends on the process's hash seed
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)
