"""Which operands of a call autograd saves, as torch.nn does. Saved operands must not change before backward."""

from __future__ import annotations

from collections.abc import Sequence
from operator import or_

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.trace import traced_cell
from fusedrnn.spec import RNNSpec

_C0 = 2
"""The index of c0 among the operands of an LSTM."""


def saved_operands(
    spec: RNNSpec, needs_grad: Sequence[bool], several_steps: bool, under_autocast: bool = False
) -> tuple[bool, ...]:
    """For each operand of a call, whether torch.nn's operations save it.

    A product saves each factor if the other factor needs a gradient; a sum saves nothing. So torch.nn lets a weight
    change before backward if the other factor needs no gradient: the first layer's input weight if x needs none, the
    recurrent weight of a single step if its initial state needs none. The equations of a user cell may multiply its
    states and its own parameters by any value, so these are saved.

    Args:
        spec: The network.
        needs_grad: Which operands need a gradient: x, each initial state, each state after resets if these are
            operands, and the weights in the operator's order.
        several_steps: Whether T is above 1, so that computed states are multiplied too.
        under_autocast: Whether products save copies that autocast has converted, so that only c itself is saved.

    Returns:
        A flag for each operand, in the same order.
    """
    end = 1 + len(spec.state_names)
    first_weight = len(needs_grad) - len(spec.layout.by_layer_direction)
    if first_weight == end:
        return tuple(_saved(spec, needs_grad, several_steps, under_autocast))
    # A state after resets is multiplied in the same way as an initial state.
    either = map(or_, needs_grad[1:end], needs_grad[end:first_weight])
    flags = _saved(spec, (needs_grad[0], *either, *needs_grad[first_weight:]), several_steps, under_autocast)
    return *flags[:end], *flags[1:end], *flags[end:]


def _saved(spec: RNNSpec, needs_grad: Sequence[bool], several_steps: bool, under_autocast: bool) -> list[bool]:
    """:func:`saved_operands` for a call without states after resets."""
    kinds, first_weight = spec.layout.kinds, 1 + len(spec.state_names)
    h0, c0, own = needs_grad[1], True in needs_grad[2:first_weight], (*spec.vector_kinds, *spec.scalar_kinds)
    first = first_weight
    saved = [False] * len(needs_grad)
    layer_input = needs_grad[0]
    for layer in range(spec.num_layers):
        layer_output = False
        for _ in range(spec.num_directions):
            weights = dict(zip(kinds, needs_grad[first : first + len(kinds)], strict=True))
            gates = layer_input or h0 or any(needed for kind, needed in weights.items() if kind != "h2r_weight")
            output = gates or c0 or weights.get("h2r_weight", False)
            later = several_steps and output
            factors = {"i2h_weight": layer_input, "h2h_weight": h0 or later, "h2r_weight": gates or c0 or later}
            if isinstance(spec.mode, Cell):
                factors |= {"h2h_weight": gates, **dict.fromkeys(own, True)}
                saved[1:first_weight] = [True] * len(spec.state_names)
                saved[0] |= not layer and traced_cell(spec.variant).reads_raw_input
            saved[first : first + len(kinds)] = [factors.get(kind, False) for kind in kinds]
            saved[0] |= not layer and weights["i2h_weight"]
            saved[1] |= weights.get("h2h_weight", False)
            if spec.mode == "lstm":
                saved[_C0] |= gates
            first += len(kinds)
            layer_output |= output
        layer_input = layer_output
    if under_autocast:
        saved = [flag and spec.mode == "lstm" and index == _C0 for index, flag in enumerate(saved)]
    return saved
