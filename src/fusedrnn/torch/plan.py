"""The spec that a module's attributes describe, and its weights and initial states at the time of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fusedrnn.cell.user_cell import UserCell
from fusedrnn.engines.cpu.tiling import unsupported_heads
from fusedrnn.layout import BIASES
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.cell_references import cell_of, reference_to
from fusedrnn.torch.eligibility import MODULE_DTYPES, is_compiling, is_plain
from fusedrnn.torch.formats import checked_compute, no_dropout
from fusedrnn.torch.low_precision import OPERANDS


class ModulePlan(NamedTuple):
    """How the operator runs a module. It depends only on the module's attributes.

    Attributes:
        spec: The network in inference.
        training_spec: The network in training, with dropout and random masks; None if the operator cannot apply this
            dropout, or ``compute`` does not allow any.
        state_rows: Leading dimensions of a state: (L·D,) for a layer, () for a cell.
        state_sizes: Features of each state, h first.
        names: Names of the parameters in torch.nn's order, the order of a layer's ``_flat_weights``.
        shapes: The shapes of these parameters.
        expected: The properties that :func:`_are_ordinary` compares, for ordinary parameters.
        order: For each parameter of the operator, its index in ``names``, or None for a missing bias. None instead of
            the tuple if the operator has the same parameters in the same order.
        is_cell: Whether the module is a cell.
        has_flat_weights: Whether the module has torch.nn's ``_flat_weights``.
        training_error: The error of a call in training mode; None if there is none. Dynamo reads it in a graph.
        has_kernels: Whether the operator runs it; it has no kernels for heads of some sizes.
    """

    spec: RNNSpec
    training_spec: RNNSpec | None
    state_rows: tuple[int, ...]
    state_sizes: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    expected: list[tuple[Any, ...]]
    order: tuple[int | None, ...] | None
    is_cell: bool = False
    has_flat_weights: bool = True
    training_error: str | None = None
    has_kernels: bool = True


@lru_cache(maxsize=256)
def _layer_plan(
    mode: str, I: int, H: int, layers: int, bidirectional: bool, bias: bool, dropout_ratio: Any, dtype: torch.dtype,
    P: int = 0, compute: str | None = None, residual: str | None = None, input_dropout_ratio: Any = (0, 1),
) -> ModulePlan | None:  # fmt: skip
    compute = checked_compute(compute or OPERANDS.get(dtype), MODULE_DTYPES[dtype])
    try:
        spec = RNNSpec(
            cell_of(mode if ":" in mode else mode.lower()), I, H, layers, bool(bidirectional),
            projection_size=P or None, dtype=MODULE_DTYPES[dtype], compute=compute, residual=residual,
        )  # fmt: skip
        training_spec: RNNSpec | None = spec
        dropout, input_dropout = map(_of_ratio, (dropout_ratio, input_dropout_ratio))
        dropout = dropout if layers > 1 else 0.0
        if dropout > 0 or input_dropout > 0:
            can_drop = dropout < 1 and spec.is_trainable
            training_spec = replace(spec, dropout=dropout, input_dropout=input_dropout) if can_drop else None
        if isinstance(spec.mode, UserCell):
            spec = replace(spec, mode=spec.mode.expectation)
            reference_to(spec.mode)
        # Computed now: Dynamo can read cached properties, but it cannot trace a cell to compute them.
        for each in (spec, training_spec):
            _ = each and (each.drops, each.state_names)
    except (TypeError, ValueError):  # a user has changed the attributes; PyTorch raises the right error
        return None
    ours = spec.layout.by_layer_direction
    # In each direction, torch.nn lists the projection after the biases, the operator lists it before them.
    torchs = sorted(ours, key=lambda entry: (entry.layer, entry.direction, entry.kind == "h2r_weight"))
    torchs = [entry for entry in torchs if bias or entry.kind not in BIASES]
    names, shapes = tuple(entry.torch_name for entry in torchs), tuple(entry.shape for entry in torchs)
    index = {name: i for i, name in enumerate(names)}
    order = tuple(index.get(entry.torch_name) for entry in ours)
    return ModulePlan(
        spec, training_spec, (layers * spec.num_directions,), tuple(map(spec.size_of, spec.state_names)), names, shapes,
        [(Parameter, dtype, torch.Size(shape), True, False, torch.strided, False) for shape in shapes],
        None if order == tuple(range(len(names))) else order,
        training_error=None if training_spec is not None or spec.is_trainable else no_dropout(spec.compute),
        has_kernels=unsupported_heads(spec) is None,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _cell_plan(
    mode: str, I: int, H: int, bias: bool, dtype: torch.dtype, compute: str | None = None
) -> ModulePlan | None:
    plan = _layer_plan(mode, I, H, 1, False, bias, (0, 1), dtype, compute=compute)
    names = () if plan is None else tuple(name.removesuffix("_l0") for name in plan.names)
    return plan and plan._replace(names=names, state_rows=(), is_cell=True, has_flat_weights=False)


@lru_cache(maxsize=256)
def _user_layer_plan(*attributes: Any) -> ModulePlan | None:
    plan = _layer_plan(*attributes)
    return plan and plan._replace(has_flat_weights=False)


# Dynamo cannot trace caches. It treats the results of these functions as constants (see dynamo.py). Then it can read
# their fields, but it cannot call their methods.
def layer_plan(*attributes: Any) -> ModulePlan | None:
    """The plan of a layer with these attributes, as :func:`_layer_plan` lists them; None if it is not supported."""
    return _layer_plan(*attributes)


def user_layer_plan(*attributes: Any) -> ModulePlan | None:
    """The plan of a layer of any cell. Such a layer is no subclass of torch.nn's."""
    return _user_layer_plan(*attributes)


