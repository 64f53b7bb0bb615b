"""What has another name in the oldest release of JAX that the extra allows."""

import jax

try:
    enable_x64 = jax.enable_x64
except AttributeError:
    from jax.experimental import enable_x64

__all__ = ["enable_x64"]
