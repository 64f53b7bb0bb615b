"""Which operands of a call autograd saves, so that they may not change before backward: those that torch.nn's saves."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.spec import RNNSpec


def saved_operands(spec: RNNSpec, needed: Sequence[bool], several_steps: bool) -> tuple[bool, ...]:
    """For each operand of a call, whether torch.nn's operations save it.

    A product saves each factor if the other one has a gradient, and a sum saves nothing. So torch.nn lets a weight
    change before backward where its factor has no gradient: the first layer's input weight if x has none, the recurrent
    weight of a single step from a state that has none.

    Args:
        spec: What runs.
        needed: Which operands have a gradient: x, each initial state, the weights in the order of the layout's passes.
        several_steps: Whether T is above 1, so that states which the call computes are multiplied too.

    Returns:
        A flag for each operand, in the same order.
    """
    kinds, first = spec.layout.kinds, 1 + len(spec.state_names)
    h0, c0 = needed[1], True in needed[2:first]
    saved = [False] * len(needed)
    below = needed[0]
    for layer in range(spec.num_layers):
        outputs = False
        for _ in range(spec.num_directions):
            weights = dict(zip(kinds, needed[first : first + len(kinds)], strict=True))
            gates = below or h0 or any(has for kind, has in weights.items() if kind != "h2r_weight")
            output = gates or c0 or weights.get("h2r_weight", False)
            later = several_steps and output
            factors = {"i2h_weight": below, "h2h_weight": h0 or later, "h2r_weight": gates or c0 or later}
            saved[first : first + len(kinds)] = [factors.get(kind, False) for kind in kinds]
            saved[0] |= not layer and weights["i2h_weight"]
            saved[1] |= weights["h2h_weight"]
            if spec.mode == "lstm":
                saved[2] |= gates
            first += len(kinds)
            outputs |= output
        below = outputs
    return tuple(saved)
