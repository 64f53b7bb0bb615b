"""What the operator takes: plain tensors, networks that it has, weights as they are now, lengths that fit."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from operator import is_
from typing import Any, NamedTuple

from torch.nn import Module, Parameter
from torch.nn.utils.rnn import PackedSequence

import torch
from fusedrnn.spec import RNNSpec
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NAMES = {torch.float32: "float32", torch.float64: "float64"}
DTYPES = tuple(_NAMES)

# Bound once: an inference call of a small network takes no longer than a few dozen lookups.
is_compiling = torch.compiler.is_compiling
_dispatch_keys = torch._C._dispatch_keys


def _eager_keys() -> tuple[Any, Any]:
    """The dispatch keys of a plain tensor on the CPU, and of one made in inference mode."""
    with torch.inference_mode(False):
        plain = torch.empty(0, device="cpu")
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    return _dispatch_keys(plain), _dispatch_keys(inference)


_PLAIN, _INFERENCE = _eager_keys()


def number_format(x: Any) -> torch.dtype | None:
    """The dtype of a tensor that the operator can read; None: it cannot, or it is none."""
    kind = type(x)
    if kind is not Tensor and kind is not Parameter and not _stands_for_plain(kind):
        return None
    dtype: torch.dtype = x.dtype
    return dtype if dtype in _NAMES and plain(x, dtype) else None


def plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether memory of this dtype on the CPU, and nothing else, is behind a tensor."""
    kind = type(tensor)
    if kind is Tensor or kind is Parameter:
        if tensor.dtype is not dtype:
            return False
        if is_compiling():
            return tensor.device.type == "cpu" and tensor.layout is torch.strided
        # One look tells sparse, quantized, lazily negated and wrapped tensors, other devices and meta tensors apart.
        keys = _dispatch_keys(tensor)
        return bool(keys == _PLAIN or keys == _INFERENCE)  # noqa: SIM109 -- hashes cost more
    return _stands_for_plain(kind) and tensor.dtype is dtype and tensor.device.type == "cpu"


def _stands_for_plain(kind: type) -> bool:
    """Whether tensors of this class are PyTorch's own stand-ins for plain ones while it traces."""
    return kind.__module__.startswith("torch._subclasses.") and issubclass(kind, Tensor)


class Sketch(NamedTuple):
    """As much of a spec as an operator in a graph is given: a compiler can look into it."""

    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    dropout: float
    projection_size: int | None = None


class Plan(NamedTuple):
    """What a module asks the operator for: it depends on nothing but the module's attributes."""

    spec: RNNSpec | Sketch
    dropping: RNNSpec | Sketch | None  # in training; None: not the operator's
    state_rows: int  # L·D
    state_sizes: tuple[int, ...]  # features of h, and of an LSTM's c
    names: tuple[str, ...]  # of the weights, as the operator has them in order, but for missing biases
    shapes: tuple[tuple[int, ...], ...]
    usual: list[tuple[Any, ...]]  # what there is to see of them, if nothing is special about any
    bias: bool
    flat_order: tuple[int, ...] | None  # where the weights are in a layer's _flat_weights; None: in this order
    is_cell: bool = False

    def from_flat(self, flat: list[Any]) -> list[Any]:
        """What belongs to each weight in the operator's order, from a list in the order of ``_flat_weights``."""
        return flat if self.flat_order is None else [flat[i] for i in self.flat_order]


@lru_cache(maxsize=256)
def plan(
    mode: str, I: int, H: int, layers: int, bidirectional: bool, bias: bool, dropout: float, dtype: torch.dtype,
    P: int = 0,
) -> Plan | None:  # fmt: skip
    """The plan of a sequence module with these attributes; None if the operator has no such network."""
    try:
        spec = RNNSpec(
            mode.lower(), I, H, layers, bool(bidirectional), projection_size=P or None, dtype=_NAMES[dtype]
        )
        drops = dropout > 0 and layers > 1
        dropping = (replace(spec, dropout=dropout) if dropout < 1 else None) if drops else spec
    except (TypeError, ValueError):  # attributes that someone changed: PyTorch knows what to say
        return None
    names, shapes = _weights(spec.num_gates, I, H, layers, spec.num_directions, bias, P)
    usual = [(Parameter, dtype, torch.Size(shape), True, False, torch.strided, False) for shape in shapes]
    return Plan(
        spec, dropping, layers * spec.num_directions, _state_sizes(spec.mode, H, P), names, shapes, usual, bias,
        _flat_order(len(names), bool(P and bias)),
    )  # fmt: skip


