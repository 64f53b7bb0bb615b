"""The operator as primitives of JAX: how it is differentiated and compiled.

- ``rnn`` is what callers see. It is batched by joining the batches, and differentiated by the two others.
- ``forward`` is one call of the kernels; for backward it also returns the reserve.
- ``backward`` computes gradients from the reserve. Its own derivative is that of the composed operator.

On the CPU ``forward`` and ``backward`` are calls of machine code, elsewhere scans over the cell's equations.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from fusedrnn.engines.cpu.tiling import unsupported_heads
from fusedrnn.jax import composed
from fusedrnn.jax.batching_rules import call_one_by_one, join_batches
from fusedrnn.jax.call_table import reserve_size
from fusedrnn.jax.calls import Call, Needs, NetworkJob
from fusedrnn.jax.lowering import define, lower_to_handler
from fusedrnn.jax.mesh_types import result_type, zeros_that_vary
from fusedrnn.jax.param_arrays import flatten, unflatten

Array = Any

rnn_p, forward_p, backward_p = map(Primitive, ("fusedrnn", "fusedrnn_forward", "fusedrnn_backward"))


# The types of results.


def _forward_shapes(*operands: Any, call: Call, saves: bool) -> list[Any]:
    x = operands[0]
    steps, batch = call.sizes(x.shape)
    spec = call.spec
    shapes = [(*x.shape[:2], spec.output_size), *spec.state_shape(batch)]
    results = [result_type(x, shape) for shape in shapes]
    if saves:
        results.append(result_type(x, (reserve_size(call, steps, batch),), np.dtype(np.uint8)))
    return results


def _rnn_shapes(*operands: Any, call: Call) -> list[Any]:
    return _forward_shapes(*operands, call=call, saves=False)


def _backward_shapes(*operands: Any, call: Call, needs: Needs) -> list[Any]:
    x = operands[0]
    shapes = [x.shape] if needs.x else []
    shapes += [(call.spec.layout.size,)] if needs.params else []
    shapes += call.spec.state_shape(call.sizes(x.shape)[1]) if needs.states else []
    return [result_type(x, shape) for shape in shapes]


# On devices other than the CPU.


def _composed_forward(*operands: Array, call: Call, saves: bool) -> list[Array]:
    results = list(_scan(call, _pieces(call, operands)))
    if saves:
        results.append(jnp.zeros(reserve_size(call, *call.sizes(operands[0].shape)), jnp.uint8))
    return results


def _pieces(call: Call, operands: Sequence[Array]) -> dict[str, Any]:
    """The operands by name, the parameters as the flat vector."""
    pieces = call.pieces(operands)
    params = pieces["params"]
    return {**pieces, "params": params[0] if call.arrays is None else flatten(params, call.arrays)}


def _scan(call: Call, pieces: Mapping[str, Any]) -> tuple[Array, ...]:
    """The output and the final states by the composed operator."""
    if not call.batch_first:
        return composed.forward(call.spec, **pieces)
    y, *final = composed.forward(call.spec, **{**pieces, "x": pieces["x"].swapaxes(0, 1)})
    return y.swapaxes(0, 1), *final


def _composed_backward(*operands: Array, call: Call, needs: Needs) -> list[Array]:
    own, _, cotangents = _split_backward(call, operands)
    return _composed_gradients(call, needs, own, cotangents)


def _split_backward(call: Call, operands: Sequence[Array]) -> tuple[list[Array], Array, list[Array]]:
    """The operands of forward, the reserve, and the cotangents of its results."""
    count = len(call.operand_names)
    return list(operands[:count]), operands[count], list(operands[count + 1 :])


def _composed_gradients(
    call: Call, needs: Needs, operands: Sequence[Array], cotangents: Sequence[Array]
) -> list[Array]:
    """The gradients that ``backward`` returns, by differentiating the scan."""
    pieces = _pieces(call, operands)
    if pieces["states"] is None and needs.states:
        x = pieces["x"]
        shapes = call.spec.state_shape(call.sizes(x.shape)[1])
        pieces["states"] = tuple(zeros_that_vary(x, shape) for shape in shapes)

    def run(x: Array, params: Array, states: Any) -> tuple[Array, ...]:
        return _scan(call, {**pieces, "x": x, "params": params, "states": states})

    _, vjp = jax.vjp(run, pieces["x"], pieces["params"], pieces["states"])
    dx, dparams, dstates = vjp(tuple(cotangents))
    return [*([dx] if needs.x else []), *([dparams] if needs.params else []), *(dstates if needs.states else [])]


# On the CPU. There are no kernels for heads of some sizes.


def _lower_forward(ctx: Any, *operands: Any, call: Call, saves: bool) -> Any:
    if (refusal := unsupported_heads(call.spec)) is not None:
        warnings.warn(f"{refusal}: it runs as a scan of JAX's operations", stacklevel=2)
        return mlir.lower_fun(_composed_forward)(ctx, *operands, call=call, saves=saves)
    return lower_to_handler(ctx, *operands, job=NetworkJob(call, "training" if saves else "forward", None))


def _lower_backward(ctx: Any, *operands: Any, call: Call, needs: Needs) -> Any:
    if unsupported_heads(call.spec) is not None:
        return mlir.lower_fun(_composed_backward)(ctx, *operands, call=call, needs=needs)
    return lower_to_handler(ctx, *operands, job=NetworkJob(call, "backward", needs))


# Derivatives.


@jax.tree_util.register_static
class _Static:
    """A value among the residuals that is not an array."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call: Call, *operands: Array) -> Any:
    # Only training draws random numbers, and training always makes a reserve.
    drops = "seed" in call.options
    results = forward_p.bind(*operands, call=call, saves=drops)
    return results[:-1] if drops else results


