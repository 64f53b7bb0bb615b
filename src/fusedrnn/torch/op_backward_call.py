"""The arguments of the operator ``backward`` in torch's registry, and checks that they match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn.torch.network import Tensors
from fusedrnn.torch.op_call import ARGUMENTS, LATER_ARGUMENTS, OpCall, checked
from fusedrnn.torch.op_operands import check_tensor, name_of, shape_of

SCHEMA = (
    f"Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor reserve, {ARGUMENTS}, bool[] needed, {LATER_ARGUMENTS}, "
    "Tensor?[]? more_cotangents=None"
)
_COTANGENTS = ("dy", "dh_n", "dc_n")
_NUM_BACKWARD = len(_COTANGENTS) + 1
"""How many arguments precede those of the call: these cotangents and the reserve."""


class BackwardCall(NamedTuple):
    """The arguments of the operator ``backward``.

    Attributes:
        call: The arguments of the forward call.
        cotangents: If checked, dy and the cotangent of each state of the mode; if unchecked, dy, dh_n, dc_n and those
            of further states. None for zeros.
        reserve: The last result of ``forward_training``.
        needed: Which of ``call.differentiable`` need a gradient.
    """

    call: OpCall
    cotangents: Tensors
    reserve: Tensor
    needed: Sequence[bool]


_NEEDED = _NUM_BACKWARD + OpCall._fields.index("compute")
_MORE_COTANGENTS = _NUM_BACKWARD + len(OpCall._fields) + 1


def split_backward(arguments: Sequence[Any]) -> BackwardCall:
    """The arguments of the operator ``backward``, unchecked; the inverse of :func:`join_backward`."""
    dy, dh_n, dc_n, reserve = arguments[:_NUM_BACKWARD]
    more = (*arguments[_MORE_COTANGENTS:], None)[0]
    call = OpCall(*arguments[_NUM_BACKWARD:_NEEDED], *arguments[_NEEDED + 1 : _MORE_COTANGENTS])
    return BackwardCall(call, (dy, dh_n, dc_n, *(more or ())), reserve, arguments[_NEEDED])


def join_backward(call: OpCall, cotangents: Tensors, reserve: Tensor, needed: Sequence[bool]) -> tuple[Any, ...]:
    """The arguments of the operator ``backward``, for the cotangents of the output and of each state."""
    num_named = len(_COTANGENTS)
    dy, dh_n, dc_n = (*cotangents, None)[:num_named]
    first, later = call[: OpCall._fields.index("compute")], call[OpCall._fields.index("compute") :]
    return dy, dh_n, dc_n, reserve, *first, list(needed), *later, list(cotangents[num_named:]) or None


def checked_backward(*arguments: Any) -> BackwardCall:
    """The arguments of the operator ``backward``, after the checks of :func:`checked`, which raise the same errors."""
    call, cotangents, reserve, needed = split_backward(arguments)
    call = checked(*call)
    spec, x = call.spec, call.x
    expected = [(*x.shape[:-1], spec.output_size), *spec.state_shape(call.batch)]
    expected += call.all_state_shapes
    for index, cotangent in enumerate(cotangents):
        if cotangent is None:
            continue
        name = name_of(_COTANGENTS, "more_cotangents", index)
        if index >= len(expected):
            raise RuntimeError(f"{name} must be None in mode {spec.mode_name!r}; got shape {shape_of(cotangent)}")
        check_tensor(name, cotangent, expected[index], x)
    if reserve.dtype is not torch.uint8 or reserve.dim() != 1:
        raise RuntimeError(f"reserve must be bytes of one dimension; got {reserve.dtype} of shape {shape_of(reserve)}")
    if len(needed) != len(call.differentiable):
        raise RuntimeError(f"needed must have {len(call.differentiable)} entries; got {len(needed)}")
    cotangents = (*cotangents, *(None,) * len(expected))[: len(expected)]
    return BackwardCall(call, cotangents, reserve, needed)
