"""Which gradients a backward call computes, and the buffers that they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.engines.operands import BACKWARD, GRAD_REQS, BackwardOperands, GradBuffers, GradReq, misplaced_buffer
from fusedrnn.op.validation import check_buffer, check_dstates, check_dy, check_no_alias, check_tuple
from fusedrnn.scalars import check_choice
from fusedrnn.spec import Array, RNNSpec

# The operands that have gradients, by their name in grad_req, and the names of the gradients.
GRADIENTS = {"x": "dx", "params": "dparams", "states": "dstates"}


def backward_operands(
    spec: RNNSpec, steps: int, batch: int, dy: Any, dstates: Any, grad_req: object, out: object
) -> BackwardOperands:
    """The operands of a backward call, from arguments as in :meth:`RNNOp.backward`."""
    checked_dy = check_dy(dy, spec, steps, batch)
    checked_dstates = check_dstates(dstates, spec, batch)
    grad_reqs = _parse_grad_req(grad_req)
    out_buffers = _check_triple(grad_reqs, out)
    dstate_names = (f"d{name}0" for name in spec.state_names)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "x": {"dx": (steps, batch, spec.input_size)},
        "params": {"dparams": (spec.layout.size,)},
        "states": dict(zip(dstate_names, spec.state_shape(batch), strict=True)),
    }
    unshared: dict[str, Sequence[Array]] = {
        "dy": () if dy is None else (dy,),
        "dstates": [dstate for dstate in dstates or () if dstate is not None],
    }
    buffers: dict[str, tuple[Array, ...]] = {}
    for name, value in out_buffers.items():
        if value is not None:
            buffers[name] = _check_buffers(value if name == "states" else (value,), shapes[name], spec, unshared)
    # Memory is allocated only now that all arguments are known to be right.
    for name, request in grad_reqs.items():
        if request != "null" and name not in buffers:
            buffers[name] = tuple(np.empty(shape, spec.dtype) for shape in shapes[name].values())
    x, params = (buffers[name][0] if name in buffers else None for name in ("x", "params"))
    add = (request == "add" for request in grad_reqs.values())
    return BackwardOperands(checked_dy, checked_dstates, GradBuffers(x, params, buffers.get("states"), *add))


def _parse_grad_req(grad_req: object) -> dict[str, GradReq]:
    """The request for each of x, params and states."""
    if isinstance(grad_req, str):
        return dict.fromkeys(GRADIENTS, check_choice("grad_req", grad_req, GRAD_REQS))
    if not isinstance(grad_req, Mapping):
        raise TypeError(
            f"grad_req must be one of {', '.join(GRAD_REQS)}, or a mapping from {', '.join(GRADIENTS)} to these; "
            f"got {type(grad_req).__name__}"
        )
    if unknown := [key for key in grad_req if key not in GRADIENTS]:
        raise ValueError(f"grad_req must have keys among {', '.join(GRADIENTS)}; got {unknown[0]!r}")
    return {name: check_choice(f"grad_req: {name}", grad_req.get(name, "write"), GRAD_REQS) for name in GRADIENTS}


def _check_triple(grad_reqs: Mapping[str, GradReq], out: object) -> dict[str, object]:
    """The buffer of each gradient, or None, where the requests allow it."""
    names = tuple(GRADIENTS.values())
    buffers = (None,) * len(names) if out is None else check_tuple("out", out, dict.fromkeys(names, ""), "None or ")
    index = misplaced_buffer(tuple(grad_reqs.values()), buffers)
    if index is not None:
        if buffers[index] is None:
            raise ValueError(f"out: {names[index]} must be given where grad_req is 'add'; got None")
        got = type(buffers[index]).__name__
        raise ValueError(f"out: {names[index]} must be None where grad_req is 'null'; got {got}")
    return dict(zip(GRADIENTS, buffers, strict=True))


def _check_buffers(
    buffers: object, shapes: Mapping[str, tuple[int, ...]], spec: RNNSpec, unshared: dict[str, Sequence[Array]]
) -> tuple[Array, ...]:
    """The buffers of one gradient, if they can be written and share no memory; adds each to ``unshared``."""
    checked = []
    for (name, shape), value in zip(shapes.items(), check_tuple("out: dstates", buffers, shapes), strict=True):
        buffer = check_buffer(f"out: {name}", value, spec, shape)
        if BACKWARD.get(name, BACKWARD["dh0"]).contiguous and not buffer.flags.c_contiguous:
            raise ValueError(f"out: {name} must be contiguous; got strides {buffer.strides}")
        check_no_alias(f"out: {name}", buffer, unshared)
        unshared[f"out: {name}"] = (buffer,)
        checked.append(buffer)
    return tuple(checked)
