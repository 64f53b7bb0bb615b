"""Patches of PyTorch's tools that identify classes or operators by name: the FLOP counter, pruning, TorchScript."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.nn import Module

from fusedrnn.spec import RNNSpec
from fusedrnn.torch.cell_references import cell_of
from fusedrnn.torch.class_map import OURS, TORCHS, as_torch_module, counterpart
from fusedrnn.torch.imports import after_import
from fusedrnn.torch.op_backward_call import split_backward
from fusedrnn.torch.saved_operands import saved_operands

Shape = Sequence[int]


def register() -> None:
    """Patch each tool as soon as it is imported. A tool that differs in this version of torch stays unchanged."""
    after_import("torch.utils.flop_counter", _register_flops)
    after_import("torch.ao.pruning._experimental.pruner.base_structured_sparsifier", _add_to_pruner)
    _convert_inside_script_modules()


# -- torch.utils.flop_counter -----------------------------------------------------------------------------------------


def _register_flops(counter: Any) -> None:
    operators: Any = torch.ops.fusedrnn
    counter.register_flop_formula([operators.rnn, operators.forward_training])(_forward_flops)
    counter.register_flop_formula(operators.backward)(_backward_flops)


def _forward_flops(x: Shape, h0: object, c0: object, weights: Sequence[Shape | None], *_: object, **__: object) -> int:
    """The FLOPs of torch.nn's own operations: a product of every step with every matrix."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if shape is not None and len(shape) == 2)


def _backward_flops(*arguments: Any, **_: object) -> int:
    """The FLOPs of torch.nn's own operations: for each product of forward, one per factor that needs a gradient."""
    backward = split_backward(arguments)
    call: Any = backward.call  # it holds shapes instead of tensors
    x, batch_sizes = call.x, call.batch_sizes
    spec = RNNSpec(
        cell_of(call.mode), x[-1], call.hidden_size, call.num_layers, call.bidirectional,
        projection_size=call.projection_size or None,
    )  # fmt: skip
    num_states = len(spec.state_names)
    needs_grad = call.grads_needed(backward.needed)
    steps = x[0] if batch_sizes is None else batch_sizes[0]
    # A matrix is saved if its other factor needs a gradient.
    factors_need_grad = saved_operands(spec, needs_grad, steps > 1)
    rows, total = prod(x[:-1]), 0
    # For an initial state that needs no gradient, the first step has no product. In a packed sequence, shapes do not
    # tell how many rows the first step has, so it is counted.
    first_step = x[1] if batch_sizes is None and not needs_grad[1] else 0
    kinds = spec.layout.kinds * (spec.num_layers * spec.num_directions)
    for index, (shape, kind) in enumerate(zip(call.weights, kinds, strict=True), 1 + num_states):
        if shape is not None and len(shape) == 2:
            skipped = first_step if kind == "h2h_weight" else 0
            total += 2 * prod(shape) * (rows * needs_grad[index] + (rows - skipped) * factors_need_grad[index])
    return total


# -- torch.ao.pruning -------------------------------------------------------------------------------------------------


def _add_to_pruner(pruner: Any) -> None:
    """Add our layers to the default tables of structured pruning, which finds layers by their exact class."""
    torch_patterns = getattr(pruner, "_get_default_structured_pruning_patterns", None)
    torch_modules = getattr(pruner, "_get_supported_structured_pruning_modules", None)
    if torch_patterns is None or torch_modules is None:
        return

    def patterns() -> dict[Any, Any]:
        table = torch_patterns()
        return {**table, **{tuple(OURS.get(part, part) for part in pattern): prune for pattern, prune in table.items()}}

    def modules() -> set[type]:
        supported = torch_modules()
        return {*supported, *(OURS[cls] for cls in supported if cls in OURS)}

    pruner._get_default_structured_pruning_patterns = patterns
    pruner._get_supported_structured_pruning_modules = modules


# -- torch.jit --------------------------------------------------------------------------------------------------------


def _convert_inside_script_modules() -> None:
    """Compile our layers inside a subclass of ``torch.jit.ScriptModule`` as torch.nn's layers.

    ``torch.jit.script`` asks each module what to compile in its place. The constructor of a subclass of ScriptModule
    compiles its submodules without asking, so we replace ours before that.
    """
    recursive: Any = getattr(torch.jit, "_recursive", None)
    create = getattr(recursive, "create_script_module", None)
    if create is None:
        return

    @functools.wraps(create)
    def create_script_module(nn_module: Module, stubs_fn: Any, *args: Any, **options: Any) -> Any:
        if isinstance(nn_module, torch.jit.ScriptModule):  # traced modules stay unchanged
            _replace_ours(nn_module)
        return create(nn_module, stubs_fn, *args, **options)

    recursive.create_script_module = create_script_module


def _replace_ours(parent: Module) -> None:
    """Replace each of our modules inside a module by torch.nn's; a module that is used twice stays one module."""
    replacements: dict[Module, Module] = {}
    for module in list(parent.modules()):
        for name, child in module._modules.items():
            if child is not None and counterpart(type(child), TORCHS) is not None:
                if child not in replacements:
                    replacements[child] = as_torch_module(child)
                module._modules[name] = replacements[child]