def traced_plan(
    mode: str, I: int, H: int, layers: int, bidirectional: bool, bias: bool, dropout: float, dtype: torch.dtype,
    P: int = 0,
) -> Plan | None:  # fmt: skip
    """The same for a compiler, which looks into this function."""
    spec = Sketch(mode.lower(), H, layers, bool(bidirectional), 0.0, P or None)
    drops = dropout > 0 and layers > 1
    dropping = (spec._replace(dropout=dropout) if dropout < 1 else None) if drops else spec
    directions = 2 if bidirectional else 1
    gates = 4 if spec.mode == "lstm" else 3 if spec.mode == "gru" else 1
    names, shapes = _weights(gates, I, H, layers, directions, bias, P)
    return Plan(spec, dropping, layers * directions, _state_sizes(spec.mode, H, P), names, shapes, [], bias, None)


def _flat_order(count: int, projects_with_bias: bool) -> tuple[int, ...] | None:
    """torch.nn lists projections behind the biases, the operator before them."""
    if not projects_with_bias:
        return None
    return tuple(first + i for first in range(0, count, 5) for i in (0, 1, 4, 2, 3))


def _state_sizes(mode: str, H: int, P: int) -> tuple[int, ...]:
    return (P or H, H) if mode == "lstm" else (H,)


