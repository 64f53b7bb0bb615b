"""``accelerate`` and ``restore``: change the class of the layers of an existing model, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module, RNNBase, RNNCellBase

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.class_map import OURS, TORCHS, Classes, counterpart, forget, is_quantized, is_scripted
from fusedrnn.torch.eligibility import MODULE_DTYPES
from fusedrnn.torch.formats import HasCompute, checked_compute, is_inference_only, unfreeze
from fusedrnn.torch.graphs import is_ours, recurrent_operators
from fusedrnn.torch.subclasses import beneath, changes

_SUBCLASS = "it is a subclass of"
# How deep to look for modules: in attributes, and in attributes of attributes. Deeper modules seldom belong to the
# object.
_DEPTH = 2
_MAX_NAMED = 4
_DTYPES = ", ".join(map(str, MODULE_DTYPES))
_INSTANTIATE = ", a class: give a module of it, or build it within `with fusedrnn.torch.accelerated():`"
_NOT_YET = (
    ", which holds no module yet; if it builds its network later, as in fit() or load(), let it do so "
    "within `with fusedrnn.torch.accelerated():`"
)


def accelerate(model: Module, *, subclasses: bool = False, compute: str | None = None) -> Report:
    """Make every recurrent layer of a model run on the fused operator, in place.

    Layers and cells of torch.nn's six classes become ours by a change of their class: the modules, their parameters,
    hooks and parametrizations stay the same objects. Subclasses and layers that the operator does not support stay
    unchanged; the report gives the reason. A second call changes nothing.

    Args:
        model: Any module; it may be a recurrent layer itself.
        subclasses: Whether to accelerate subclasses of torch.nn's classes too. They keep their own code, whose
            ``super().forward`` then calls ours. Subclasses that override more than ``forward`` stay unchanged.
        compute: The format of GEMM operands, as in :class:`fusedrnn.RNNSpec`, for all layers, including those that are
            ours already. None leaves the format of each layer unchanged.

    Returns:
        What was replaced or given another format, and what was left unchanged.

    Raises:
        TypeError: If ``model`` is no torch.nn.Module; the message says which of its attributes are modules.
        ValueError: If there is no such format.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.LSTM(8, 16))
        >>> print(accelerate(model))
        1 replaced, 0 unchanged
          replaced   1: LSTM
    """
    return convert_all(model, OURS, subclasses, checked_compute(compute))


def restore(model: Module) -> Report:
    """Undo :func:`accelerate` and :func:`quantize`: turn our layers of a model into torch.nn's again, in place.

    Parameters that required a gradient before :func:`quantize` require it again. The mode, training or evaluation, does
    not change.

    Args:
        model: Any module; layers from our own constructors become torch.nn's as well.

    Returns:
        What was replaced. Subclasses of our layers stay unchanged.

    Raises:
        TypeError: If ``model`` is no torch.nn.Module.
    """
    return convert_all(model, TORCHS)


def convert_all(model: Module, classes: Classes, subclasses: bool = False, compute: str | None = None) -> Report:
    """Convert every recurrent layer of a model, in place: see :func:`accelerate` and :func:`restore`."""
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}{_advice(model)}")
    modules = list(model.named_modules())
    return Report.of(convert(module, classes, subclasses, name, compute) for name, module in modules)


def convert(
    module: Module, classes: Classes = OURS, subclasses: bool = False, name: str = "", compute: str | None = None
) -> LayerReport | None:
    """Convert one module by ``classes``: :data:`OURS` or :data:`TORCHS`. None if it is not a layer to convert."""
    former = type(module)
    if isinstance(module, HasCompute) and classes is OURS:
        return None if compute in (None, module.compute) else _set_compute(module, compute, name)
    if isinstance(module, HasCompute) and not isinstance(module, (RNNBase, RNNCellBase)):
        return _restored(module, name)
    cls, reason = counterpart(former, classes), ""
    if cls is None:
        reason = _why_unknown(module, classes)
        if reason.startswith(_SUBCLASS) and classes is OURS:
            cls, reason = _accelerated_subclass(module, reason, subclasses)
    if cls is not None and classes is OURS:
        reason = _why_unsupported(module, compute)
    if cls is not None and not reason:
        try:
            module.__class__ = cls
        except TypeError as error:  # for example in a subclass with slots
            reason = f"its class cannot be changed: {error}"
        else:
            unfreeze(module)
            forget(module)
            if compute is not None:
                module.compute = compute  # type: ignore[assignment]
    return LayerReport(name, former.__name__, reason) if reason or cls is not None else None


def _set_compute(module: HasCompute, compute: str | None, name: str) -> LayerReport:
    reason = _why_unsupported(module, compute)
    if not reason:
        module.compute = compute
        if not is_inference_only(compute):
            unfreeze(module)
    return LayerReport(name, type(module).__name__, reason)


def _restored(module: HasCompute, name: str) -> LayerReport:
    """The report for a layer of ours that torch.nn does not have: only its format can be undone."""
    forget(module)
    unfreeze(module)
    return LayerReport(name, type(module).__name__, "torch.nn has no such layer")


def _accelerated_subclass(module: Module, reason: str, subclasses: bool) -> tuple[type[Module] | None, str]:
    """The class that puts ours beneath a subclass, if enabled and possible; else None and the reason."""
    changed = changes(module)
    if changed:
        return None, f"{reason} that {changed}"
    if not subclasses:
        return None, f"{reason}; subclasses=True puts ours beneath its code"
    try:
        return beneath(type(module)), ""
    except Exception as error:  # its metaclass is the user's code, and may raise anything
        return None, f"{reason} that cannot be derived from: {type(error).__name__}: {error}"


def _why_unsupported(module: Module, compute: str | None) -> str:
    """Why the operator does not support a layer of a known class; empty if it does."""
    if "compute" in vars(module) and not isinstance(module, HasCompute):
        return "it has an attribute compute, which is one of ours"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes <= MODULE_DTYPES.keys():
        return f"its parameters are {', '.join(sorted(map(str, dtypes)))}; ours are {_DTYPES}"
    if len(dtypes) > 1:
        return f"its parameters are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if compute is not None and torch.float64 in dtypes:
        return f"its parameters are torch.float64, which compute={compute!r} does not take"
    return "" if compute is None else _why_no_format(module, compute)


def _why_no_format(module: Any, compute: str) -> str:
    """Why a layer of these sizes cannot run in a format; empty if it can."""
    try:
        if not isinstance(module, (RNNBase, RNNCellBase)):  # a Layer
            replace(module.spec, compute=compute)
        else:  # the limits of a format are of the sizes alone, and LSTMs have them all
            RNNSpec(
                "lstm", module.input_size, module.hidden_size, bidirectional=getattr(module, "bidirectional", False),
                projection_size=getattr(module, "proj_size", 0) or None, compute=compute,
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _why_unknown(module: Module, classes: Classes) -> str:
    """Why a recurrent layer's class has no counterpart; empty if it is not recurrent or is converted already."""
    if is_scripted(module):
        return "it is a ScriptModule, whose weights fusedrnn.torch.read reads"
    operators = [operator for operator in recurrent_operators(module) if not is_ours(operator)]
    if operators:
        return f"its graph runs {', '.join(operators)}, not a layer"
    if isinstance(module, torch.jit.ScriptModule):
        return ""
    if is_quantized(module):
        return "it is quantized"
    cls = type(module)
    if not isinstance(module, (RNNBase, RNNCellBase)) or counterpart(cls, TORCHS if classes is OURS else OURS):
        return ""
    parent = next(base for base in cls.__mro__ if base.__module__.startswith(("torch.nn.modules.", "fusedrnn.torch")))
    return f"{_SUBCLASS} {parent.__name__}"


