"""The initial values of parameters: torch.nn's uniform distribution, and what a cell declares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.cells import make_cell
from fusedrnn.cell.initial import BIAS, Initial, InitialValue, checked_initial
from fusedrnn.cell.trace import traced_cell
from fusedrnn.layout import Parameter
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.spec import RNNSpec

_ZERO = Initial(0.0, 0.0)


class Fill(NamedTuple):
    """Initial values of some rows of a parameter; rows that are filled twice keep the later values.

    Attributes:
        entry: The parameter.
        rows: The rows of the parameter.
        initial: The distribution of their values.
        negated: Further rows, which get the negative of the same values; None for none.
    """

    entry: Parameter
    rows: slice
    initial: Initial
    negated: slice | None = None


def initial_fills(spec: RNNSpec, initial: Mapping[str, InitialValue] | None = None) -> Iterator[Fill]:
    """The initial values of a spec's parameters, in order; ``initial`` is as in :func:`init_params`."""
    limit = 1 / math.sqrt(spec.hidden_size)
    declared = dict(make_cell(spec.variant).initial)
    declared |= checked_initial(initial, spec.gates, (*spec.vector_kinds, *spec.scalar_kinds))
    for entry in spec.layout.by_layer_direction:
        yield Fill(entry, slice(None), declared.get(entry.kind, Initial(-limit, limit)))
    for name, value in declared.items():
        if name.endswith(BIAS):
            fills = [*_bias_fills(spec, name.removesuffix(BIAS), value)]
            if not fills and name in (initial or {}):
                raise ValueError(f"initial names {name!r}, and gates have no biases with bias={spec.bias!r}")
            yield from fills


def _bias_fills(spec: RNNSpec, gate: str, value: Initial) -> Iterator[Fill]:
    """The values of a gate's bias. They go to the input's bias if the gate has one, and its other bias is zero."""
    cell = traced_cell(spec.variant)
    gates = {"i2h_bias": cell.x_gates, "h2h_bias": cell.h_gates}
    both = (gate,) if value.negated is None else (gate, value.negated)
    kinds = ["i2h_bias" if each in cell.x_gates else "h2h_bias" for each in both]
    if len(set(kinds)) > 1:
        raise ValueError(f"initial of '{gate}{BIAS}' negates the bias of {value.negated!r}: both must be of the input")

    def rows(kind: str, name: str) -> slice:
        first = gates[kind].index(name) * spec.hidden_size
        return slice(first, first + spec.hidden_size)

    for entry in spec.layout.by_layer_direction:
        if entry.kind == kinds[0]:
            yield Fill(entry, rows(entry.kind, gate), value, *(rows(entry.kind, name) for name in both[1:]))
        elif entry.kind in gates:
            yield from (Fill(entry, rows(entry.kind, name), _ZERO) for name in both if name in gates[entry.kind])


def _layer_params(
    network: NetworkSpec, index: int, rng: np.random.Generator, initial: Mapping[str, InitialValue] | None
) -> Array:
    """The parameters of one entry of a network's layers; errors name it."""
    try:
        return init_params(network.layers[index], rng, initial)
    except ValueError as error:
        raise ValueError(f"layers[{index}]: {error}") from error


def init_params(
    spec: RNNSpec | NetworkSpec,
    rng: np.random.Generator | None = None,
    initial: Mapping[str, InitialValue] | None = None,
) -> Array:
    """A new flat vector of initial parameters for training.

    Weights, biases and the cell's own parameters are uniformly distributed between -1/√H and 1/√H, as in torch.nn,
    except for those that the cell declares otherwise by ``initial=``.

    Args:
        spec: The spec of the parameters. For a network, the vector has those of its layers, one after the other.
        rng: NumPy's generator; None for a new one.
        initial: More values by name, as in :func:`fusedrnn.cell.cell`; they take precedence. ``{"f.bias": 1.0}`` is for
            the forget gates of an LSTM. If a gate has two biases, the bias of the recurrent product is zero.

    Returns:
        The vector, of the spec's dtype, (spec.layout.size,).

    Raises:
        TypeError: If ``rng`` is no generator, or a value is neither a number nor a pair of numbers.
        ValueError: If there is no parameter with a name, or bounds are in the wrong order.

    Example:
        >>> params = init_params(RNNSpec("lstm", 3, 4), np.random.default_rng(0), {"f.bias": 1.0})
        >>> params.shape
        (144,)
    """
    rng = np.random.default_rng() if rng is None else rng
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator or None; got {type(rng).__name__}")
    if isinstance(spec, NetworkSpec):
        return np.concatenate([_layer_params(spec, index, rng, initial) for index in range(len(spec.layers))])
    params = np.empty(spec.layout.size, spec.dtype)
    for entry, rows, value, negated in initial_fills(spec, initial):
        parameter = entry.view(params)
        drawn = rng.uniform(value.low, value.high, parameter[rows].shape)
        parameter[rows] = np.log(drawn) if value.is_log else drawn
        if negated is not None:
            parameter[negated] = -parameter[rows]
    return params
