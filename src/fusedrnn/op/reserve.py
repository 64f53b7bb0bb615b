"""The reserve: what one training call saved for its backward calls, in the form that callers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from fusedrnn.arrays import Array
from fusedrnn.engines.interface import Engine, Residuals, SavePolicy
from fusedrnn.engines.network import NetworkEngine, NetworkGradOperands
from fusedrnn.engines.operands import BackwardOperands, clear_padding
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.spec import RNNSpec


class CallKind(NamedTuple):
    """The arguments of a forward call that its backward must know of.

    Attributes:
        resets: Whether sequences begin anew inside the call.
        reset_states: Whether they then start from given states, which have gradients.
        all_states: Whether it returned every state of every step.
    """

    resets: bool = False
    reset_states: bool = False
    all_states: bool = False


PLAIN_CALL, RESETS_CALL = CallKind(), CallKind(resets=True)
CACHEABLE = PLAIN_CALL, RESETS_CALL
"""The kinds of calls that have a cached form."""


@dataclass(frozen=True, eq=False, repr=False)
class Reserve:
    """What one forward call in training saved for its backward: from :meth:`RNNOp.forward` to :meth:`RNNOp.backward`.

    The methods of :class:`NetworkOp` use the same class.

    It belongs to that call alone: no later change to the call's arrays or the op affects it. Backward does not change
    it, so any number of backward calls may use it, also at the same time. Its memory is freed with it.

    Attributes:
        steps: T.
        batch: N.
        keep: ``"gates"`` or ``"states"``, the call's ``reserve`` argument.
        seed: Determines which elements dropout drops.
        spec: The network.
        backend: The name of the engine that ran the call.
    """

    steps: int
    batch: int
    keep: SavePolicy
    seed: int
    spec: RNNSpec | NetworkSpec
    backend: str
    _engine: Engine | NetworkEngine
    _residuals: Residuals
    _lengths: Array | None
    _kind: CallKind

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return self._residuals.nbytes

    def __repr__(self) -> str:
        return (
            f"Reserve(steps={self.steps}, batch={self.batch}, keep={self.keep!r}, seed={self.seed}, "
            f"nbytes={self.nbytes}, backend={self.backend!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Reserve cannot be pickled or copied: it holds the memory of one forward call")

    def backward(self, operands: BackwardOperands | NetworkGradOperands) -> None:
        """Compute the gradients on the engine that ran forward; the operands have been checked."""
        grads = operands.grads
        if grads.x is not None and not grads.add_x and self._lengths is not None:
            clear_padding(grads.x, self._lengths)
        if any(buffer is not None for buffer in (grads.x, grads.params, grads.states, grads.reset_states)):
            engine: Any = self._engine  # of the same kind as the operands: both are those of the spec
            engine.backward(self._residuals, operands)


def check_reserve(value: object, spec: RNNSpec | NetworkSpec, backends: Sequence[str]) -> Reserve:
    """``value`` if it is the reserve of an op of that spec that ran on one of these engines."""
    if value is None:
        raise TypeError("reserve must be what forward returned with training=True; got None")
    if not isinstance(value, Reserve):
        raise TypeError(f"reserve must be the Reserve that forward returned; got {type(value).__name__}")
    if value.spec != spec:
        raise ValueError(f"reserve must come from an op of {spec}; got one of {value.spec}")
    if value.backend not in backends:
        raise ValueError(f"reserve must come from backend {' or '.join(backends)}; got one from {value.backend}")
    return value