def cell_plan(*attributes: Any) -> ModulePlan | None:
    """The plan of a cell: a network of one layer, whose parameters have shorter names."""
    return _cell_plan(*attributes)


def as_ratio(rate: Any) -> Any:
    """A module's float as the ratio of two integers, for plans. Dynamo may make a float symbolic, but not its ratio.

    A value that is no probability is returned unchanged.
    """
    return rate.as_integer_ratio() if isinstance(rate, (int, float)) and 0 <= rate <= 1 else rate


def _of_ratio(ratio: Any) -> Any:
    return ratio[0] / ratio[1] if isinstance(ratio, tuple) else ratio


def spec_of(plan: ModulePlan, training: bool) -> RNNSpec | None:
    """The spec that a layer runs in this mode; None if the operator does not support it.

    Raises:
        RuntimeError: In training with dropout, if ``compute`` is for inference only.
    """
    if not training:
        return plan.spec
    if plan.training_error is not None:
        raise RuntimeError(plan.training_error)
    return plan.training_spec


def initial_states(
    hx: Any, plan: ModulePlan, batch: tuple[int, ...], dtype: torch.dtype, reset_states: tuple[Any, ...] | None = None
) -> tuple[Any, ...] | None:
    """``hx`` and the states after resets as one tuple of states; None if the operator does not accept them."""
    sizes = plan.state_sizes
    if len(sizes) == 1:
        states: tuple[Any, ...] = (hx,)
    elif isinstance(hx, (tuple, list)) and len(hx) == len(sizes):
        states = tuple(hx)
    else:
        return None
    if reset_states is not None:
        states, sizes = states + reset_states, sizes * 2
    for state, size in zip(states, sizes, strict=True):
        if not is_plain(state, dtype) or state.shape != (*plan.state_rows, *batch, size):
            return None
    return states


def current_weights(module: Module, plan: ModulePlan, dtype: torch.dtype) -> list[Tensor | None] | None:
    """The weights that torch.nn's forward would use now, in the operator's order; None if one is not supported.

    Parametrizations, weight_norm and functional_call replace a parameter; other tools replace ``_flat_weights``. The
    call uses the replacement, and gradients flow through it.
    """
    parameters = module._parameters
    weights: list[Any] = [parameters.get(name) for name in plan.names]
    if (
        is_compiling()
        or not _are_ordinary(weights, plan.expected)
        or (plan.has_flat_weights and not _are_flat_weights(module, weights))
    ):
        weights = [
            getattr(module, name, None) if weight is None else weight
            for name, weight in zip(plan.names, weights, strict=True)
        ]
        if plan.has_flat_weights and not is_compiling():
            weights = _flat_or_named(module, weights)
        for weight, shape in zip(weights, plan.shapes, strict=True):
            if not is_plain(weight, dtype) or weight.shape != shape:
                return None
    return in_operator_order(plan, weights)


def in_operator_order(plan: ModulePlan, values: Sequence[Any]) -> list[Any]:
    """Values for ``plan.names`` as values for the operator's parameters, None for a missing bias."""
    return [*values] if plan.order is None else [None if i is None else values[i] for i in plan.order]


def _are_ordinary(weights: list[Any], expected: list[tuple[Any, ...]]) -> bool:
    """Whether all are parameters in plain memory. This is a single comparison, which is enough for most calls."""
    try:
        return [
            (type(w), w.dtype, w.shape, w.is_cpu, w.is_neg(), w.layout, w._is_zerotensor()) for w in weights
        ] == expected
    except (AttributeError, RuntimeError):  # one is None, or its class does not support these attributes
        return False


def _are_flat_weights(module: Any, weights: list[Any]) -> bool:
    """Whether ``_flat_weights``, which torch.nn's forward reads, holds these same objects."""
    flat = module._flat_weights
    return len(flat) == len(weights) and all(map(is_, flat, weights))


def _flat_or_named(module: Any, weights: list[Any]) -> list[Any]:
    """The weights by name if one was replaced since ``_flat_weights`` was built, else ``_flat_weights``."""
    flat = module._flat_weights
    if len(flat) != len(weights):
        return weights
    for ref, weight in zip(module._flat_weight_refs or (), weights, strict=False):
        if ref is not None and weight is not None and ref() is not weight:
            return weights
    return list(flat)
