"""fusedrnn in JAX: the operator as a function that JAX compiles, differentiates and maps."""

from __future__ import annotations

from fusedrnn.jax.rnn import rnn

__all__ = ["rnn"]
