"""Other revisions of ourselves: the package as git has it, in a folder of its own."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_PACKAGE = "src/fusedrnn"
"""Where every revision has it."""


@dataclass(frozen=True)
class Revision:
    """A commit of a repository."""

    name: str
    """Its abbreviated hash."""
    commit: str
    repository: Path


def find(given: str, start: Path | None = None) -> Revision:
    """The revision that git knows as ``given``, in the repository around ``start``, by default around this file.

    Raises:
        ValueError: If there is none, or it has no package to run.
    """
    here = (start or Path(__file__)).resolve()
    here = here if here.is_dir() else here.parent
    try:
        repository = Path(_git(here, "rev-parse", "--show-toplevel").decode().strip())
    except (OSError, ValueError):
        raise ValueError(f"--against {given}: fusedrnn does not lie in a git repository, or git is missing") from None
    try:
        commit = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{given}^{{commit}}")
    except ValueError:
        raise ValueError(f"--against {given}: no such revision in {repository}") from None
    sha = commit.decode().strip()
    try:
        _git(repository, "cat-file", "-e", f"{sha}:{_PACKAGE}/__init__.py")
    except ValueError:
        raise ValueError(f"--against {given}: that revision has no {_PACKAGE}") from None
    return Revision(_git(repository, "rev-parse", "--short", sha).decode().strip(), sha, repository)


@contextmanager
def exported(revision: Revision) -> Iterator[Path]:
    """A temporary folder with the package, to be found by PYTHONPATH."""
    with TemporaryDirectory(prefix="fusedrnn-revision-", ignore_cleanup_errors=True) as folder:
        packed = _git(revision.repository, "archive", "--format=tar", revision.commit, _PACKAGE)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(folder, filter="data")
            else:
                archive.extractall(folder)
        yield Path(folder, _PACKAGE).parent


def _git(folder: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.decode("utf-8", "replace").strip())
    return done.stdout
