"""``read``: recurrent layers of torch.nn, of ours and of TorchScript, as specs and flat parameter vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, RNNBase, RNNCellBase

from fusedrnn.arrays import Array
from fusedrnn.spec import RNNSpec
from fusedrnn.torch.class_map import is_quantized, is_scripted, torch_class
from fusedrnn.torch.formats import HasCompute
from fusedrnn.torch.graphs import recurrent_operators
from fusedrnn.torch.layer import Layer

_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float32", torch.bfloat16: "float32"}
# Indices among the constant arguments of a traced call: biases, layers, dropout, training, directions, batch first.
_DROPOUT, _BATCH_FIRST = 2, 5


@dataclass(frozen=True)
class ReadLayer:
    """A recurrent layer or cell of a model.

    Attributes:
        name: Its name in the model; empty for the model itself.
        kind: ``"RNN"``, ``"LSTM"`` or ``"GRU"``, with ``"Cell"`` appended for a cell; or ``"Layer"``.
        spec: The network; its dropout applies in training. A cell is a network of one layer, to run for one step.
        params: The flat vector of ``spec.layout``, a copy.
        batch_first: Whether the layer takes (N, T, I); the operator takes (T, N, I).
    """

    name: str
    kind: str
    spec: RNNSpec
    params: Array
    batch_first: bool


def read(model: Module, names: Iterable[str] | None = None) -> dict[str, ReadLayer]:
    """The recurrent layers of a model, by name, in the order of ``model.named_modules()``.

    Args:
        model: Any module, including the result of torch.jit.script, trace or load. A frozen module cannot be read,
            since it has no submodules.
        names: Which layers to read; None for all.

    Returns:
        Layers by name. Parameters of float16 and bfloat16 become float32. A parametrized weight is computed.

    Raises:
        TypeError: If ``model`` is no torch.nn.Module, or a layer's parameters have a dtype that is not supported.
        ValueError: If no recurrent layer has one of the names; if a layer's parameters have no values (meta tensors) or
            are sparse; or if the operator does not support a layer's sizes.
        NotImplementedError: If a layer to read is a quantized layer, or an operator in the graph of a frozen or
            exported model. With ``names=None``, all layers are to be read.

    Example:
        >>> layer = read(torch.nn.GRU(3, 4))[""]
        >>> layer.spec.mode, layer.params.shape
        ('gru', (108,))
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    layers = {name: (module, kind) for name, module in model.named_modules() if (kind := _kind(module))}
    if names is not None and not isinstance(names, Iterable):
        raise TypeError(f"names must be a name or several, or None; got {type(names).__name__}")
    unreadable = _unreadable(model, tuple(layers))
    selected = [*layers, *unreadable] if names is None else [names] if isinstance(names, str) else list(names)
    for name in selected:
        if name in unreadable:
            listed = ", ".join(f"{name or 'the model itself'}: {what}" for name, what in unreadable.items())
            advice = f"; name the others to read them alone: {', '.join(map(repr, layers))}" if layers else ""
            raise NotImplementedError(f"cannot read {listed}; expected layers that are modules of their own{advice}")
        if name not in layers:
            known = ", ".join(map(repr, layers)) or "which there are none"
            raise ValueError(f"names must be those of recurrent layers, of {known}; got {name!r}")
    return {name: _read(name, *layers[name]) for name in selected}


def _kind(module: Module) -> str:
    """The name of a module's class if it is one of torch.nn's six or ours; else empty."""
    if isinstance(module, Layer):
        return "Layer"
    if isinstance(module, torch.jit.ScriptModule):
        # A user's class may have such a name, so it must have the parameters too.
        has_weights = is_scripted(module) and any(name.startswith("weight_ih") for name in _weights(module))
        return str(module.original_name) if has_weights else ""
    cls = torch_class(type(module))
    return "" if cls is None else cls.__name__


def _unreadable(model: Module, layers: tuple[str, ...]) -> dict[str, str]:
    """The recurrent parts of a model that cannot be read: descriptions by name."""
    unreadable = {}
    for name, module in model.named_modules():
        if any(name == layer or name.startswith(f"{layer}.") or not layer for layer in layers):
            continue
        if is_quantized(module):
            unreadable[name] = f"a quantized {type(module).__name__}"
        elif operators := recurrent_operators(module):
            unreadable[name] = f"{', '.join(operators)} in its graph, whose weights belong to no layer"
    return unreadable


