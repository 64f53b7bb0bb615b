"""Checks of what callers pass to a network, before any memory is touched.

They are the checks of :mod:`fusedrnn.op.validation`, layer by layer. Errors name an argument of one entry of the chain
by its index: ``states[1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.network import NetworkGradBuffers, NetworkGradOperands, NetworkOperands
from fusedrnn.engines.operands import FORWARD_USES
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op import validation
from fusedrnn.op.grad_req import GRADIENTS, RESET_GRADIENTS, check_buffers, check_out, parse_grad_req
from fusedrnn.op.reserve import CallKind
from fusedrnn.op.resets import check_resets, split_cotangents
from fusedrnn.op.validation import (
    check_array,
    check_buffer,
    check_dstates,
    check_dy,
    check_lengths,
    check_no_alias,
    check_tuple,
    check_x,
    readable,
)
from fusedrnn.quantized_params import QuantizedParams
from fusedrnn.scalars import as_bool

LayerArrays = Sequence[Sequence[Array | None] | None]
"""What a caller gives for each entry of the chain: arrays of its states. None instead of any of these is for zeros."""


def check_network(spec: object) -> NetworkSpec:
    """``spec`` if it is a NetworkSpec."""
    if not isinstance(spec, NetworkSpec):
        raise TypeError(f"spec must be a NetworkSpec; got {type(spec).__name__}")
    return spec


def check_params(params: object, spec: NetworkSpec) -> Array:
    """The flat parameter vector, contiguous."""
    if isinstance(params, QuantizedParams):
        raise TypeError("params must be a NumPy array, which compute= of layers quantizes; got QuantizedParams")
    checked = check_array("params", params, spec.layers[0])
    if checked.shape != (spec.layout.size,):
        raise ValueError(
            f"params must have shape ({spec.layout.size},), as the network's layout has it; got {checked.shape}"
        )
    return readable(FORWARD_USES["params"], checked)


def _by_layer(name: str, value: object, spec: NetworkSpec) -> Sequence[Any]:
    """An entry for each entry of the chain, unchecked; None for all if ``value`` is None."""
    names = [f"{name}[{index}]" for index in range(len(spec.layers))]
    return (None,) * len(names) if value is None else check_tuple(name, value, dict.fromkeys(names, ""), "None or ")


def check_states(
    name: str, value: object, spec: NetworkSpec, batch: int, entry_name: str
) -> tuple[tuple[Array, ...] | None, ...]:
    """The states of each layer, contiguous; None for zeros."""
    return tuple(
        validation.check_states(entry, layer, batch, f"{name}[{index}]", entry_name)
        for index, (layer, entry) in enumerate(zip(spec.layers, _by_layer(name, value, spec), strict=True))
    )


def forward_operands(
    spec: NetworkSpec, x: Any, params: Any, states: Any, lengths: Any = None, out: Any = None, resets: Any = None,
    reset_states: Any = None, all_states: Any = False,
) -> tuple[NetworkOperands, CallKind]:  # fmt: skip
    """The operands of a forward call and its kind, from arguments as in :meth:`NetworkOp.forward`."""
    first, last = spec.layers[0], spec.layers[-1]
    checked_x = check_x(x, first)
    steps, batch = checked_x.shape[:2]
    checked_params = check_params(params, spec)
    checked_states = check_states("states", states, spec, batch, "{}0")
    checked_lengths = check_lengths(lengths, steps, batch)
    if resets is None and reset_states is not None:
        raise ValueError("reset_states must be None without resets")
    marks = None if resets is None else check_resets(resets, steps, batch, checked_lengths)
    checked_reset_states = check_states("reset_states", reset_states, spec, batch, "reset {}")
    kind = CallKind(marks is not None, reset_states is not None, as_bool("all_states", all_states))
    shape = steps, batch, last.output_size
    if out is None:
        y = np.empty(shape, spec.dtype)
    else:
        y = check_buffer("out", out, last, shape)
        inputs = {"x": (x,), "params": (params,), "states": _arrays(states), "reset_states": _arrays(reset_states)}
        check_no_alias("out", y, inputs)
    features = last.other_state_features if kind.all_states else ()
    every = tuple(np.empty((steps, batch, size), spec.dtype) for size in features)
    arrays = checked_x, checked_params, checked_states, checked_lengths, y, marks, checked_reset_states, every
    return NetworkOperands(*arrays), kind


def _arrays(by_layer: LayerArrays | None) -> list[Array]:
    """The arrays that are not None."""
    return [array for entries in by_layer or () for array in entries or () if array is not None]


def backward_operands(
    spec: NetworkSpec, steps: int, batch: int, dy: Any, dstates: Any, grad_req: object, out: object, kind: CallKind
) -> NetworkGradOperands:
    """The operands of a backward call, from arguments as in :meth:`NetworkOp.backward`."""
    dothers: tuple[Array | None, ...] = ()
    if kind.all_states:
        dy, dothers = split_cotangents(dy, spec.layers[-1], steps, batch)
    checked_dy = check_dy(dy, spec.layers[-1], steps, batch)
    by_layer = _by_layer("dstates", dstates, spec)
    checked_dstates = tuple(
        check_dstates(entry, layer, batch, f"dstates[{index}]")
        for index, (layer, entry) in enumerate(zip(spec.layers, by_layer, strict=True))
    )
    gradients = RESET_GRADIENTS if kind.reset_states else GRADIENTS
    grad_reqs = parse_grad_req(grad_req, gradients)
    unshared: dict[str, Sequence[Array]] = {
        "dy": [array for array in (dy, *dothers) if array is not None],
        "dstates": _arrays(by_layer),
    }
    shapes = _gradient_shapes(spec, steps, batch)
    buffers: dict[str, list[tuple[Array, ...]]] = {}
    for name, value in check_out(grad_reqs, gradients, out).items():
        if value is not None:
            buffers[name] = _given_buffers(gradients[name], value, shapes[name], spec, unshared)
    # Memory is allocated only now that all arguments are known to be right.
    for name, request in grad_reqs.items():
        if request != "null" and name not in buffers:
            buffers[name] = [
                tuple([np.empty(shape, spec.dtype) for shape in entry.values()]) for entry in shapes[name]
            ]
    x, params = (buffers[name][0][0] if name in buffers else None for name in ("x", "params"))
    states, reset_states = (
        tuple(buffers[name]) if name in buffers else None for name in ("states", "reset_states")
    )
    adds: dict[str, Any] = {f"add_{name}": request == "add" for name, request in grad_reqs.items()}
    grads = NetworkGradBuffers(x, params, states, reset_states=reset_states, **adds)
    return NetworkGradOperands(checked_dy, checked_dstates, grads, dothers)


def _gradient_shapes(spec: NetworkSpec, steps: int, batch: int) -> dict[str, list[dict[str, tuple[int, ...]]]]:
    """The shapes of the gradients of each operand by their names in errors; for states by entries of the chain."""

    def of_states(prefix: str, form: str) -> list[dict[str, tuple[int, ...]]]:
        return [
            {
                f"{prefix}[{index}]: {form.format(name)}": shape
                for name, shape in zip(layer.state_names, layer.state_shape(batch), strict=True)
            }
            for index, layer in enumerate(spec.layers)
        ]

    return {
        "x": [{"dx": (steps, batch, spec.input_size)}],
        "params": [{"dparams": (spec.layout.size,)}],
        "states": of_states("dstates", "d{}0"),
        "reset_states": of_states("dreset_states", "dreset {}"),
    }


def _given_buffers(
    gradient: str, value: Any, shapes: list[dict[str, tuple[int, ...]]], spec: NetworkSpec,
    unshared: dict[str, Sequence[Array]],
) -> list[tuple[Array, ...]]:  # fmt: skip
    """A caller's buffers of one gradient, checked."""
    first = spec.layers[0]
    if not gradient.endswith("states"):
        return [check_buffers(gradient, (value,), shapes[0], first, unshared)]
    names = [f"{gradient}[{index}]" for index in range(len(shapes))]
    by_layer = check_tuple(f"out: {gradient}", value, dict.fromkeys(names, ""))
    return [
        check_buffers(name, entry, entry_shapes, first, unshared)
        for name, entry, entry_shapes in zip(names, by_layer, shapes, strict=True)
    ]
