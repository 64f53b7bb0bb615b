"""fusedrnn in JAX: the operator as a function that JAX compiles, differentiates and maps, and layers that use it.

``fusedrnn.jax.nnx`` has layers for flax, ``fusedrnn.jax.eqx`` layers for Equinox. Importing such a module imports its
library; the first use of :func:`accelerate` imports flax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.extras import needed_by

with needed_by("fusedrnn.jax", "jax"):
    import jax as _jax  # noqa: F401 -- for a clear error if it is missing

from fusedrnn.jax.rnn import rnn

if TYPE_CHECKING:
    from fusedrnn.jax.conversion import accelerate, restore

__all__ = ["LayerReport", "Report", "accelerate", "restore", "rnn"]

_NEED_FLAX = ("accelerate", "restore")


def __getattr__(name: str) -> Any:
    if name not in _NEED_FLAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_by(f"fusedrnn.jax.{name}", "flax"):
        from fusedrnn.jax import conversion
    return getattr(conversion, name)
