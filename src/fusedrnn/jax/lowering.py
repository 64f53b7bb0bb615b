"""How primitives run: on the CPU as calls of the handler, elsewhere and under transforms by operations of JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fusedrnn.jax.call_table import register
from fusedrnn.jax.calls import Job, describe

# At import, because a function that another process has exported calls the handler too.
_lower_to_handler = register()


def lower_to_handler(ctx: Any, *operands: Any, job: Job) -> Any:
    """The call of the handler for a job, in the graph that XLA compiles."""
    key, plan = describe(job)
    return _lower_to_handler(ctx, *operands, key=np.int64(key), plan=plan)


def define(
    primitive: Primitive,
    shapes: Callable[..., Any],
    batch: Callable[..., Any],
    anywhere: Callable[..., Any],
    multiple_results: bool = True,
) -> None:
    """Define a primitive.

    Args:
        primitive: The primitive.
        shapes: The shapes of its results, from its operands.
        batch: Its rule for ``vmap``.
        anywhere: The same computation in operations of JAX, for all devices.
        multiple_results: Whether it returns a list.
    """
    primitive.multiple_results = multiple_results
    primitive.def_impl(partial(_run, primitive))
    primitive.def_abstract_eval(shapes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(anywhere, multiple_results=multiple_results))


def _run(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    """The primitive outside of jit, and where jit is disabled: the kernels run in compiled functions only."""
    compiled = _compiled(primitive, tuple(params.items()))
    config: Any = jax.config  # its attributes have no types
    if not config.jax_disable_jit:
        return compiled(*operands)
    with jax.disable_jit(False):
        return compiled(*operands)


@lru_cache(maxsize=1024)
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The primitive as a compiled function."""
    compiled: Callable[..., Any] = jax.jit(lambda *operands: primitive.bind(*operands, **dict(params)))
    return compiled
