"""The layers of a model that is there already, turned into ours and back in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import Module, RNNBase, RNNCellBase

from fusedrnn.torch.pairs import OURS, TORCHS, counterpart
from fusedrnn.torch.support import DTYPES

_NAMES = {torchs.__name__ for torchs in OURS}


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


def accelerate(model: Module) -> Report:
    """Make every recurrent layer of a model run on the fused operator, in place.

    Layers and cells of torch.nn's own six classes become ours by changing their class: the modules, their
    parameters, hooks and parametrizations stay the same objects. Subclasses and layers that the operator does not
    serve stay as they are; the report says why. A second call changes nothing.

    Args:
        model: Any module; it may be a recurrent layer itself.

    Returns:
        What was replaced and what was left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.LSTM(8, 16))
        >>> print(accelerate(model))
        1 replaced, 0 left as they were
          replaced  1: LSTM
    """
    return _swap(model, OURS, _reason)


def restore(model: Module) -> Report:
    """Make every layer of ours in a model torch.nn's again, in place: what :func:`accelerate` did is undone.

    Args:
        model: Any module; layers made by our own constructors become torch.nn's as well.

    Returns:
        What was replaced; subclasses of ours are left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    return _swap(model, TORCHS, lambda _: "")


def _swap(model: Module, pairs: Mapping[type[Module], type[Module]], reason: Callable[[Module], str]) -> Report:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    replaced, left = [], []
    for name, module in model.named_modules():
        kind = counterpart(type(module), pairs)
        why = _stranger(module, pairs) if kind is None else reason(module)
        if why:
            left.append(Layer(name, type(module).__name__, why))
        elif kind is not None:
            replaced.append(Layer(name, type(module).__name__))
            module.__class__ = kind
    return Report(tuple(replaced), tuple(left))


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
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule" if getattr(module, "original_name", "") in _NAMES else ""
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "it is quantized"
    if not isinstance(module, (RNNBase, RNNCellBase)) or counterpart(kind, _inverse(pairs)):
        return ""
    known = next(base for base in kind.__mro__ if base.__module__.startswith(("torch.nn.", "fusedrnn.torch")))
    return f"it is a subclass of {known.__name__}"


def _inverse(pairs: Mapping[type[Module], type[Module]]) -> dict[type[Module], type[Module]]:
    return {there: here for here, there in pairs.items()}