def _advice(holder: object) -> str:
    """The end of an error message: what to pass instead of an object that is no module but may hold modules."""
    if isinstance(holder, type):
        return _INSTANTIATE if issubclass(holder, Module) else ""
    if holder is None or isinstance(holder, (str, bytes, int, float)):
        return ""
    paths = list(_module_paths("model", holder, _DEPTH, set()))
    if not paths:
        return _NOT_YET
    more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
    return f", which holds modules: give {', '.join(paths[:_MAX_NAMED])}{more}"


def _module_paths(path: str, holder: object, depth: int, seen: set[int]) -> Iterator[str]:
    """Expressions for the modules in an object, the nearest first, without modules inside of modules."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    children = _children(path, holder)
    yield from (child_path for child_path, child in children if isinstance(child, Module))
    if depth > 1:
        for child_path, child in children:
            if not isinstance(child, Module):
                yield from _module_paths(child_path, child, depth - 1, seen)


def _children(path: str, holder: Any) -> list[tuple[str, object]]:
    if isinstance(holder, Mapping):
        return [(f"{path}[{key!r}]", value) for key, value in holder.items()]
    if isinstance(holder, (list, tuple)):
        return [(f"{path}[{index}]", value) for index, value in enumerate(holder)]
    attributes = getattr(holder, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(holder, type):
        return []
    return [(f"{path}.{name}", value) for name, value in attributes.items()]
