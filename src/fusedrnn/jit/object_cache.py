"""Object files on disk: what one process compiles, later ones load.

A file is named by a hash of all that its code depends on. It begins with a hash of its name and its content: a file
that is damaged, half written or another one's copy is compiled again. Files are written under a temporary name and then
renamed, so that processes may write at the same time. Only a folder that no other user can write to is used, see
:mod:`fusedrnn.jit.cache_folder`; without one, kernels stay in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedrnn import env
from fusedrnn.jit import compiler, sources
from fusedrnn.jit.builder import Module
from fusedrnn.jit.cache_folder import Folder, UntrustedError
from fusedrnn.jit.target import Target

_FORMAT = b"fusedrnn object file 2\n"
_DIGEST_SIZE = hashlib.sha256().digest_size
# Names of our files, finished or being written. Anything else in the folder is left alone.
_OBJECT = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\.o")
_TEMPORARY = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\w*(\.\w+)?\.tmp")
# Room for dozens of cells in every dtype on every target, of 10 to 30 KB each. The oldest files are removed first.
_MAX_FILES = 1024
_MAX_BYTES = 256 << 20
_MAX_FILE_BYTES = 64 << 20
# Writing a file takes milliseconds: a temporary file of this age, in seconds, is that of a process that was killed.
_STALE_SECONDS = 3600.0


def fetch(name: str, target: Target, build: Callable[..., Module], *arguments: Any) -> bytes:
    """The object file of that name and target: from the disk, or compiled from ``build(*arguments)`` and kept there."""
    path, debug = env.cache_directory(), env.debug()
    key = _key(name, target, build.__module__) if path else None
    if path is None or key is None:
        return compiler.compile_module(build(*arguments), target, debug)
    file = f"{name}-{target.name}-{key}.o"
    image = _read(path, file) if debug < 3 else None
    if image is None:
        image = compiler.compile_module(build(*arguments), target, debug)
        _write(path, file, image)
    return image


def _key(name: str, target: Target, emitter: str) -> str | None:
    """A hash of all that the code depends on; None if that cannot be read."""
    code = sources.digest(emitter)
    if code is None:
        return None
    return hashlib.sha256(code + f"{name} {target} {compiler.version()}".encode()).hexdigest()[:32]


def _header(file: str, image: bytes) -> bytes:
    """The beginning of a file: it fits this content under this name only."""
    return _FORMAT + hashlib.sha256(file.encode() + b"\0" + image).digest()


def _read(path: Path, file: str) -> bytes | None:
    content = None
    try:
        with Folder(path) as folder:
            try:
                content = folder.read(file, _MAX_FILE_BYTES)
            except UntrustedError as error:
                env.warn_once(str(path), f"fusedrnn compiles a kernel again that it does not load: {error}.")
    except UntrustedError as error:
        _warn_memory_only(path, error)
    except OSError:
        return None
    if content is None:
        return None
    size = len(_FORMAT) + _DIGEST_SIZE
    header, image = content[:size], content[size:]
    return image if image and header == _header(file, image) else None


def _write(path: Path, file: str, image: bytes) -> None:
    temporary = f"{file.removesuffix('.o')}.{os.urandom(8).hex()}.tmp"
    try:
        with Folder(path, make=True) as folder:
            folder.write(file, temporary, _header(file, image) + image)
            _prune(folder, file)
    except UntrustedError as error:
        _warn_memory_only(path, error)
    except OSError:
        # The code in memory is good: later processes compile it again, no more.
        return


def _warn_memory_only(path: Path, error: UntrustedError) -> None:
    env.warn_once(
        str(path),
        f"fusedrnn keeps compiled kernels in memory and loads none from {path}, where another user could have placed "
        f"code: {error}. For another folder set FUSEDRNN_CACHE_DIR, for none to an empty string.",
    )


def _prune(folder: Folder, written: str) -> None:
    """Remove stale temporary files and the oldest object files above the limits, but not the one just written."""
    objects, now = [], time.time()
    for name, status in folder.files():
        if _TEMPORARY.fullmatch(name):
            if now - status.st_mtime > _STALE_SECONDS:
                folder.remove(name)
        elif _OBJECT.fullmatch(name) and name != written:
            objects.append((status.st_mtime, status.st_size, name))
    num_files, num_bytes = 1, 0
    for _, file_bytes, name in sorted(objects, reverse=True):
        num_files, num_bytes = num_files + 1, num_bytes + file_bytes
        if num_files > _MAX_FILES or num_bytes > _MAX_BYTES:
            folder.remove(name)
