"""The layers of a model that is there already, turned into ours and back in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn import Module, RNNBase, RNNCellBase

import torch
from fusedrnn.torch import holders
from fusedrnn.torch import subclasses as subclass_layers
from fusedrnn.torch.class_map import OURS, TORCHS, counterpart
from fusedrnn.torch.graphs import is_ours, recurrent_operators
from fusedrnn.torch.support import DTYPES

_SUBCLASS = "it is a subclass of"


@dataclass(frozen=True)
class Layer:
    """A recurrent layer of a model: its name there (empty: the model itself), its class, why it was left alone."""

    name: str
    kind: str
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'}: {self.kind}"
        return f"{text}, {self.reason}" if self.reason else text


@dataclass(frozen=True)
class Report:
    """What became of a model's recurrent layers. True if any was replaced; its length is how many were."""

    replaced: tuple[Layer, ...] = ()
    left: tuple[Layer, ...] = ()

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left as they were"]
        lines += [f"  replaced  {layer}" for layer in self.replaced]
        lines += [f"  left      {layer}" for layer in self.left]
        return "\n".join(lines)


def accelerate(model: Module, *, subclasses: bool = False) -> Report:
    """Make every recurrent layer of a model run on the fused operator, in place.

    Layers and cells of torch.nn's own six classes become ours by changing their class: the modules, their
    parameters, hooks and parametrizations stay the same objects. Subclasses and layers that the operator does not
    serve stay as they are; the report says why. A second call changes nothing.

    Args:
        model: Any module; it may be a recurrent layer itself.
        subclasses: Whether to put ours beneath subclasses of torch.nn's, too, whose own code stays: their ``forward``
            calls ours by ``super().forward``. Those that override more than that are left.

    Returns:
        What was replaced and what was left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module; the message says which of its attributes are.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.LSTM(8, 16))
        >>> print(accelerate(model))
        1 replaced, 0 left as they were
          replaced  1: LSTM
    """
    return _swap(model, OURS, subclasses)


def restore(model: Module) -> Report:
    """Make every layer of ours in a model torch.nn's again, in place: what :func:`accelerate` did is undone.

    Args:
        model: Any module; layers made by our own constructors become torch.nn's as well.

    Returns:
        What was replaced; subclasses of ours are left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _swap(model, TORCHS)


def convert(module: Module, subclasses: bool = False) -> None:
    """Make one layer of torch.nn's ours, if the operator serves it; any other module stays as it is."""
    _swap_one("", module, OURS, subclasses)


def _swap(model: Module, pairs: Mapping[type[Module], type[Module]], subclasses: bool = False) -> Report:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}{holders.advice(model)}")
    replaced: list[Layer] = []
    left: list[Layer] = []
    for name, module in model.named_modules():
        layer = _swap_one(name, module, pairs, subclasses)
        if layer is not None:
            (left if layer.reason else replaced).append(layer)
    return Report(tuple(replaced), tuple(left))


def _swap_one(
    name: str, module: Module, pairs: Mapping[type[Module], type[Module]], subclasses: bool
) -> Layer | None:
    """What became of one module, with the reason if it was left; None if it is no layer for the other side."""
    former = type(module)
    kind, reason = counterpart(former, pairs), ""
    if kind is None:
        reason = _stranger(module, pairs)
        if reason.startswith(_SUBCLASS) and pairs is OURS:
            kind, reason = _subclass(module, reason, subclasses)
    if kind is not None and pairs is OURS:
        reason = _reason(module)
    if kind is not None and not reason:
        try:
            module.__class__ = kind
        except TypeError as error:  # of a subclass with slots, say
            reason = f"its class cannot be changed: {error}"
    return Layer(name, former.__name__, reason) if reason or kind is not None else None


def _subclass(module: Module, reason: str, wanted: bool) -> tuple[type[Module] | None, str]:
    """The class with ours beneath a subclass, if that is wanted and leaves the arithmetic alone; else why not."""
    changes = subclass_layers.changes(module)
    if changes:
        return None, f"{reason} that {changes}"
    if not wanted:
        return None, f"{reason}; subclasses=True puts ours beneath its code"
    try:
        return subclass_layers.beneath(type(module)), ""
    except Exception as error:  # its metaclass is the user's code, and may raise anything
        return None, f"{reason} that cannot be derived from: {type(error).__name__}: {error}"


def _reason(module: Module) -> str:
    """Why a layer of a class that we have is not for the operator; empty if it is."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes <= set(DTYPES):
        return f"its parameters are {', '.join(sorted(map(str, dtypes)))}; ours are torch.float32 or torch.float64"
    if len(dtypes) > 1:
        return f"its parameters are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return ""


def _stranger(module: Module, pairs: Mapping[type[Module], type[Module]]) -> str:
    """What a recurrent layer of another class is, if it is one and not on the side that is asked for."""
    kind, names = type(module), {torchs.__name__ for torchs in OURS}
    is_scripted = isinstance(module, torch.jit.ScriptModule)
    if is_scripted and getattr(module, "original_name", "") in names:
        return "it is a ScriptModule, whose weights fusedrnn.torch.read reads"
    operators = [operator for operator in recurrent_operators(module) if not is_ours(operator)]
    if operators:
        return f"its graph runs {', '.join(operators)}, not a layer"
    if is_scripted:
        return ""
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in names:
        return "it is quantized"
    if not isinstance(module, (RNNBase, RNNCellBase)) or counterpart(kind, TORCHS if pairs is OURS else OURS):
        return ""
    known = next(base for base in kind.__mro__ if base.__module__.startswith(("torch.nn.modules.", "fusedrnn.torch")))
    return f"{_SUBCLASS} {known.__name__}"
