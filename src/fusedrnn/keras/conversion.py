"""``accelerate`` and ``restore``: change the class of the recurrent layers of an existing Keras model, in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.keras import backends
from fusedrnn.keras.bidirectional import Bidirectional
from fusedrnn.keras.cell_spec import note, refusal
from fusedrnn.keras.layers import GRU, LSTM, RNN, SimpleRNN

OURS: dict[type, type] = {
    keras.layers.RNN: RNN,
    keras.layers.LSTM: LSTM,
    keras.layers.GRU: GRU,
    keras.layers.SimpleRNN: SimpleRNN,
    keras.layers.Bidirectional: Bidirectional,
}
"""From Keras's classes to ours."""
KERASS = {ours: theirs for theirs, ours in OURS.items()}
"""From our classes to Keras's."""


def accelerate(model: Any) -> Report:
    """Make every recurrent layer of a model run on the fused operator, in place.

    Layers of Keras's five classes become ours by a change of their class: the layers, their weights and the state of
    the optimizer stay the same objects. Other recurrent layers stay unchanged; the report gives the reason. Keras
    compiles the model's functions for ``fit``, ``evaluate`` and ``predict`` again at their next call. A second call
    changes nothing.

    Args:
        model: A Keras model or layer, which may be recurrent itself.

    Returns:
        What was replaced, with a note where some calls still run Keras's own loop, and what was left unchanged.

    Raises:
        TypeError: If ``model`` is no Keras layer.

    Example:
        >>> model = keras.Sequential([keras.Input((30, 5)), keras.layers.LSTM(16)])
        >>> print(accelerate(model))
        1 replaced, 0 unchanged
          replaced   lstm: LSTM
    """
    return _convert_all(model, OURS)


def restore(model: Any) -> Report:
    """Undo :func:`accelerate`: turn our recurrent layers of a model into Keras's again, in place.

    Args:
        model: A Keras model or layer; layers from our own constructors become Keras's as well.

    Returns:
        What was replaced. Subclasses of our layers stay unchanged.

    Raises:
        TypeError: If ``model`` is no Keras layer.
    """
    return _convert_all(model, KERASS)


def _convert_all(model: Any, classes: dict[type, type]) -> Report:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a Keras model or layer; got {type(model).__name__}")
    named = list(_named_layers(model))
    report = Report.of(_convert(layer, name, classes) for name, layer in named)
    if report:
        for _, layer in named:
            if isinstance(layer, keras.Model):
                _replace_functions(layer)
    return report


def _replace_functions(model: Any) -> None:
    """Make the functions for ``fit``, ``evaluate`` and ``predict`` that a model has anew.

    A callback may convert the model. The running loop reads the function at its next step, and must find one.
    """
    for name in ("train", "test", "predict"):
        if getattr(model, f"{name}_function") is not None:
            getattr(model, f"make_{name}_function")(force=True)


def _named_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer of a model once, with its path of names; the path of the model itself is empty."""
    remaining, seen = [("", model)], set()
    while remaining:
        name, layer = remaining.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield name, layer
        children = layer._flatten_layers(include_self=False, recursive=False)
        remaining += [(f"{name}/{child.name}" if name else child.name, child) for child in reversed(children)]


def _convert(layer: Any, name: str, classes: dict[type, type]) -> LayerReport | None:
    """Convert one layer; None if it is not recurrent or converted already."""
    former = type(layer)
    cls = classes.get(former)
    if cls is None:
        reason = _why_unknown(former, classes)
        return LayerReport(name, former.__name__, reason) if reason else None
    is_wrapper = issubclass(former, keras.layers.Bidirectional)
    reason = "" if classes is KERASS else _why_unsupported(layer, is_wrapper)
    if reason:
        return LayerReport(name, former.__name__, reason)
    # Keras tracks attributes that are set by its own __setattr__, and must not track a class.
    object.__setattr__(layer, "__class__", cls)
    return LayerReport(name, former.__name__, note="" if is_wrapper or classes is KERASS else note(layer.cell))


def _why_unsupported(layer: Any, is_wrapper: bool) -> str:
    """Why the operator does not support a layer of a known class; empty if it does."""
    if backends.BACKEND is None:
        return f"the operator does not run on the backend {keras.backend.backend()}"
    if is_wrapper:
        return ""
    if layer.cell.compute_dtype != layer.compute_dtype:
        return f"its cell computes in {layer.cell.compute_dtype}, but the layer in {layer.compute_dtype}"
    return refusal(layer.cell) or ("it has use_cudnn=True" if backends.requires_cudnn(layer) else "")


def _why_unknown(cls: type, classes: dict[type, type]) -> str:
    """Why a recurrent layer's class has no counterpart; empty if it is not recurrent or is converted already."""
    if not issubclass(cls, (keras.layers.RNN, keras.layers.Bidirectional)) or cls in classes.values():
        return ""
    parent = next(base for base in cls.__mro__ if base in OURS or base in KERASS)
    return f"it is a subclass of {parent.__name__}"