def _weights(
    gates: int, I: int, H: int, layers: int, directions: int, bias: bool, P: int
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names and shapes of the weights."""
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    rows = gates * H
    for layer in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            names += [f"weight_ih_l{layer}{suffix}", f"weight_hh_l{layer}{suffix}"]
            shapes += [(rows, I if layer == 0 else directions * (P or H)), (rows, P or H)]
            if P:
                names.append(f"weight_hr_l{layer}{suffix}")
                shapes.append((P, H))
            if bias:
                names += [f"bias_ih_l{layer}{suffix}", f"bias_hh_l{layer}{suffix}"]
                shapes += [(rows,), (rows,)]
    return tuple(names), tuple(shapes)


@lru_cache(maxsize=256)
def cell_plan(mode: str, I: int, H: int, bias: bool, dtype: torch.dtype) -> Plan | None:
    """The plan of a cell: a network of one layer, whose parameters have shorter names."""
    return _renamed(plan(mode, I, H, 1, False, bias, 0.0, dtype))


def traced_cell_plan(mode: str, I: int, H: int, bias: bool, dtype: torch.dtype) -> Plan | None:
    """The same for a compiler, which looks into this function."""
    return _renamed(traced_plan(mode, I, H, 1, False, bias, 0.0, dtype))


def _renamed(whole: Plan | None) -> Plan | None:
    if whole is None:
        return None
    return whole._replace(names=("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(whole.names)], is_cell=True)


def current_weights(module: Module, plan: Plan, dtype: torch.dtype) -> list[Tensor | None] | None:
    """The weights as they are now, in the operator's order; None if one is not what the operator takes.

    Parametrizations, weight_norm and functional_call put something else in the place of a parameter, tools that write
    to ``_flat_weights`` in the place of all. This is what counts, and what gradients flow through.
    """
    parameters = module._parameters
    weights: list[Any] = [parameters.get(name) for name in plan.names]
    if is_compiling() or not _usual(weights, plan.usual) or not (plan.is_cell or _in_step(module, plan, weights)):
        weights = [
            getattr(module, name, None) if weight is None else weight
            for name, weight in zip(plan.names, weights, strict=True)
        ]
        if not plan.is_cell and not is_compiling():
            weights = _flat_or_named(module, plan, weights)
        for weight, shape in zip(weights, plan.shapes, strict=True):
            if not plain(weight, dtype) or weight.shape != shape:
                return None
    if plan.bias:
        return weights
    per_pass = len(weights) // plan.state_rows
    return [
        each for i in range(0, len(weights), per_pass) for each in (*weights[i : i + per_pass], None, None)
    ]


def _usual(weights: list[Any], usual: list[tuple[Any, ...]]) -> bool:
    """Whether all are parameters in plain memory: in one comparison, since most calls end here."""
    try:
        return [
            (type(w), w.dtype, w.shape, w.is_cpu, w.is_neg(), w.layout, w._is_zerotensor()) for w in weights
        ] == usual
    except (AttributeError, RuntimeError):  # one is None: it is elsewhere; or its class refuses to be asked
        return False


def _in_step(module: Any, plan: Plan, weights: list[Any]) -> bool:
    """Whether ``_flat_weights``, which torch.nn's forward reads, holds these very weights."""
    flat = module._flat_weights
    if plan.flat_order is not None:
        flat = plan.from_flat(flat)
    return len(flat) == len(weights) and all(map(is_, flat, weights))


def _flat_or_named(module: Any, plan: Plan, weights: list[Any]) -> list[Any]:
    """What torch.nn's forward would read: the weights by name if one is another than when the list was made."""
    flat = module._flat_weights
    if len(flat) != len(weights):
        return weights
    by_name = plan.from_flat(module._flat_weight_refs) if module._flat_weight_refs else ()
    for ref, weight in zip(by_name, weights, strict=False):
        if ref is not None and weight is not None and ref() is not weight:
            return weights
    return list(plan.from_flat(flat))


def draw_seed() -> int:
    """A seed for dropout from PyTorch's default generator, so that torch.manual_seed makes it repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu").item())


def is_proxy(value: Any) -> bool:
    """Whether torch.fx is tracing."""
    return isinstance(value, torch.fx.Proxy)


def leaf(module: Module, *args: Any) -> Any:
    """The node of a module in a torch.fx graph: torch.fx takes none but torch.nn's own for leaves."""
    tracer = args[0].tracer
    while args and args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def checked_lengths(given: Any, x: Any, batch_first: bool) -> Tensor:
    """Lengths as int64 (N,) on the CPU.

    Raises:
        TypeError: They are not integers.
        ValueError: There is not one for each sequence, one is not in 0..T, or the input has no use for them.
    """
    if isinstance(x, PackedSequence):
        raise ValueError("lengths must be None for a PackedSequence, which has its own")
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"{x.dim()}-D" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"lengths need batched 3-D input; got {got}")
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    lengths: Tensor = given if isinstance(given, Tensor) else _tensor(given)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths must be integers; got {lengths.dtype}")
    if lengths.device.type != "cpu":
        raise ValueError(f"lengths must be on the CPU; got {lengths.device}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"lengths must have shape ({batch},), one for each sequence; got {tuple(lengths.shape)}")
    lengths = lengths.detach().to(torch.int64)
    # While a graph is made there are no values yet; the operator looks again when it runs.
    if not torch.compiler.is_compiling() and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be from 0 to {steps}, the steps of input; got {low if low < 0 else high}")
    return lengths


def _tensor(lengths: Any) -> Tensor:
    try:
        return torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a tensor or a list of integers; got {lengths!r}") from error


def checked_batch_sizes(batch_sizes: Any, rows: int) -> bool:
    """Whether the batch sizes of a packed sequence are what packing makes: anyone can build a PackedSequence."""
    if type(batch_sizes) is not Tensor or batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1:
        return False
    if not batch_sizes.is_cpu or not len(batch_sizes):
        return False
    sizes = batch_sizes.numpy()
    return bool(sizes[-1] > 0 and sizes.sum() == rows and (sizes[1:] <= sizes[:-1]).all())


def packed_batch(batch_sizes: Tensor, order: Tensor | None, hx: Any) -> int:
    """N of a packed sequence: while a graph is made, from another's shape if there is one, as values break graphs."""
    if is_compiling():
        if order is not None:
            return order.shape[0]
        first = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
        if isinstance(first, Tensor) and first.dim() == 3:
            return first.shape[1]
    return int(batch_sizes[0])
