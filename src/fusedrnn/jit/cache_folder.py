"""A folder that only this user can write to: its files are run as machine code.

The rule is that of OpenSSH's StrictModes for a user's keys. The folder and its files belong to this process's user.
Every folder and symbolic link on the path to it belongs to that user or to root. Neither the group nor others may write
to any of them, except to sticky folders on the path, such as /tmp, whose entries only their owners can replace. Files
are opened relative to the open folder, without following links, and the open file is checked. On Windows nothing is
checked, because Python's functions do not show permissions there.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = 0
_MAX_LINKS = 40


def _flags(*names: str) -> int:
    """Flags for ``os.open``; those that this system lacks are left out."""
    return sum(getattr(os, name, 0) for name in names)


# O_NONBLOCK: opening a FIFO must not block.
_SAFE = "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"
_FOLDER_FLAGS = _flags("O_RDONLY", "O_DIRECTORY", *_SAFE)
_READ_FLAGS = _flags("O_RDONLY", *_SAFE)
_WRITE_FLAGS = _flags("O_WRONLY", "O_CREAT", "O_EXCL", *_SAFE)


def current_user() -> int | None:
    """The user whose rights this process has; None on a system that does not show owners."""
    return os.geteuid() if hasattr(os, "geteuid") else None


class UntrustedError(Exception):
    """Another user can decide the content of a file or folder; the message says which, and why."""


def objection(path: Path, status: os.stat_result, user: int, is_parent: bool) -> str:
    """Why another user can have written the content of a file or folder; empty if none can.

    Args:
        path: For the message.
        status: Of the file, folder or symbolic link itself.
        user: The user who trusts it.
        is_parent: Whether it is a folder or link on the path to the trusted folder. It may then be root's, or sticky.
    """
    owners = (user, _ROOT) if is_parent else (user,)
    if status.st_uid not in owners:
        return f"{path} is owned by user {status.st_uid}, and this process runs as user {user}"
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ""
    if is_parent and status.st_mode & stat.S_ISVTX:
        return ""
    writers = "every user" if status.st_mode & stat.S_IWOTH else "its group"
    return f"{path} can be written by {writers}"


class Folder:
    """An open folder that belongs to a user.

    Args:
        path: Its path.
        user: The user; None checks nothing.
        make: Whether to make it, and missing folders on the path, for the user alone.

    Raises:
        UntrustedError: If another user can decide its content.
        OSError: If it is not there, or cannot be made or opened.
    """

    def __init__(self, path: Path, user: int | None, make: bool = False) -> None:
        self._user, self._handle = user, None
        self._path = path.absolute()
        if user is None:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            os.lstat(path)
            return
        self._path = _resolved(self._path, user, make)
        self._handle = os.open(self._path, _FOLDER_FLAGS)
        try:
            _require(self._path, os.fstat(self._handle), user, is_parent=False)
        except UntrustedError:
            os.close(self._handle)
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a regular file; None if there is none, or a larger one.

        Raises:
            UntrustedError: If another user can have written it.
        """
        try:
            handle = os.open(self._at(name), _READ_FLAGS, dir_fd=self._handle)
        except OSError:
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
                return None
            if self._user is not None and (reason := objection(self._path / name, status, self._user, False)):
                raise UntrustedError(reason)
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(status.st_size)  # a larger number would be allocated
        except OSError:
            return None
        finally:
            os.close(handle)

    def write(self, name: str, temporary: str, content: bytes) -> None:
        """Write a file under a temporary name, then rename it: other processes read all of it, or the previous file.

        Raises:
            OSError: If it cannot be written; then nothing is left behind.
        """
        handle = os.open(self._at(temporary), _WRITE_FLAGS, 0o600, dir_fd=self._handle)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(self._at(temporary), self._at(name), src_dir_fd=self._handle, dst_dir_fd=self._handle)
        except BaseException:
            self.remove(temporary)
            raise

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """The names of the regular files that belong to the user, and their status."""
        with os.scandir(self._path if self._handle is None else self._handle) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed by another process
                    continue
                if stat.S_ISREG(status.st_mode) and self._user in (None, status.st_uid):
                    yield entry.name, status

    def remove(self, name: str) -> None:
        """Remove a file, if it is still there."""
        with suppress(FileNotFoundError):
            os.unlink(self._at(name), dir_fd=self._handle)

    def _at(self, name: str) -> str:
        """A path for the functions of ``os``: relative to the open folder where they take one."""
        return str(self._path / name) if self._handle is None else name


def _resolved(path: Path, user: int, make: bool) -> Path:
    """The folder's path without symbolic links; UntrustedError if anyone but ``user`` and root can change the path."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        if not make:
            raise
    resolved, links = Path(path.anchor), 0
    remaining = list(reversed(path.parts[1:]))
    _require(resolved, os.lstat(resolved), user, is_parent=True)
    while remaining:
        name = remaining.pop()
        if name == "..":
            resolved = resolved.parent
            continue
        entry = resolved / name
        status = _status(entry, make)
        is_link = stat.S_ISLNK(status.st_mode)
        if not is_link and not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(entry))
        _require(entry, status, user, is_parent=is_link or bool(remaining))
        if not is_link:
            resolved = entry
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(entry))
        if target.is_absolute():
            resolved = Path(target.anchor)
        remaining += reversed(target.relative_to(target.anchor).parts)
    return resolved


def _status(entry: Path, make: bool) -> os.stat_result:
    """The status of a folder or link itself. With ``make`` a missing folder is made."""
    try:
        return os.lstat(entry)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process has made it meanwhile: the folder is checked like any other
        os.mkdir(entry, 0o700)
    return os.lstat(entry)


def _require(path: Path, status: os.stat_result, user: int, is_parent: bool) -> None:
    """Raise UntrustedError if there is an objection. The message gives the command to resolve it, if there is one."""
    reason = objection(path, status, user, is_parent)
    if reason and status.st_uid == user:
        reason += f"; if you trust its content, run: chmod go-w {shlex.quote(str(path))}"
    if reason:
        raise UntrustedError(reason)
