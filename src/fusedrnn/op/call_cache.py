"""What an op remembers of its last calls, so that another one like them takes a short way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from fusedrnn.engines.grad_buffers import Gradients, plain

Array = NDArray[Any]
Repeated = Callable[..., Any]


@runtime_checkable
class Repeating(Protocol):
    """What an engine may offer beside its calls: short ways for calls that repeat the one before on other arrays.

    They are called with what the caller gave, unchecked, and return None, having done nothing, if that differs from
    the sample in anything that matters.
    """

    def repeat_forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, y: Array, kept: Any
    ) -> Callable[[Any, Any, Any, Any, int], tuple[Array, tuple[Array, ...], Any] | None] | None:
        """For ``(x, params, states, out, seed)``: the output, the final states, and in training what it keeps.

        ``kept`` is what the sample kept in training. None if there is no short way.
        """

    def repeat_backward(
        self, kept: Any, dy: Array | None, dstates: Sequence[Array | None] | None, request: Any, gradients: Gradients
    ) -> Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any] | None] | None:
        """For ``(dy, dstates, kept, grad_req, out)``: the triple of gradients. None if there is no short way."""


class Repeats:
    """The short ways of one op, each made when a call has come twice in a row.

    Attributes:
        inference: For calls of forward.
        training: For those in training.
        backward: For backward.
    """

    __slots__ = ("_last", "backward", "inference", "training")

    def __init__(self) -> None:
        self.inference: Repeated | None = None
        self.training: Repeated | None = None
        self.backward: Repeated | None = None
        self._last: dict[str, Any] = {}

    def after_forward(
        self, engine: object, given: Sequence[Any], used: Sequence[Any], y: Array, kept: Any = None
    ) -> None:
        """Remember a call on input, parameters and states that went the long way; ``kept`` is what training kept."""
        kind = "inference" if kept is None else "training"
        (x, params, states), (data, vector, initial) = given, used
        if (
            self._twice(kind, (data.shape, data.strides, y.strides, initial is None))
            and isinstance(engine, Repeating)
            and x is data
            and params is vector
            and _as_given(states, initial)
        ):
            setattr(self, kind, engine.repeat_forward(x, params, states, y, kept))

    def after_backward(
        self, reserve: Any, given: Sequence[Any], used: Sequence[Any], request: Any, gradients: Gradients
    ) -> None:
        """Remember a call on gradients of the output and the states that went the long way."""
        (dy, dstates), (output, final) = given, used
        if (
            self._twice("backward", (reserve.steps, reserve.batch, plain(request), dy is None, dstates is None))
            and isinstance(reserve._engine, Repeating)
            and reserve._lengths is None
            and reserve.keep == "gates"
            and dy is output
            and _as_given(dstates, final)
        ):
            self.backward = reserve._engine.repeat_backward(reserve._kept, dy, dstates, request, gradients)

    def _twice(self, kind: str, key: object) -> bool:
        """Whether the call before of that kind had the same key."""
        before, self._last[kind] = self._last.get(kind), key
        return bool(before == key)


def _as_given(given: Sequence[Any] | None, used: Sequence[Any] | None) -> bool:
    """Whether arrays are those that were given, and not copies; None stands for zeros, each or as a whole."""
    if given is None or used is None:
        return all(array is None for array in used or ())
    return all(array is passed for array, passed in zip(used, given, strict=True))
