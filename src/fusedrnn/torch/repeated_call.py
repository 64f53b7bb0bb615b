"""Repeated calls of a module: a few comparisons recognize a call like the previous one, without all the checks.

A call of one step takes a few microseconds in machine code. Determining again what a module runs, and on which tensors,
takes many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.torch import autocast, dispatch, eager
from fusedrnn.torch.eligibility import DTYPE_NAMES, is_compiling
from fusedrnn.torch.guarded_call import GuardedCall, as_tuple
from fusedrnn.torch.network import CallShape, Network, Results
from fusedrnn.torch.plan import ModulePlan, current_weights, in_operator_order, spec_of

# Bound once: attribute lookups are a large part of a call of one step.
_is_grad_enabled = torch.is_grad_enabled
_dispatch_keys = torch._C._dispatch_keys
_Proxy = torch.fx.Proxy


class RepeatsCalls(Module):
    """Base of our modules, which recognizes calls like the previous one."""

    _last_call: LastCall | None = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A prepared call would keep the old parameters until the next call.
        self.__dict__.pop("_last_call", None)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__.pop("_last_call", None)
        super()._load_from_state_dict(*args)

    def _repeat_call(self, x: Any, hx: Any) -> Any:
        """What forward returns, if this call is like the last one; else None."""
        if is_compiling() or self._last_call is None:
            return None
        call = self._last_call.prepared
        if call is None or (call.batch_first is not None and self.batch_first is not call.batch_first):
            return None
        result = None if call.guarded is None else call.guarded(self, x, hx)
        if result is None and call.matches(self, x, hx):
            result = self._run_repeated(call.run, x, as_tuple(hx) or None)
        return result

    def _run_repeated(self, run: Callable[..., Results], x: Any, states: tuple[Any, ...] | None) -> Any:
        """What forward returns; calls ``run`` on the operator's input and states."""
        raise NotImplementedError

    def _note_call(self, run: Any, x: Any, hx: Any) -> None:
        """Record a call by ``run`` without autocast. If it is like the previous call, prepare it to be repeated.

        So calls whose shapes change every time are never prepared.
        """
        if run is not eager.run:
            return
        parameter = next(iter(self._parameters.values()), None)
        address = None if parameter is None else parameter.data_ptr()
        states = [_described(state) for state in as_tuple(hx)]
        last, this = self._last_call, LastCall((_description(x), states, address, self.training, _is_grad_enabled()))
        if last is not None and last.description == this.description:
            this.prepared = RepeatedCall.of(self, x, hx)
        self.__dict__["_last_call"] = this


