"""Calls under autocast: tensors are converted to the dtype of the weights, and results to the dtypes of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import eager
from fusedrnn.torch.eligibility import weight_dtype
from fusedrnn.torch.low_precision import OPERANDS
from fusedrnn.torch.op_call import OpCall

_FLOATS = torch.float32, torch.bfloat16, torch.float16
"""The dtypes that autocast converts."""
_any_autocast = torch._C._is_any_autocast_enabled  # bound once: a lookup takes a noticeable part of a small call


def is_enabled() -> bool:
    """Whether the CPU's autocast is on."""
    if not _any_autocast():
        return False
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4 the function takes no device
        return bool(torch.is_autocast_cpu_enabled())


def _is_enabled_on(device: str) -> bool:
    """Whether autocast is on for tensors of a device; before torch 2.4, False for all but the CPU."""
    if device == "cpu":
        return is_enabled()
    is_available = getattr(torch.amp, "is_autocast_available", lambda device: False)
    return bool(is_available(device) and torch.is_autocast_enabled(device))


def _dtype(device: str = "cpu") -> torch.dtype:
    """The dtype of a device's autocast."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device)
    return torch.get_autocast_cpu_dtype()  # before torch 2.4


def forward(module: Any, method: Callable[..., Any], run: Any, x: Any, hx: Any, *args: Any) -> Any:
    """The results of a module's method; None if autocast is off on the input's device, or does not convert an operand.

    Args:
        module: A layer or cell of ours.
        method: A function of ``run``, the input, the states, ``args`` and the format of GEMM operands.
        run: What :func:`fusedrnn.torch.dispatch.runner` returns; None if the method needs none.
        x: The input, as the user passes it.
        hx: The initial states, as the user passes them.
        args: Further arguments of a layer, lengths first; a tuple of states after resets is converted as initial states
            are.
    """
    data = x.data if isinstance(x, PackedSequence) else x
    device = data.device.type if isinstance(data, Tensor) else "cpu"
    if not _is_enabled_on(device):
        return None
    low, dtype = _dtype(device), weight_dtype(module)
    states = hx if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
    reset_states = [tensor for arg in args if isinstance(arg, tuple) for tensor in arg]
    operands = data, *states, *reset_states
    if dtype not in (torch.float32, low) or not all(_is_converted(tensor, device) for tensor in operands):
        return None
    is_packed = isinstance(x, PackedSequence) or (bool(args) and args[0] is not None)
    projects = bool(getattr(module, "proj_size", 0))
    state_dtype = states[-1].dtype if states else None
    result_dtypes = _result_dtypes(_mode(module), data.dtype, state_dtype, low, is_packed, projects)
    data = data.to(dtype)
    x = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    if hx is not None:
        converted = tuple([state.to(dtype) for state in states])
        hx = converted if isinstance(hx, (tuple, list)) else converted[0]
    args = tuple([_converted(arg, (dtype, dtype)) if isinstance(arg, tuple) else arg for arg in args])
    with torch.autocast(device, enabled=False):
        results = method(_runner(run), x, hx, *args, module.compute or OPERANDS.get(low))
        return None if results is None else _converted(results, result_dtypes)


def kernel(*arguments: Any) -> list[Tensor]:
    """The operator under autocast, in a graph that was made without it."""
    call, low = OpCall(*arguments), _dtype()
    with torch.autocast("cpu", enabled=False):
        tensors = call.x, *call.states, *call.weights
        if not all(tensor is None or _is_converted(tensor) for tensor in tensors):
            unchanged: list[Tensor] = torch.ops.fusedrnn.rnn(*call)
            return unchanged
        last_state = call.initial_states[-1]
        state_dtype = None if last_state is None else last_state.dtype
        is_packed = call.batch_sizes is not None or call.lengths is not None
        projects = bool(call.projection_size)
        y_dtype, dtype = _result_dtypes(call.mode, call.x.dtype, state_dtype, low, is_packed, projects)
        operands = [tensor if tensor is None else tensor.to(torch.float32) for tensor in call.differentiable]
        options = call.options._replace(compute=call.compute or OPERANDS.get(low))
        call = OpCall.of(operands, call.others, options)
        y, h_n, *others = torch.ops.fusedrnn.rnn(*call)
        return [y.to(y_dtype), h_n.to(y_dtype), *[other.to(dtype) for other in others]]


def _runner(run: Any) -> Any:
    return eager.run_under_autocast if run is eager.run else run


def _is_converted(tensor: Any, device: str = "cpu") -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in _FLOATS and tensor.device.type == device


def _mode(module: Any) -> str:
    if not isinstance(module, RNNCellBase):
        mode: str = module.mode
        return mode.lower()
    return f"{module._mode}_cell"


def _result_dtypes(
    mode: str, dtype: torch.dtype, state_dtype: torch.dtype | None, low: torch.dtype, is_packed: bool, projects: bool
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes that torch.nn's operations give for y and h, and for the other states.

    ``dtype`` is that of the input, ``state_dtype`` that of the last initial state, None for zeros like the input. The
    operations' products have the dtype ``low`` of autocast. A GRU and an LSTM then add states, which have kept their
    own dtype, and the projection of an LSTM is a product again; but a whole LSTM may be one function of oneDNN, whose
    results are ``low``. A user cell is assumed to add states.
    """
    wider = torch.promote_types(dtype if state_dtype is None else state_dtype, low)
    if ":" in mode:  # written by a user
        return wider, wider
    is_function = mode == "lstm" and not (is_packed or projects) and _is_function_of_onednn(dtype)
    if mode.startswith("rnn") or is_function:
        return low, low
    return low if projects else wider, wider


def _is_function_of_onednn(dtype: torch.dtype) -> bool:
    """Whether torch.nn's LSTM is such a function for that dtype; in half precision it needs the instructions."""
    if not has_onednn():
        return False
    if dtype is torch.float32:
        return True
    if dtype is torch.float16 and torch.is_grad_enabled():
        return False
    return has_half_precision_instructions(dtype)


def has_half_precision_instructions(dtype: torch.dtype) -> bool:
    """Whether the processor has the instructions that oneDNN needs for a dtype. Dynamo takes it for a constant."""
    supports = f"_is_mkldnn_{'fp16' if dtype is torch.float16 else 'bf16'}_supported"
    return bool(getattr(torch.ops.mkldnn, supports)())


def has_onednn() -> bool:
    """Whether torch.nn may use oneDNN now, as ``torch.backends.mkldnn.flags`` says. Dynamo takes it for a constant."""
    return bool(torch._C._has_mkldnn and torch._C._get_mkldnn_enabled())


def _converted(results: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> Any:
    """Results in their dtypes: the first of a tuple, y or h, in the first dtype, and the others in the second."""
    if isinstance(results, PackedSequence):
        return PackedSequence(results.data.to(dtypes[0]), *results[1:])
    if not isinstance(results, tuple):
        return results.to(dtypes[0])
    converted = []
    for number, result in enumerate(results):
        has_states = isinstance(result, tuple) and not isinstance(result, PackedSequence)
        converted.append(_converted(result, dtypes if has_states or not number else (dtypes[1], dtypes[1])))
    return tuple(converted)