def _weights(module: Module) -> dict[str, Tensor]:
    """The parameters by the names of torch.nn's layers, where the names of a cell's parameters have no layer number."""
    if isinstance(module, RNNBase):
        named = {name: getattr(module, name) for names in module._all_weights for name in names}
    elif isinstance(module, Layer):
        named = {entry.torch_name: getattr(module, entry.torch_name) for entry in module.spec.layout.by_layer_direction}
    elif isinstance(module, RNNCellBase):
        named = {name: getattr(module, name) for name in _CELL_NAMES}
    else:
        named = dict(module.named_parameters(recurse=False, remove_duplicate=False))  # weights may be tied
    return {name: weight for name, weight in named.items() if weight is not None}


def _read(name: str, module: Module, kind: str) -> ReadLayer:
    try:
        arrays = {label: _array(label, weight) for label, weight in _weights(module).items()}
        if isinstance(module, Layer):
            spec, batch_first = module.spec, module.batch_first
        else:
            if kind.endswith("Cell"):
                arrays = {f"{label}_l0": array for label, array in arrays.items()}
            nonlinearity, dropout, batch_first = _settings(module, kind)
            spec = _spec(kind.removesuffix("Cell"), arrays, module, nonlinearity, dropout)
        return ReadLayer(name, kind, spec, spec.layout.pack(arrays, names="torch"), batch_first)
    except (TypeError, ValueError) as error:
        kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
        raise kind_of_error(f"cannot read {name or 'the model itself'}: {error}") from error


def _spec(kind: str, arrays: dict[str, Array], module: Module, nonlinearity: str, dropout: float) -> RNNSpec:
    """The network with these parameters."""
    input_weight, projection = arrays["weight_ih_l0"], arrays.get("weight_hr_l0")
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    layers = sum(label.startswith("weight_ih") and not label.endswith("_reverse") for label in arrays)
    return RNNSpec(
        f"rnn_{nonlinearity}" if kind == "RNN" else kind.lower(),
        input_weight.shape[1], input_weight.shape[0] // gates, layers,
        bidirectional="weight_ih_l0_reverse" in arrays,
        dropout=dropout if layers > 1 and dropout < 1 else 0.0,
        projection_size=None if projection is None else projection.shape[0],
        dtype=input_weight.dtype.name,
        bias="double" if "bias_ih_l0" in arrays else "none",
        compute=module.compute if isinstance(module, HasCompute) else None,
    )  # fmt: skip


def _array(label: str, weight: Tensor) -> Array:
    if weight.dtype not in _DTYPES:
        raise TypeError(f"{label} must be of {', '.join(map(str, _DTYPES))}; got {weight.dtype}")
    if weight.is_meta:
        raise ValueError(f"{label} must have values; got a meta tensor")
    if weight.layout is not torch.strided:
        raise ValueError(f"{label} must be dense; got layout {weight.layout}")
    array: Array = weight.detach().to("cpu", getattr(torch, _DTYPES[weight.dtype])).resolve_neg().numpy()
    return np.ascontiguousarray(array)


def _settings(module: Module, kind: str) -> tuple[str, float, bool]:
    """nonlinearity, dropout and batch_first."""
    if not isinstance(module, torch.jit.ScriptModule) or hasattr(module, "hidden_size"):
        nonlinearity = getattr(module, "nonlinearity", "tanh")
        return str(nonlinearity), float(getattr(module, "dropout", 0.0)), bool(getattr(module, "batch_first", False))
    # A traced module has parameters but no other attributes; these are in its graph.
    graph: Any = module.graph
    nodes = {node.kind(): node for node in graph.nodes()}
    nonlinearity = "relu" if any("relu" in name for name in nodes) else "tanh"
    calls = [node for name, node in nodes.items() if name.split("_")[0] in ("aten::lstm", "aten::gru", "aten::rnn")]
    if not calls or kind.endswith("Cell"):
        return nonlinearity, 0.0, False
    constants = [value.toIValue() for value in calls[0].inputs() if value.node().kind() == "prim::Constant"]
    return nonlinearity, float(constants[_DROPOUT]), len(constants) > _BATCH_FIRST and bool(constants[_BATCH_FIRST])