class LastCall:
    """The last call of a module.

    Attributes:
        description: The description of what the call depends on.
        prepared: The call, prepared to be repeated; None if it was the first of its kind, or cannot be recognized.
    """

    __slots__ = "description", "prepared"

    def __init__(self, description: Any) -> None:
        self.description = description
        self.prepared: RepeatedCall | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Drop the call, so that a copy or pickle of a module has none."""
        return type(None), ()


class RepeatedCall:
    """What a module's call depends on, and what it runs. It never changes, so any number of threads may use it.

    Args:
        module: A layer or cell.
        plan: Its plan.
        x: Its input, in plain tensors outside of any tracing.
        hx: Its initial states, None for zeros.
        parameters: Its parameters in torch.nn's order.
        weights: The same parameters in the operator's order, with None for missing biases.

    Attributes:
        batch_first: The layer's ``batch_first``; None for a cell.
        guarded: The same call with checks in machine code, which take less time; None if there is none.
    """

    __slots__ = (
        "_executor_weights", "_has_c", "_input", "_is_grad_enabled", "_is_recorded", "_memory", "_parameters", "_plan",
        "_shape", "_states", "_training", "_weights", "batch_first", "guarded",
    )  # fmt: skip

    def __init__(
        self, module: Any, plan: ModulePlan, x: Any, hx: Any, parameters: list[Parameter], weights: list[Tensor | None]
    ) -> None:
        self._plan, self._training, self._is_grad_enabled = plan, module.training, _is_grad_enabled()
        self._has_c = len(plan.state_sizes) > 1
        self.batch_first = None if plan.is_cell else module.batch_first
        self._input, self._states = _description(x), self._described_states(hx)
        self._parameters, self._weights = parameters, weights
        self._memory = _described_memory(parameters)
        spec = spec_of(plan, module.training)
        assert spec is not None
        network = Network.of(spec)
        data, batch_sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
        if not plan.is_cell and batch_sizes is None:
            data = data.unsqueeze(1) if data.dim() == 2 else data.transpose(0, 1) if module.batch_first else data
        states = as_tuple(hx) or None
        self._shape = shape = CallShape(network, data, None, batch_sizes, plan.is_cell)
        self._is_recorded = is_recorded = self._is_grad_enabled and eager.require_grad(data, states, weights)
        addresses = tuple([0 if weight is None else weight.data_ptr() for weight in weights])
        is_short = network.executor.is_short(shape.steps, shape.batch, network.drops or is_recorded)
        self._executor_weights = network.executor.weights_at(addresses) if is_short else None
        self.guarded: GuardedCall | None = None
        if not network.drops:
            guarded = GuardedCall(module, plan, shape, x, states, weights, is_recorded)
            self.guarded = guarded if guarded.is_possible else None

    @classmethod
    def of(cls, module: Any, x: Any, hx: Any) -> RepeatedCall | None:
        """A call that has just run; None if the next call needs all checks since the weights are not the parameters."""
        data = x.data if isinstance(x, PackedSequence) else x
        plan = module._plan(data.dtype)
        parameters = [module._parameters.get(name) for name in plan.names]
        tensors = [data, *as_tuple(hx)]
        if (
            data.dtype not in DTYPE_NAMES
            or not all(type(tensor) in (Tensor, Parameter) for tensor in tensors)
            or not all(type(parameter) is Parameter and parameter.is_contiguous() for parameter in parameters)
        ):
            return None
        # This comes last, because reading a parametrized weight computes it.
        weights = current_weights(module, plan, data.dtype)
        if weights is None or not all(map(is_, weights, in_operator_order(plan, parameters))):
            return None
        return cls(module, plan, x, hx, parameters, weights)

    def matches(self, module: Any, x: Any, hx: Any) -> bool:
        """Whether a call of the module is like this one."""
        try:
            return (
                module.training is self._training
                and _is_grad_enabled() is self._is_grad_enabled
                and dispatch.runner() is eager.run
                and not autocast.is_enabled()
                and _description(x) == self._input
                and self._described_states(hx) == self._states
                and module._plan(self._parameters[0].dtype) is self._plan
                and self._has_same_parameters(module)
            )
        except (AttributeError, RuntimeError, TypeError):  # something other than plain tensors
            return False

    def run(self, x: Tensor, states: Sequence[Tensor] | None) -> Results:
        """Run it on the input (T, N, I), on the input of a cell, or on the rows of a packed sequence."""
        return eager.run_shape(self._shape, x, states, self._weights, None, self._executor_weights, self._is_recorded)

    def _described_states(self, hx: Any) -> Any:
        if hx is None or not self._has_c:
            return None if hx is None else _described(hx)
        return isinstance(hx, (tuple, list)) and [_described(state) for state in hx]

    def _has_same_parameters(self, module: Any) -> bool:
        """Whether the module's parameters are the same objects in the same memory; their content may have changed."""
        parameters = self._parameters
        if not all(map(is_, map(module._parameters.get, self._plan.names), parameters)):
            return False
        if self._plan.has_flat_weights:
            flat = module._flat_weights
            if len(flat) != len(parameters) or not all(map(is_, flat, parameters)):
                return False
        return _described_memory(parameters) == self._memory


def _description(x: Any) -> Any:
    """The properties of an input on which a call depends, apart from its content."""
    if not isinstance(x, PackedSequence):
        return _described(x)
    data, batch_sizes, *indices = x
    sizes = batch_sizes.tolist() if type(batch_sizes) is Tensor and batch_sizes.dtype is torch.int64 else None
    return _described(data), sizes, [index if index is None else index.shape for index in indices]


def _described(tensor: Any) -> tuple[Any, ...]:
    if isinstance(tensor, _Proxy):
        return ()  # torch.fx would record these reads in its graph
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, _dispatch_keys(tensor)


def _described_memory(parameters: list[Parameter]) -> list[tuple[Any, ...]]:
    return [(w.data_ptr(), w.dtype, w.shape, w.is_contiguous(), w.is_neg(), w.requires_grad) for w in parameters]
