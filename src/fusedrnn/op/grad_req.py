"""Which gradients a backward call computes, and the buffers that they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.operands import BACKWARD_USES, GRAD_REQS, BackwardOperands, GradBuffers, GradReq, misplaced_buffer
from fusedrnn.op.reserve import PLAIN_CALL, CallKind
from fusedrnn.op.resets import split_cotangents
from fusedrnn.op.validation import check_buffer, check_dstates, check_dy, check_no_alias, check_tuple
from fusedrnn.scalars import check_choice
from fusedrnn.spec import RNNSpec

# The operands that have gradients, by their name in grad_req, and the names of the gradients.
GRADIENTS = {"x": "dx", "params": "dparams", "states": "dstates"}
RESET_GRADIENTS = GRADIENTS | {"reset_states": "dreset_states"}


def backward_operands(
    spec: RNNSpec,
    steps: int,
    batch: int,
    dy: Any,
    dstates: Any,
    grad_req: object,
    out: object,
    kind: CallKind = PLAIN_CALL,
) -> BackwardOperands:
    """The operands of a backward call, from arguments as in :meth:`RNNOp.backward`; ``kind`` is of its forward call."""
    dothers: tuple[Array | None, ...] = ()
    if kind.all_states:
        dy, dothers = split_cotangents(dy, spec, steps, batch)
    checked_dy = check_dy(dy, spec, steps, batch)
    checked_dstates = check_dstates(dstates, spec, batch)
    gradients = RESET_GRADIENTS if kind.reset_states else GRADIENTS
    grad_reqs = parse_grad_req(grad_req, gradients)
    out_buffers = check_out(grad_reqs, gradients, out)
    state_shapes = spec.state_shape(batch)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "x": {"dx": (steps, batch, spec.input_size)},
        "params": {"dparams": (spec.layout.size,)},
        "states": dict(zip((f"d{name}0" for name in spec.state_names), state_shapes, strict=True)),
        "reset_states": dict(zip((f"dreset {name}" for name in spec.state_names), state_shapes, strict=True)),
    }
    unshared: dict[str, Sequence[Array]] = {
        "dy": [array for array in (dy, *dothers) if array is not None],
        "dstates": [dstate for dstate in dstates or () if dstate is not None],
    }
    buffers: dict[str, tuple[Array, ...]] = {}
    for name, value in out_buffers.items():
        if value is not None:
            entries = value if name.endswith("states") else (value,)
            buffers[name] = check_buffers(gradients[name], entries, shapes[name], spec, unshared)
    # Memory is allocated only now that all arguments are known to be right.
    for name, request in grad_reqs.items():
        if request != "null" and name not in buffers:
            buffers[name] = tuple(np.empty(shape, spec.dtype) for shape in shapes[name].values())
    x, params = (buffers[name][0] if name in buffers else None for name in ("x", "params"))
    fields = {f"add_{name}": request == "add" for name, request in grad_reqs.items()}
    grads = GradBuffers(x, params, buffers.get("states"), reset_states=buffers.get("reset_states"), **fields)
    return BackwardOperands(checked_dy, checked_dstates, grads, dothers)


def parse_grad_req(grad_req: object, gradients: Mapping[str, str]) -> dict[str, GradReq]:
    """The request for each operand that has a gradient."""
    if isinstance(grad_req, str):
        return dict.fromkeys(gradients, check_choice("grad_req", grad_req, GRAD_REQS))
    if not isinstance(grad_req, Mapping):
        raise TypeError(
            f"grad_req must be one of {', '.join(GRAD_REQS)}, or a mapping from {', '.join(gradients)} to these; "
            f"got {type(grad_req).__name__}"
        )
    if unknown := [key for key in grad_req if key not in gradients]:
        raise ValueError(f"grad_req must have keys among {', '.join(gradients)}; got {unknown[0]!r}")
    return {name: check_choice(f"grad_req: {name}", grad_req.get(name, "write"), GRAD_REQS) for name in gradients}


def check_out(grad_reqs: Mapping[str, GradReq], gradients: Mapping[str, str], out: object) -> dict[str, object]:
    """The buffer of each gradient, or None; raises an error if a request does not allow it."""
    names = tuple(gradients.values())
    buffers = (None,) * len(names) if out is None else check_tuple("out", out, dict.fromkeys(names, ""), "None or ")
    index = misplaced_buffer(tuple(grad_reqs.values()), buffers)
    if index is not None:
        if buffers[index] is None:
            raise ValueError(f"out: {names[index]} must be given where grad_req is 'add'; got None")
        got = type(buffers[index]).__name__
        raise ValueError(f"out: {names[index]} must be None where grad_req is 'null'; got {got}")
    return dict(zip(gradients, buffers, strict=True))


def check_buffers(
    gradient: str,
    buffers: object,
    shapes: Mapping[str, tuple[int, ...]],
    spec: RNNSpec,
    unshared: dict[str, Sequence[Array]],
) -> tuple[Array, ...]:
    """The buffers of one gradient, checked: writable, sharing no memory. Adds each to ``unshared``."""
    checked = []
    for (name, shape), value in zip(shapes.items(), check_tuple(f"out: {gradient}", buffers, shapes), strict=True):
        buffer = check_buffer(f"out: {name}", value, spec, shape)
        if BACKWARD_USES.get(name, BACKWARD_USES["dh0"]).contiguous and not buffer.flags.c_contiguous:
            raise ValueError(f"out: {name} must be contiguous; got strides {buffer.strides}")
        check_no_alias(f"out: {name}", buffer, unshared)
        unshared[f"out: {name}"] = (buffer,)
        checked.append(buffer)
    return tuple(checked)
