"""Object files on disk: what one process compiles, later ones load. Measured rates of the machine are kept there too.

A file is named by a hash of all that its content depends on. It begins with a hash of its name and its content: a file
that is damaged, half written or a copy of another file is compiled again. Files are written under a temporary name and
then renamed, so that processes may write at the same time. Only a folder that no other user can write to is used, see
:mod:`fusedrnn.jit.cache_folder`; without one, kernels stay in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedrnn import env
from fusedrnn.jit import compiler, sources
from fusedrnn.jit.builder import Module
from fusedrnn.jit.cache_folder import Folder, UntrustedError, current_user
from fusedrnn.jit.target import Target

_FORMAT = b"fusedrnn object file 2\n"
# Names of our files, finished or being written. Anything else in the folder is left alone.
_OBJECT = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\.(o|rates)")
_TEMPORARY = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\w*(\.\w+)?\.tmp")
_MAX_FILE_BYTES = 64 << 20
# Writing a file takes milliseconds: a temporary file of this age, in seconds, was left by a process that was killed.
_STALE_SECONDS = 3600.0


def fetch(name: str, target: Target, build: Callable[..., Module], *arguments: Any) -> bytes:
    """The object file of that name and target: from the disk, or compiled from ``build(*arguments)`` and written."""
    path, debug = env.cache_directory(), env.debug()
    key = _key(name, target, build.__module__) if path else None
    if path is None or key is None:
        return compiler.compile_module(build(*arguments), target, debug)
    cache, file = ObjectCache(path), f"{name}-{target.name}-{key}.o"
    image = cache.read(file) if debug < 3 else None
    if image is None:
        image = compiler.compile_module(build(*arguments), target, debug)
        cache.write(file, image)
    return image


def _key(name: str, target: Target, emitter: str) -> str | None:
    """A hash of all that the code depends on; None if that cannot be read."""
    code = sources.digest(emitter)
    if code is None:
        return None
    return hashlib.sha256(code + f"{name} {target} {compiler.version()}".encode()).hexdigest()[:32]


def _header(file: str, image: bytes) -> bytes:
    """The beginning of a file. It is valid for this content under this name only."""
    return _FORMAT + hashlib.sha256(file.encode() + b"\0" + image).digest()


@dataclass(frozen=True)
class ObjectCache:
    """The object files in a folder."""

    path: Path
    user: int | None = field(default_factory=current_user)  # who must own folder and files; None checks nothing
    # The oldest files above these limits are removed. A file has 10 to 30 KB: there is room for dozens of cells in
    # every dtype on every target.
    max_files: int = 1024
    max_bytes: int = 256 << 20

    def read(self, file: str) -> bytes | None:
        """The content of an object file; None if it is missing, damaged or not to be trusted."""
        content = b""
        try:
            with Folder(self.path, self.user) as folder:
                try:
                    content = folder.read(file, _MAX_FILE_BYTES) or b""
                except UntrustedError as error:
                    env.warn_once(str(self.path), f"fusedrnn compiles a kernel again that it does not load: {error}.")
        except UntrustedError as error:
            self._warn(error)
        except OSError:
            pass
        size = len(_header(file, b""))
        header, image = content[:size], content[size:]
        return image if image and header == _header(file, image) else None

    def write(self, file: str, image: bytes) -> None:
        """Write an object file, if the folder can be written and trusted, and remove files above the limits."""
        temporary = f"{file.rpartition('.')[0]}.{os.urandom(8).hex()}.tmp"
        try:
            with Folder(self.path, self.user, make=True) as folder:
                folder.write(file, temporary, _header(file, image) + image)
                self._prune(folder, file)
        except UntrustedError as error:
            self._warn(error)
        except OSError as error:
            # The code in memory is good. The only loss is that later processes compile it again.
            env.warn_once(
                str(self.path),
                f"fusedrnn keeps compiled kernels in memory, and every process compiles them again: {self.path} cannot "
                f"be written: {error.strerror or error}. To use another folder, set FUSEDRNN_CACHE_DIR to it; to use "
                "none, set it to an empty string.",
            )

    def rejection(self) -> str:
        """Why no files can be kept in the folder; empty if they can. A missing folder is made."""
        probe = f"probe-folder-{os.urandom(16).hex()}"
        try:
            with Folder(self.path, self.user, make=True) as folder:
                folder.write(f"{probe}.tmp", f"{probe}.new.tmp", b"")
                folder.remove(f"{probe}.tmp")
        except UntrustedError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _warn(self, error: UntrustedError) -> None:
        env.warn_once(
            str(self.path),
            f"fusedrnn keeps compiled kernels in memory and loads none from {self.path}, where another user could have "
            f"placed code: {error}. To use another folder, set FUSEDRNN_CACHE_DIR to it; to use none, set it to an "
            "empty string.",
        )

    def _prune(self, folder: Folder, written: str) -> None:
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
            if num_files > self.max_files or num_bytes > self.max_bytes:
                folder.remove(name)
