"""What an engine is: the contract between the operator and the engines that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from fusedrnn.arrays import Array
from fusedrnn.cell.cells import Cell
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands
from fusedrnn.spec import DTYPES, MODES, OPTIONS, RNNSpec

SavePolicy = Literal["gates", "states"]
"""What training saves for backward: gates and states, or states alone, from which backward computes the gates."""
SAVE_POLICIES: tuple[SavePolicy, ...] = ("gates", "states")
Need = Literal["training", "lengths", "dropout", "resets", "all_states"]
"""What a call may need beyond its spec. Dropout counts only where training drops something."""
NEEDS: tuple[Need, ...] = ("training", "lengths", "dropout", "resets", "all_states")


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    Attributes:
        modes: Cells.
        dtypes: Number formats.
        training: Whether it trains.
        lengths: Whether sequences of a batch may differ in length.
        dropout: Whether training may drop elements between layers.
        resets: Whether states may be replaced inside a sequence.
        all_states: Whether it returns every state of every step.
        cells: Whether it runs cells that users write.
        options: Which of :data:`fusedrnn.spec.OPTIONS` it supports.
    """

    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = DTYPES
    training: bool = True
    lengths: bool = True
    dropout: bool = True
    resets: bool = False
    all_states: bool = False
    cells: bool = False
    options: tuple[str, ...] = ()

    def missing(self, spec: RNNSpec, needs: Iterable[Need] = ()) -> list[str]:
        """What a spec and a call's needs require but the engine lacks, by the names of the arguments."""
        missing = []
        if spec.mode not in self.modes and not (self.cells and isinstance(spec.mode, Cell)):
            missing.append(f"mode {spec.mode!r}")
        if spec.dtype not in self.dtypes:
            missing.append(f"dtype {spec.dtype!r}")
        missing += [option for option in OPTIONS if option not in self.options and spec.asks_for(option)]
        if "training" in needs and not spec.is_trainable:
            missing.append(f"training with compute={spec.compute!r}")
        return missing + [need for need in sorted(needs) if not getattr(self, need)]

    def __str__(self) -> str:
        flags = [field.name for field in fields(self) if getattr(self, field.name) is True]
        return "; ".join(", ".join(group) for group in (self.modes, self.dtypes, flags, self.options) if group)


class Residuals(Protocol):
    """What an engine's training call saves for backward."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""


class Engine(Protocol):
    """Runs one spec on operands that have been checked. Any number of threads may call it at once."""

    def compile(self, training: bool = False) -> None:
        """Prepare now what the first call in inference would prepare; with ``training`` also that in training."""

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference: write ``y`` and return the final states, which are new arrays."""

    def train(self, operands: ForwardOperands, save: SavePolicy, seed: int) -> tuple[tuple[Array, ...], Residuals]:
        """Training: the same, with dropout by ``seed``; also return the residuals that :meth:`backward` needs.

        The residuals belong to the engine: later changes to an operand or a result do not affect them.
        """

    def backward(self, residuals: Any, operands: BackwardOperands) -> None:
        """Write or add the gradients.

        ``residuals`` come from :meth:`train` of an engine of the same kind for the same spec. They are not changed:
        further calls may use them.
        """

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The ``nbytes`` of the residuals of T steps of N sequences."""


CachedForwardCall = Callable[[Any, Any, Any, Any, int, Any], "tuple[Array, tuple[Any, ...], Any] | None"]
"""``(x, params, states, out, seed, resets)`` to the output, the final states and in training the residuals.

States of a network are a tuple for each layer, and so are gradients."""
CachedBackwardCall = Callable[[Any, Any, Any, Any, Any], "tuple[Any, Any, Any] | None"]
"""``(dy, dstates, residuals, grad_req, out)`` to the gradients of x, the parameters and the initial states."""


@runtime_checkable
class CachesCalls(Protocol):
    """An engine that can also cache a call: repeat one that it has run, on other arrays of the same kind.

    A cached call takes the caller's arguments unchecked. If they differ from those of the original call in anything
    that matters, it does nothing and returns None. See :mod:`fusedrnn.engines.operands`.
    """

    def cache_forward(self, operands: Any, states: Any, residuals: Any) -> CachedForwardCall | None:
        """The cached form of a forward call, which in training has ``residuals``; None if there is none.

        The operands are the arrays that the caller gave, not copies; ``states`` is what the caller gave as states. The
        operands of a network's engine are those of :mod:`fusedrnn.engines.network`.
        """

    def cache_backward(self, residuals: Any, operands: Any, grad_req: Any) -> CachedBackwardCall | None:
        """The cached form of a backward call; None if there is none."""


StridedAddress = tuple[int, int, int]
"""An array (T, N, features) in memory, its last axis contiguous: address, and the strides of T and N in bytes."""
NULL: StridedAddress = (0, 0, 0)
StateAddresses = tuple[int, ...]
"""Addresses of h and c, and of further states, each (L·D, N, size) and contiguous. An address is 0 for zeros, for a
result that is not wanted, and for c if there is no c."""


class GradAddresses(NamedTuple):
    """The addresses where gradients go, 0 for those that are not computed; and whether to add to what is there.

    ``params`` are in ``by_layer_direction`` order; ``states`` are dh0 and dc0.
    """

    x: StridedAddress
    params: Sequence[int]
    states: StateAddresses
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False
