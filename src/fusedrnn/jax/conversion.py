"""``accelerate`` and ``restore``: change the class of the recurrent layers of a model of flax.nnx, in place."""

from __future__ import annotations

from typing import Any

from flax import nnx

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.jax.nnx import RNN, Bidirectional, refusal, refusal_of_pair

OURS: dict[type, type] = {nnx.RNN: RNN, nnx.Bidirectional: Bidirectional}
"""From flax's classes to ours."""
FLAXS = {ours: flaxs for flaxs, ours in OURS.items()}
"""From our classes to flax's."""


def accelerate(model: Any) -> Report:
    """Make every recurrent layer of a model of flax.nnx run on the fused operator, in place.

    Layers of the classes ``nnx.RNN`` and ``nnx.Bidirectional`` become ours by a change of their class. The layers,
    their cells, parameters and random state stay the same objects, so optimizers and checkpoints still work. Layers
    that the operator does not support stay unchanged; the report gives the reason. A second call changes nothing.

    Functions made by ``nnx.jit`` compile the model again at their next call. ``nnx.split`` gives a ``GraphDef`` of the
    new classes, and the same state as before.

    Args:
        model: A module of flax.nnx; it may be a recurrent layer itself.

    Returns:
        What was replaced, and what was left unchanged.

    Raises:
        TypeError: If ``model`` is no module of flax.nnx.

    Example:
        >>> from flax import nnx
        >>> from fusedrnn.jax import accelerate
        >>> rngs = nnx.Rngs(0)
        >>> print(accelerate(nnx.RNN(nnx.OptimizedLSTMCell(8, 16, rngs=rngs))))
        1 replaced, 0 unchanged
          replaced   (the model itself): RNN
    """
    return _convert_all(model, OURS)


def restore(model: Any) -> Report:
    """Undo :func:`accelerate`: turn our recurrent layers of a model into flax's again, in place.

    Args:
        model: A module of flax.nnx; layers from our own constructors become flax's as well.

    Returns:
        What was replaced. Subclasses of our layers stay unchanged.

    Raises:
        TypeError: If ``model`` is no module of flax.nnx.
    """
    return _convert_all(model, FLAXS)


def _convert_all(model: Any, classes: dict[type, type]) -> Report:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module; got {type(model).__name__}")
    # Sorted, because flax yields the parts of a module before the module. Keys of a path are names and indices.
    named = sorted(nnx.iter_modules(model), key=lambda item: [(isinstance(key, str), key) for key in item[0]])
    return Report.of(_convert(module, ".".join(map(str, path)), classes) for path, module in named)


def _convert(module: Any, name: str, classes: dict[type, type]) -> LayerReport | None:
    """Convert one module; None if it is not recurrent or converted already."""
    former = type(module)
    cls = classes.get(former)
    if cls is None:
        reason = _why_unknown(former, classes)
        return LayerReport(name, former.__name__, reason) if reason else None
    if classes is OURS:
        reason = refusal_of_pair(module) if former is nnx.Bidirectional else refusal(module)
        if reason:
            return LayerReport(name, former.__name__, reason)
    module.__class__ = cls
    return LayerReport(name, former.__name__)


def _why_unknown(cls: type, classes: dict[type, type]) -> str:
    """Why a recurrent layer's class has no counterpart; empty if it is not recurrent or is converted already."""
    if cls in classes.values() or not issubclass(cls, tuple(OURS)):
        return ""
    base = next(base for base in cls.__mro__ if base in OURS or base in FLAXS)
    return f"it is a subclass of {base.__name__}"
