"""Calls under autocast on the CPU: the operator runs on float32 tensors, and results have the dtypes of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import eager
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


def _dtype() -> torch.dtype:
    """The dtype of the CPU's autocast."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype("cpu")
    return torch.get_autocast_cpu_dtype()  # before torch 2.4


def forward(module: Any, method: Callable[..., Any], run: Any, x: Any, hx: Any, *args: Any) -> Any:
    """The results of a module's method; None if the operator does not support the call.

    Args:
        module: A layer or cell of ours.
        method: A function of ``run``, the input, the states, ``args`` and the format of GEMM operands.
        run: What :func:`fusedrnn.torch.dispatch.runner` returns.
        x: The input, as the user passes it.
        hx: The initial states, as the user passes them.
        args: Further arguments; a tuple of states after resets is converted as the initial states are.
    """
    low, dtype = _dtype(), next(module.parameters()).dtype
    data = x.data if isinstance(x, PackedSequence) else x
    states = hx if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
    reset_states = [tensor for arg in args if isinstance(arg, tuple) for tensor in arg]
    operands = data, *states, *reset_states
    if dtype not in (torch.float32, low) or not all(_is_converted(tensor) for tensor in operands):
        return None
    result_dtype = _result_dtype(_mode(module), data.dtype, states[-1].dtype if states else None, low)
    data = data.to(dtype)
    x = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    if hx is not None:
        converted = tuple([state.to(dtype) for state in states])
        hx = converted if isinstance(hx, (tuple, list)) else converted[0]
    args = tuple([_converted(arg, dtype) if isinstance(arg, tuple) else arg for arg in args])
    with torch.autocast("cpu", enabled=False):
        results = method(_runner(run), x, hx, *args, module.compute or OPERANDS.get(low))
        return None if results is None else _converted(results, result_dtype)


def kernel(*arguments: Any) -> list[Tensor]:
    """The operator under autocast, in a graph that was made without it."""
    call, low = OpCall(*arguments), _dtype()
    with torch.autocast("cpu", enabled=False):
        tensors = call.x, *call.states, *call.weights
        if not all(tensor is None or _is_converted(tensor) for tensor in tensors):
            unchanged: list[Tensor] = torch.ops.fusedrnn.rnn(*call)
            return unchanged
        last_state = call.initial_states[-1]
        dtype = _result_dtype(call.mode, call.x.dtype, None if last_state is None else last_state.dtype, low)
        operands = [tensor if tensor is None else tensor.to(torch.float32) for tensor in call.differentiable]
        options = call.options._replace(compute=call.compute or OPERANDS.get(low))
        call = OpCall.of(operands, call.others, options)
        return [result.to(dtype) for result in torch.ops.fusedrnn.rnn(*call)]


def _runner(run: Any) -> Any:
    return eager.run_under_autocast if run is eager.run else run


def _is_converted(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in _FLOATS and tensor.device.type == "cpu"


def _mode(module: Any) -> str:
    if not isinstance(module, RNNCellBase):
        mode: str = module.mode
        return mode.lower()
    return f"{module._mode}_cell"


def _result_dtype(mode: str, dtype: torch.dtype, state_dtype: torch.dtype | None, low: torch.dtype) -> torch.dtype:
    """The dtype that torch.nn's operations give for an input and a last initial state (None: zeros like the input).

    Their products have the dtype ``low`` of autocast. A GRU and an LSTM then add states, which have kept their own
    dtype; but a whole LSTM may be one function of oneDNN, whose results are ``low``. A user cell is assumed to add
    states.
    """
    is_written_by_user = ":" in mode
    if not is_written_by_user and (mode.startswith("rnn") or (mode == "lstm" and _is_function_of_onednn(dtype))):
        return low
    return torch.promote_types(dtype if state_dtype is None else state_dtype, low)


def _is_function_of_onednn(dtype: torch.dtype) -> bool:
    """Whether torch.nn's LSTM is such a function for that dtype; in half precision it needs the instructions."""
    if dtype is torch.float32:
        return True
    if dtype is torch.float16 and torch.is_grad_enabled():
        return False
    supports = f"_is_mkldnn_{'fp16' if dtype is torch.float16 else 'bf16'}_supported"
    return bool(getattr(torch.ops.mkldnn, supports)())


def _converted(results: Any, dtype: torch.dtype) -> Any:
    if isinstance(results, PackedSequence):
        return PackedSequence(results.data.to(dtype), *results[1:])
    if isinstance(results, tuple):
        return tuple([_converted(result, dtype) for result in results])
    return results.to(dtype)
