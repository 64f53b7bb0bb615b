"""Which extra of this package brings an optional package, for the errors that say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    **dict.fromkeys(("rich", "threadpoolctl", "typer"), "bench"),
    **dict.fromkeys(("adjustText", "jinja2", "matplotlib"), "figures"),
    **{name: name for name in ("equinox", "flax", "jax", "keras", "onednn", "onnx", "onnxruntime", "torch")},
}
"""The extra of each package that only a part of this package imports, by the name that is imported."""
_TITLES = {"jax": "JAX", "keras": "Keras", "matplotlib": "Matplotlib", "onednn": "oneDNN", "torch": "PyTorch"}


def needs(user: str, package: str) -> str:
    """One line that says what needs a package, and how to install it. It holds for a checkout and for a wheel."""
    extra = EXTRAS.get(package)
    how = f"install fusedrnn with its extra {extra!r}" if extra else "install it"
    return f"{user} needs {_TITLES.get(package, package)}: {how}"


@contextmanager
def needed_by(user: str, package: str) -> Iterator[None]:
    """Import a package in the ``with`` block; if it is missing, the error says what needs it.

    Raises:
        ImportError: If the package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(needs(user, package)) from error
