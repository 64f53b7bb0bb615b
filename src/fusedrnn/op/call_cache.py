"""The calls that an op has cached: a call that repeats the one before skips the checks.

A call that passes through validation is a checked call. When two checked calls in a row are alike, the engine is asked
for a cached form of them. A cached call compares its arguments with those of the original call; where they differ, it
does nothing, and the op makes a checked call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedrnn.engines.interface import CachedBackwardCall, CachedForwardCall, CachesCalls
from fusedrnn.engines.network import NetworkGradOperands, NetworkOperands
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, comparable
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.op.reserve import CACHEABLE, PLAIN_CALL, RESETS_CALL, Reserve
from fusedrnn.op.validation import draw_seed
from fusedrnn.spec import RNNSpec


class CallCache:
    """The cached calls of one op; None for a kind of call that has not been made twice in a row.

    Attributes:
        inference: The cached call of forward.
        training: The cached call of forward in training.
        backward: The cached call of backward.
        has_forward: Whether there is a cached call of forward, in inference or in training.
        trainer: The name and the engine of the last training call that may be cached.
    """

    __slots__ = ("_last_keys", "backward", "has_forward", "inference", "trainer", "training")

    def __init__(self) -> None:
        self.inference: CachedForwardCall | None = None
        self.training: CachedForwardCall | None = None
        self.backward: CachedBackwardCall | None = None
        self.has_forward = False
        self.trainer: tuple[str, Any] = "", None
        self._last_keys: dict[str, Any] = {}

    def forward(
        self, spec: RNNSpec | NetworkSpec, x: Any, params: Any, states: Any, training: bool, out: Any, resets: Any
    ) -> tuple[Any, tuple[Any, ...], Reserve | None] | None:
        """What forward returns, by a cached call; None if there is none, or it does not accept the arguments."""
        # Another thread may replace a cached call at any time.
        if training is False and (infer := self.inference) is not None:
            return infer(x, params, states, out, 0, resets)  # nothing is saved: the third entry is None
        if training is True and (train := self.training) is not None:
            seed = draw_seed(spec)
            result = train(x, params, states, out, seed, resets)
            if result is not None:
                y, final, residuals = result
                kind = PLAIN_CALL if resets is None else RESETS_CALL
                (steps, batch, _), (name, engine) = y.shape, self.trainer
                return y, final, Reserve(steps, batch, "gates", seed, spec, name, engine, residuals, None, kind)
        return None

    def set_trainer(self, name: str, engine: object) -> None:
        """Note which engine runs a training call that may be cached. Cached calls of another engine are dropped."""
        if engine is not self.trainer[1]:
            self.training = self.backward = None
            self.trainer = name, engine

    def note_forward(
        self,
        engine: object,
        arguments: tuple[Any, Any, Any],
        operands: ForwardOperands | NetworkOperands,
        residuals: Any = None,
    ) -> None:
        """Note a checked call; ``arguments`` are x, params and states as the caller gave them."""
        x, params, states = arguments
        kind = "inference" if residuals is None else "training"
        key = operands.x.shape, operands.x.strides, operands.y.strides, operands.states is None, operands.resets is None
        if (
            self._is_repeated(kind, key)
            and isinstance(engine, CachesCalls)
            and x is operands.x
            and params is operands.params
            and _are_uncopied(states, operands.states)
        ):
            cached = engine.cache_forward(operands, states, residuals)
            setattr(self, kind, cached)
            self.has_forward |= cached is not None

    def note_backward(
        self, reserve: Reserve, arguments: tuple[Any, Any, Any], operands: BackwardOperands | NetworkGradOperands
    ) -> None:
        """Note a checked call; ``arguments`` are dy, dstates and grad_req as the caller gave them."""
        dy, dstates, grad_req = arguments
        engine = reserve._engine
        key = reserve.steps, reserve.batch, comparable(grad_req), dy is None, dstates is None, reserve._kind
        if (
            self._is_repeated("backward", key)
            and isinstance(engine, CachesCalls)
            and reserve._lengths is None
            and reserve._kind in CACHEABLE
            and reserve.keep == "gates"
            and dy is operands.dy
            and _are_uncopied(dstates, operands.dstates)
        ):
            self.backward = engine.cache_backward(reserve._residuals, operands, grad_req)

    def _is_repeated(self, kind: str, key: object) -> bool:
        """Whether the previous checked call of that kind had the same key."""
        last, self._last_keys[kind] = self._last_keys.get(kind), key
        return bool(last == key)


def _are_uncopied(arguments: Sequence[Any] | None, checked: Sequence[Any] | None) -> bool:
    """Whether checked arrays are the caller's, not copies; None instead of an array, or of all, stands for zeros.

    Entries of networks are tuples of arrays.
    """
    if checked is None:
        return True
    originals = (None,) * len(checked) if arguments is None else arguments
    return all(
        array is original or (type(array) is tuple and _are_uncopied(original, array))
        for array, original in zip(checked, originals, strict=True)
    )
