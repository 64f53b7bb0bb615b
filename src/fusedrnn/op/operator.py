"""What the operators of a spec and of a network have in common."""

from __future__ import annotations

from typing import Any, TypeVar

from fusedrnn.engines.interface import NEEDS, SAVE_POLICIES, SavePolicy
from fusedrnn.engines.operands import clear_padding
from fusedrnn.op.call_cache import CallCache
from fusedrnn.op.reserve import CACHEABLE, PLAIN_CALL, CallKind, Reserve
from fusedrnn.op.validation import draw_seed
from fusedrnn.scalars import as_bool, check_choice, positive_int

Op = TypeVar("Op", bound="Operator")


class Operator:
    """Base of the operators.

    Args:
        spec: What to run.
        backend: The engine that the caller asks for, or None.
        selector: Selects the engine of each call.
    """

    spec: Any

    def __init__(self, spec: Any, backend: str | None, selector: Any) -> None:
        self.spec, self._requested_backend, self._selector = spec, backend, selector
        # The engines whose reserves backward takes.
        self._backends: tuple[str, ...] = selector.names
        self.backend: str
        self.backend, self._engine = selector.select()
        # The key: whether a call trains, has lengths, has resets, and returns all states.
        self._selected: dict[tuple[bool, ...], tuple[str, Any]] = {(False,) * 4: (self.backend, self._engine)}
        self._call_cache = CallCache()

    def compile(self: Op, training: bool = False) -> Op:
        """Compile the kernels now rather than at the first call: of inference, with ``training`` also of training.

        Raises:
            TypeError: If ``training`` is not a truth value.
            NotImplementedError: If ``training`` is True and no engine trains the spec.
        """
        trains = as_bool("training", training)
        self._engine.compile()
        if trains:
            self._select_engine(training=True)[1].compile(True)
        return self

    def reserve_size(self, steps: int, batch: int, reserve: SavePolicy = "gates") -> int:
        """The ``nbytes`` of the reserve of a forward call of that size without resets.

        Args:
            steps: T.
            batch: N.
            reserve: As in :meth:`forward`.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; the message is of the same form.
            NotImplementedError: If no engine trains the spec.
        """
        steps, batch = positive_int("steps", steps), positive_int("batch", batch)
        save = check_choice("reserve", reserve, SAVE_POLICIES)
        size: int = self._select_engine(training=True)[1].reserve_bytes(steps, batch, save)
        return size

    def _select_engine(self, training: bool, lengths: bool = False, kind: CallKind = PLAIN_CALL) -> tuple[str, Any]:
        """The name and the engine for a call of that kind."""
        key = training, lengths, kind.resets, kind.all_states
        selected = self._selected.get(key)
        if selected is None:
            needed = dict(zip(("training", "lengths", "resets", "all_states"), key, strict=True))
            needed["dropout"] = training and self.spec.drops
            selected = self._selector.select(frozenset(need for need in NEEDS if needed[need]))
            self._selected[key] = selected
        return selected

    def _engine_seed(self, seed: int) -> Any:
        """The seed of a call as the engine takes it."""
        return seed

    def _run_forward(
        self, operands: Any, kind: CallKind, trains: bool, save: SavePolicy, seed: int | None,
        arguments: tuple[Any, Any, Any],
    ) -> tuple[Any, tuple[Any, ...], Reserve | None]:  # fmt: skip
        """What forward returns, by the engine; ``arguments`` are x, params and states as the caller gave them."""
        name, engine = self._select_engine(trains, operands.lengths is not None, kind)
        outputs = (operands.y, *operands.all_states) if kind.all_states else operands.y
        if operands.lengths is not None:
            for output in (operands.y, *operands.all_states):
                clear_padding(output, operands.lengths)
        cacheable = operands.lengths is None and save == "gates" and kind in CACHEABLE
        if not trains:
            final = engine.forward(operands)
            if cacheable:
                self._call_cache.note_forward(engine, arguments, operands)
            return outputs, final, None
        seed = draw_seed(self.spec) if seed is None else seed
        final, residuals = engine.train(operands, save, self._engine_seed(seed))
        if cacheable:
            self._call_cache.set_trainer(name, engine)
            self._call_cache.note_forward(engine, arguments, operands, residuals)
        steps, batch = operands.x.shape[:2]
        lengths = operands.lengths
        return outputs, final, Reserve(steps, batch, save, seed, self.spec, name, engine, residuals, lengths, kind)

    def _cached_backward(self, dy: Any, dstates: Any, reserve: Any, grad_req: Any, out: Any) -> tuple[Any, ...] | None:
        """What backward returns, by the cached call; None if there is none, or if it is not for such a call."""
        cached, trainer = self._call_cache.backward, self._call_cache.trainer[1]
        is_known = type(reserve) is Reserve and reserve._engine is trainer and reserve._kind in CACHEABLE
        return cached(dy, dstates, reserve._residuals, grad_req, out) if cached is not None and is_known else None

    def _run_backward(self, reserve: Reserve, operands: Any, arguments: tuple[Any, Any, Any]) -> tuple[Any, ...]:
        """What backward returns, by the engine; ``arguments`` are dy, dstates and grad_req as the caller gave them."""
        reserve.backward(operands)
        if reserve._engine is self._call_cache.trainer[1]:
            self._call_cache.note_backward(reserve, arguments, operands)
        gradients: tuple[Any, ...] = operands.grads[:3]
        return (*gradients, operands.grads.reset_states) if reserve._kind.reset_states else gradients
