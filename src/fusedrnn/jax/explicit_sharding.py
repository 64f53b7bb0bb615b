"""Calls whose operands have a sharding in their types, on a mesh with axes of ``AxisType.Explicit``.

Each device runs its own sequences. Operands that are sharded along other axes than the batch are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

from fusedrnn.jax.calls import Call
from fusedrnn.jax.mesh_types import are_on_mesh, vary_alike

Array = Any
MeshAxes = Any
"""The mesh axes along which an axis of an array is sharded: a name, a tuple of names, or None."""


def bind(primitive: Primitive, operands: Sequence[Array], call: Call) -> list[Array]:
    """The results of the operator's primitive for operands with any types; they are sharded along the batch alone."""
    if not are_on_mesh(operands):
        return list(primitive.bind(*operands, call=call))

    def run(*own: Array) -> list[Array]:
        return list(primitive.bind(*vary_alike(*own), call=call))

    mesh, shardings = _mesh_of(operands)
    if mesh is None:
        return run(*operands)
    if not any(isinstance(operand, jax.core.Tracer) for operand in operands):
        # Outside of jit, an operand on no mesh cannot be put on this one: its type has the names of axes alone.
        return _compiled_bind(primitive, call)(*operands)
    batch_axes = [_batch_axis(call, name) for name in call.operand_names]
    entries = [sharding.spec[axis] for sharding, axis in zip(shardings, batch_axes, strict=True) if axis is not None]
    mesh_axes = next((entry for entry in entries if entry is not None), None)
    result_specs = [_spec(3, axis, mesh_axes) for axis in (batch_axes[0], *[1] * call.num_states)]
    # Masks of dropout depend on the index in the batch.
    own_axes = None if "seed" in call.options else mesh_axes
    specs = [_spec(operand.ndim, axis, own_axes) for operand, axis in zip(operands, batch_axes, strict=True)]
    operands = [_reshard(operand, mesh, spec) for operand, spec in zip(operands, specs, strict=True)]
    if own_axes is None:
        return [_reshard(result, mesh, spec) for result, spec in zip(run(*operands), result_specs, strict=True)]
    names = {own_axes} if isinstance(own_axes, str) else set(own_axes)
    shards: list[Array] = jax.shard_map(
        run, mesh=mesh, in_specs=tuple(specs), out_specs=result_specs, axis_names=names
    )(*operands)
    return shards


@lru_cache(maxsize=1024)
def _compiled_bind(primitive: Primitive, call: Call) -> Callable[..., list[Array]]:
    compiled: Callable[..., list[Array]] = jax.jit(lambda *operands: bind(primitive, operands, call))
    return compiled


def map_rows(run: Callable[[list[Array]], Any], rows: Sequence[Array]) -> list[Array]:
    """``jax.lax.map`` over the first axis of arrays, which may be sharded along it; then the results are, too."""
    mesh, shardings = _mesh_of(rows)
    if mesh is None:
        return list(jax.lax.map(run, list(rows)))
    mesh_axes = next((sharding.spec[0] for sharding in shardings if sharding.spec[0] is not None), None)
    results = jax.lax.map(run, [_reshard(row, mesh, _spec(row.ndim, None, None)) for row in rows])
    return [_reshard(result, mesh, _spec(result.ndim, 0, mesh_axes)) for result in results]


def _mesh_of(operands: Sequence[Array]) -> tuple[Any, list[Any]]:
    """The mesh of the first operand that is sharded, or None; and the shardings of all."""
    shardings = [jax.typeof(operand).sharding for operand in operands] if hasattr(jax, "shard_map") else []
    return next((sharding.mesh for sharding in shardings if _is_sharded(sharding)), None), shardings


def _is_sharded(sharding: Any) -> bool:
    return not sharding.mesh.empty and sharding.spec != PartitionSpec(*[None] * len(sharding.spec))


def _batch_axis(call: Call, name: str) -> int | None:
    """The axis of an operand that is the batch; None if there is none."""
    if name in call.param_names or name == "seed":
        return None
    return 0 if name == "lengths" or (name == "x" and call.batch_first) else 1


def _spec(ndim: int, axis: int | None, mesh_axes: MeshAxes) -> PartitionSpec:
    return PartitionSpec(*[mesh_axes if number == axis else None for number in range(ndim)])


def _reshard(array: Array, mesh: Any, spec: PartitionSpec) -> Array:
    own = jax.typeof(array).sharding.spec
    return array if own == spec else jax.sharding.reshard(array, NamedSharding(mesh, spec))
