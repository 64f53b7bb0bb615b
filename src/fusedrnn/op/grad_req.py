"""Which gradients a backward call computes, and the buffers that they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.operands import (
    BACKWARD,
    GRAD_REQS,
    BackwardOperands,
    GradBuffers,
    GradReq,
    is_sequence,
    misplaced_buffer,
)
from fusedrnn.op.validation import check_buffer, check_dstates, check_dy, check_no_alias, check_tuple
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
GradReqs = dict[str, GradReq]
# The operands that have gradients, by their name in grad_req, and the names of the gradients.
GRADIENTS = {"x": "dx", "params": "dparams", "states": "dstates"}


def backward_operands(
    spec: RNNSpec, steps: int, batch: int, dy: Any, dstates: Any, grad_req: object, out: object
) -> BackwardOperands:
    """The operands of a backward call, from arguments as in :meth:`RNNOp.backward`."""
    checked_dy = check_dy(dy, spec, steps, batch)
    checked_dstates = check_dstates(dstates, spec, batch)
    inputs: dict[str, Sequence[Array]] = {
        "dy": () if dy is None else (dy,),
        "dstates": [dstate for dstate in dstates or () if dstate is not None],
    }
    grads = allocate_grad_buffers(parse_grad_req(grad_req), out, spec, steps, batch, inputs)
    return BackwardOperands(checked_dy, checked_dstates, grads)


def parse_grad_req(grad_req: object) -> GradReqs:
    """The request for each of x, params and states."""
    if isinstance(grad_req, str):
        return dict.fromkeys(GRADIENTS, check_grad_req("grad_req", grad_req))
    if not isinstance(grad_req, Mapping):
        raise TypeError(
            f"grad_req must be one of {', '.join(GRAD_REQS)}, or a mapping from {', '.join(GRADIENTS)} to these; "
            f"got {type(grad_req).__name__}"
        )
    if unknown := [key for key in grad_req if key not in GRADIENTS]:
        raise ValueError(f"grad_req must have keys among {', '.join(GRADIENTS)}; got {unknown[0]!r}")
    return {name: check_grad_req(f"grad_req: {name}", grad_req.get(name, "write")) for name in GRADIENTS}


def check_grad_req(name: str, value: object) -> GradReq:
    """``value`` if it is one of :data:`GRAD_REQS`.

    Raises:
        TypeError: Naming the argument, if it is no string.
        ValueError: Naming the argument, if it is another string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(GRAD_REQS)}; got {type(value).__name__}")
    if value not in GRAD_REQS:
        raise ValueError(f"{name} must be one of {', '.join(GRAD_REQS)}; got {value!r}")
    return value


def allocate_grad_buffers(
    grad_reqs: GradReqs,
    out: object,
    spec: RNNSpec,
    steps: int,
    batch: int,
    inputs: Mapping[str, Sequence[Array]],
) -> GradBuffers:
    """The buffers in ``out``, and a new array for each gradient to be written that has none.

    Args:
        grad_reqs: What :func:`parse_grad_req` returned.
        out: None, or a triple of a buffer or None for each gradient.
        spec: The network.
        steps: T.
        batch: N.
        inputs: Arrays, by name, whose memory no buffer may share.

    Raises:
        TypeError: Naming the buffer, what was given and what was expected.
        ValueError: Likewise.
    """
    out_buffers = _check_triple(grad_reqs, out)
    state_names = (f"d{name}0" for name in spec.state_names)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "x": {"dx": (steps, batch, spec.input_size)},
        "params": {"dparams": (spec.layout.size,)},
        "states": dict(zip(state_names, spec.state_shape(batch), strict=True)),
    }
    computed = [name for name, grad_req in grad_reqs.items() if grad_req != "null"]
    buffers: dict[str, tuple[Array, ...]] = {}
    others = dict(inputs)
    for name in computed:
        value = out_buffers[name]
        if value is not None:
            buffers[name] = _check_buffers(value if name == "states" else (value,), shapes[name], spec, others)
    # Memory is allocated only now that all arguments are known to be right.
    for name in computed:
        if name not in buffers:
            buffers[name] = tuple(np.empty(shape, spec.dtype) for shape in shapes[name].values())
    x, params = (buffers[name][0] if name in buffers else None for name in ("x", "params"))
    add = (grad_reqs[name] == "add" for name in GRADIENTS)
    return GradBuffers(x, params, buffers.get("states"), *add)


def _check_triple(grad_reqs: GradReqs, out: object) -> dict[str, object]:
    """The buffer of each gradient, or None, where the requests allow it."""
    if out is None:
        out = (None,) * len(GRADIENTS)
    expected = f"None or a tuple of {len(GRADIENTS)}: {', '.join(GRADIENTS.values())}"
    if not is_sequence(out):
        raise TypeError(f"out must be {expected}; got {type(out).__name__}")
    buffers: tuple[object, ...] = tuple(out)
    if len(buffers) != len(GRADIENTS):
        raise ValueError(f"out must be {expected}; got {len(buffers)}")
    index = misplaced_buffer([grad_reqs[name] for name in GRADIENTS], buffers)
    if index is not None:
        gradient, buffer = tuple(GRADIENTS.values())[index], buffers[index]
        if buffer is None:
            raise ValueError(f"out: {gradient} must be given where grad_req is 'add'; got None")
        raise ValueError(f"out: {gradient} must be None where grad_req is 'null'; got {type(buffer).__name__}")
    return dict(zip(GRADIENTS, buffers, strict=True))


def _check_buffers(
    buffers: object, shapes: Mapping[str, tuple[int, ...]], spec: RNNSpec, others: dict[str, Sequence[Array]]
) -> tuple[Array, ...]:
    """The buffers of one gradient, if they can be written; adds each to the memory that others must not share."""
    checked = []
    for (name, shape), value in zip(shapes.items(), check_tuple("out: dstates", buffers, shapes), strict=True):
        buffer = check_buffer(f"out: {name}", value, spec, shape)
        if BACKWARD[name].contiguous and not buffer.flags.c_contiguous:
            raise ValueError(f"out: {name} must be contiguous; got strides {buffer.strides}")
        check_no_alias(f"out: {name}", buffer, others)
        others[f"out: {name}"] = (buffer,)
        checked.append(buffer)
    return tuple(checked)
