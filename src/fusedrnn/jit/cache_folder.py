"""A folder that only this user can write to. What is read from it is run as machine code.

The rule is the one that OpenSSH's StrictModes has for a user's keys. The folder and its files belong to the user of
this process, every folder and symbolic link on the way to that user or to root. Neither the group nor others may write
to any of them, but for sticky folders on the way, such as /tmp, whose entries only their owners can replace. Files are
opened relative to the open folder, without following links, and what was opened is checked. Windows has no such
permissions in the functions that Python offers: there nothing is checked.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from operator import or_
from pathlib import Path
from types import TracebackType

_POSIX = hasattr(os, "geteuid")
_ROOT = 0
_MOST_LINKS = 40


def _flags(*names: str) -> int:
    """Those of the flags for ``os.open`` that this system has."""
    return reduce(or_, (getattr(os, name, 0) for name in names))


# A FIFO must not block the call that opens it, and a child process has no use for the file.
_GUARDS = "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"
_FOLDER_FLAGS = _flags("O_RDONLY", "O_DIRECTORY", *_GUARDS)
_READ_FLAGS = _flags("O_RDONLY", *_GUARDS)
_WRITE_FLAGS = _flags("O_WRONLY", "O_CREAT", "O_EXCL", *_GUARDS)


class UntrustedError(Exception):
    """Another user can decide what a file or folder holds; the message says which, and why."""


def objection(path: Path, status: os.stat_result, user: int, on_the_way: bool) -> str:
    """Why a file or folder may hold what another user wrote; empty if it cannot.

    Args:
        path: For the message.
        status: Of the file, folder or symbolic link itself.
        user: The user who trusts it.
        on_the_way: It is a folder or link that leads to the one that is trusted: root's will do, and sticky folders.
    """
    owners = (user, _ROOT) if on_the_way else (user,)
    if status.st_uid not in owners:
        return f"{path} is owned by user {status.st_uid}, and this process runs as user {user}"
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ""
    if on_the_way and status.st_mode & stat.S_ISVTX:
        return ""
    writers = "every user" if status.st_mode & stat.S_IWOTH else "its group"
    return f"{path} can be written by {writers}"


class Folder:
    """An open folder of this user's own.

    Args:
        path: Where it is.
        make: Whether to make it, and what is missing on the way, for this user alone.

    Raises:
        UntrustedError: If another user can decide what it holds.
        OSError: If it is not there, or cannot be made or opened.
    """

    def __init__(self, path: Path, make: bool = False) -> None:
        self._handle: int | None = None
        self._path = path.absolute()
        if not _POSIX:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            os.lstat(path)
            return
        user = os.geteuid()
        self._path = _resolved(self._path, user, make)
        self._handle = os.open(self._path, _FOLDER_FLAGS)
        try:
            _require(self._path, os.fstat(self._handle), user, on_the_way=False)
        except UntrustedError:
            os.close(self._handle)
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, name: str, most: int) -> bytes | None:
        """The content of a regular file of at most so many bytes; None if there is none.

        Raises:
            UntrustedError: If another user can have written it.
        """
        try:
            handle = os.open(self._at(name), _READ_FLAGS, dir_fd=self._handle)
        except OSError:
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            reason = objection(self._path / name, status, os.geteuid(), on_the_way=False) if _POSIX else ""
            if reason:
                raise UntrustedError(reason)
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(most)
        except OSError:
            return None
        finally:
            os.close(handle)

    def write(self, name: str, temporary: str, content: bytes) -> None:
        """Write a file under a temporary name, then rename it: others read all of it or the one before.

        Raises:
            OSError: If it cannot be written; nothing is left then.
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
        """The regular files that belong to this user, by name."""
        with os.scandir(self._path if self._handle is None else self._handle) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed by another process
                    continue
                if stat.S_ISREG(status.st_mode) and (not _POSIX or status.st_uid == os.geteuid()):
                    yield entry.name, status

    def remove(self, name: str) -> None:
        """Remove a file, if it is still there."""
        try:
            os.unlink(self._at(name), dir_fd=self._handle)
        except FileNotFoundError:
            return

    def _at(self, name: str) -> str:
        """What names a file to the functions of ``os``: relative to the open folder if there are such functions."""
        return str(self._path / name) if self._handle is None else name


def _resolved(path: Path, user: int, make: bool) -> Path:
    """The same folder by a path without links, on which nobody but this user or root can change anything.

    Raises:
        UntrustedError: If there is no such path.
        OSError: If the folder is not there, or cannot be made.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        if not make:
            raise
    place, links = Path(path.anchor), 0
    left = list(reversed(path.parts[1:]))
    _require(place, os.lstat(place), user, on_the_way=True)
    while left:
        part = left.pop()
        if part == "..":
            place = place.parent
            continue
        entry = place / part
        status = _status(entry, make)
        is_link = stat.S_ISLNK(status.st_mode)
        if not is_link and not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(entry))
        _require(entry, status, user, on_the_way=is_link or bool(left))
        if not is_link:
            place = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(entry))
        if target.is_absolute():
            place = Path(target.anchor)
        left += reversed(target.relative_to(target.anchor).parts)
    return place


def _status(entry: Path, make: bool) -> os.stat_result:
    """Of the entry itself, which is made if it is missing and that is asked for."""
    try:
        return os.lstat(entry)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process was faster: its folder is looked at like any
        os.mkdir(entry, 0o700)
    return os.lstat(entry)


def _require(path: Path, status: os.stat_result, user: int, on_the_way: bool) -> None:
    """Raise UntrustedError if there is an objection, with the command that removes it if there is one."""
    reason = objection(path, status, user, on_the_way)
    if not reason:
        return
    is_mine = status.st_uid == user
    raise UntrustedError(
        f"{reason}; if you trust what it holds, run: chmod go-w {shlex.quote(str(path))}" if is_mine else reason
    )