def _save(call: Call, *operands: Any) -> tuple[list[Array], Any]:
    """Forward, and what backward needs. Each operand comes with a flag that tells whether its gradient is needed."""
    if not call.spec.is_trainable:
        raise NotImplementedError(f"compute={call.spec.compute!r} is for inference: it has no gradients")
    values = [operand.value for operand in operands]
    perturbed = dict(zip(call.operand_names, (operand.perturbed for operand in operands), strict=True))
    params, states = (any(map(perturbed.__getitem__, names)) for names in (call.param_names, call.initial_names))
    needs = Needs(perturbed["x"], params, states)
    *results, reserve = forward_p.bind(*values, call=call, saves=True)
    return results, (_Static(needs), values, reserve)


def _differentiate(call: Call, residuals: Any, cotangents: Sequence[Any]) -> tuple[Array | None, ...]:
    static, operands, reserve = residuals
    needs = static.value
    dense = [
        zeros_that_vary(operands[0], cotangent.aval.shape) if _is_zero(cotangent) else cotangent
        for cotangent in cotangents
    ]
    gradients = iter(_gradients(call, needs, operands, reserve, dense))
    by_name: dict[str, Array] = {}
    if needs.x:
        by_name["x"] = next(gradients)
    if needs.params:
        flat = next(gradients)
        parts = [flat] if call.arrays is None else unflatten(flat, call.arrays)
        by_name.update(zip(call.param_names, parts, strict=True))
    if needs.states:
        by_name.update(zip(call.initial_names, gradients, strict=True))
    return tuple(by_name.get(name) for name in call.operand_names)


def _is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


_differentiable.defvjp(_save, _differentiate, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(call: Call, needs: Needs, operands: list[Array], reserve: Array, cotangents: list[Array]) -> Any:
    """The gradients from the reserve; differentiable like :func:`_composed_gradients`."""
    return backward_p.bind(*operands, reserve, *cotangents, call=call, needs=needs)


def _save_operands(
    call: Call, needs: Needs, operands: list[Array], reserve: Array, cotangents: list[Array]
) -> tuple[list[Array], Any]:
    return _gradients(call, needs, operands, reserve, cotangents), (operands, cotangents)


def _differentiate_gradients(call: Call, needs: Needs, residuals: Any, second: list[Array]) -> Any:
    operands, cotangents = residuals
    floats, others = operands[: call.num_floats], operands[call.num_floats :]
    _, vjp = jax.vjp(lambda own, dys: _composed_gradients(call, needs, [*own, *others], dys), floats, cotangents)
    dfloats, dcotangents = vjp(list(second))
    return [*dfloats, *(None for _ in others)], None, dcotangents


_gradients.defvjp(_save_operands, _differentiate_gradients)


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, call: Call) -> tuple[list[Array], list[Array]]:
    """Differentiate with respect to the operands that have a tangent; the others are constants."""
    varying = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def run(*some: Array) -> Any:
        operands = list(primals)
        for index, value in zip(varying, some, strict=True):
            operands[index] = value
        return _differentiable(call, *operands)

    own = [primals[index] for index in varying], [tangents[index] for index in varying]
    results, dresults = jax.jvp(run, *own)
    return list(results), list(dresults)


def _jvp_forward(
    primals: Sequence[Array], tangents: Sequence[Any], *, call: Call, saves: bool
) -> tuple[list[Array], list[Any]]:
    """The derivative of a forward call inside another derivative: of its results, but not of its reserve."""
    results, dresults = _jvp(primals, tangents, call=call)
    if not saves:
        return results, dresults
    reserve = forward_p.bind(*primals, call=call, saves=True)[-1]
    return [*results, reserve], [*dresults, np.zeros(reserve.shape, jax.dtypes.float0)]


def _run(*operands: Array, call: Call) -> Any:
    return _differentiable(call, *operands)


define(rnn_p, _rnn_shapes, partial(join_batches, rnn_p), _run)
define(forward_p, _forward_shapes, partial(call_one_by_one, forward_p), _composed_forward)
define(backward_p, _backward_shapes, partial(call_one_by_one, backward_p), _composed_backward)
ad.primitive_jvps[rnn_p], ad.primitive_jvps[forward_p] = _jvp, _jvp_forward
mlir.register_lowering(forward_p, _lower_forward, platform="cpu")
mlir.register_lowering(backward_p, _lower_backward, platform="cpu")
