"""What the reference's training leaves for its backward."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedrnn.arrays import Array


@dataclass
class DirectionTape:
    """What one direction of one layer leaves for backward, in the order in which it computes the steps.

    Attributes:
        states: The initial states (N, size), then the states after each step.
        before: The states that each step starts from: those before it or, where they are reset, what replaces them.
        saved: The values (N, H) of :attr:`StepVjp.saved` of each step.
    """

    states: list[tuple[Array, ...]] = field(default_factory=list)
    before: list[tuple[Array, ...]] = field(default_factory=list)
    saved: list[tuple[Array, ...]] = field(default_factory=list)


@dataclass
class Tape:
    """What :func:`train` leaves for backward, which may use it more than once.

    It refers to the input, the parameters, the initial states, the lengths and the resets: do not change them before
    backward.

    Attributes:
        params: The flat parameters.
        lengths: The lengths, or None.
        resets: The resets, or None.
        inputs: The input of each layer, (T, N, in), after dropout.
        masks: The dropout masks (T, N, in) by the layer whose input they are for.
        directions: One tape for each layer and direction, at layer·D + direction.
    """

    params: Array
    lengths: Array | None
    resets: Array | None = None
    inputs: list[Array] = field(default_factory=list)
    masks: dict[int, Array] = field(default_factory=dict)
    directions: list[DirectionTape] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The bytes that training allocates for it; the caller's arrays do not count."""
        arrays = [*self.inputs[0 not in self.masks :], *self.masks.values()]
        for tape in self.directions:
            arrays += [array for step in (*tape.states[1:], *tape.saved) for array in step]
            if self.resets is not None:
                arrays += [array for step in tape.before for array in step]
        return sum(array.nbytes for array in arrays)
