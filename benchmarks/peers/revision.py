"""Earlier revisions of fusedrnn, each checked out into a temporary git worktree."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_SOURCES = "src"
_PACKAGE = f"{_SOURCES}/fusedrnn"


@dataclass(frozen=True)
class Revision:
    """A commit of a repository."""

    name: str
    """Its abbreviated hash."""
    commit: str
    repository: Path


def find(name: str, folder: Path | None = None) -> Revision:
    """The revision that git knows as ``name``, in the repository of ``folder``, by default of this file.

    Raises:
        ValueError: If there is no such revision, or it does not contain the package.
    """
    folder = (folder or Path(__file__).parent).resolve()
    try:
        repository = Path(_git(folder, "rev-parse", "--show-toplevel"))
    except (OSError, ValueError):
        raise ValueError(f"--against {name}: {folder} is not in a git repository, or git is missing") from None
    try:
        commit = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except ValueError:
        raise ValueError(f"--against {name}: no such revision in {repository}") from None
    try:
        _git(repository, "cat-file", "-e", f"{commit}:{_PACKAGE}/__init__.py")
    except ValueError:
        raise ValueError(f"--against {name}: that revision has no {_PACKAGE}") from None
    return Revision(_git(repository, "rev-parse", "--short", commit), commit, repository)


@contextmanager
def checked_out(revision: Revision) -> Iterator[Path]:
    """A temporary worktree of the revision. Yields the folder to put on PYTHONPATH."""
    with TemporaryDirectory(prefix="fusedrnn-revision-", ignore_cleanup_errors=True) as folder:
        worktree = Path(folder, "worktree")
        _git(revision.repository, "worktree", "add", "--quiet", "--detach", str(worktree), revision.commit)
        try:
            yield worktree / _SOURCES
        finally:
            _git(revision.repository, "worktree", "remove", "--force", str(worktree))


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.decode("utf-8", "replace").strip())
    return done.stdout.decode().strip()
