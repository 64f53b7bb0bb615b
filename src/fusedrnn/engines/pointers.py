"""Operands by address: for those who hold their data otherwise than in NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

if TYPE_CHECKING:
    from fusedrnn.runtime.thread_pool import ThreadTeam

Array = NDArray[Any]

Strided = tuple[int, int, int]
"""An array (T, N, features) in memory, elements side by side: its address, and the bytes of a step and of a row."""
NOWHERE: Strided = (0, 0, 0)


class Wanted(NamedTuple):
    """Where gradients go: addresses, 0 for those that nobody wants, and whether to add to what is there.

    ``params`` are in the order of ``ParameterLayout.by_pass``; ``states`` are dh0 and dc0, 0 without a c.
    """

    x: Strided
    params: Sequence[int]
    states: tuple[int, int]
    add_x: bool = False
    add_params: bool = False
    add_states: bool = False


@runtime_checkable
class ByAddress(Protocol):
    """What an engine may offer beside its calls on NumPy arrays: calls on operands by address.

    Memory at an address must be there and aligned to its elements; 0 stands for zeros, or for what nobody wants. States
    are contiguous (L·D, N, size), and come as addresses of h and c.
    """

    def weights(
        self, steps: int, batch: int, addresses: tuple[int, ...], training: bool, team: ThreadTeam, owner: object
    ) -> Any:
        """Parameters, in the order of ``ParameterLayout.by_pass``, as a call of that size shall have them.

        Their memory must stay as it is until the call, in training until its last backward. What is kept of them is
        forgotten when the owner goes.
        """

    def placed(self, addresses: tuple[int, ...] = (), packed: int = 0) -> Any:
        """The weights of a call that are elsewhere now: as they lie at these addresses, or packed at that one.

        Packed weights are the bytes from the ``address`` of what :meth:`weights` returned, in its ``lease``; that is 0
        if they are used as they lie.
        """

    def ragged(self, lengths: Array, steps: int) -> Any:
        """Sequences of different lengths, int64 (N,), each from 0 to T, that lie (T, N, features)."""

    def ragged_packed(self, batch_sizes: Array) -> Any:
        """Sequences by falling length whose rows lie packed, time by time: how many there are each time, int64 (T,)."""

    def keeping(
        self,
        steps: int,
        batch: int,
        ragged: Any = None,
        keep: Literal["gates", "states"] = "gates",
        seed: int = 0,
    ) -> tuple[Any, Any]:
        """What a call of :meth:`run` in training shall keep, and memory for it with an ``address`` and a ``buffer``."""

    def run(
        self,
        steps: int,
        batch: int,
        packed: Any,
        x: Strided,
        initial: tuple[int, int],
        y: Strided,
        final: tuple[int, int],
        *,
        ragged: Any = None,
        kept: Any = None,
        reserve: int = 0,
        team: ThreadTeam | None = None,
    ) -> None:
        """Run a sequence, not writing to the padding of ``y``; with ``kept`` in training, filling that reserve."""

    def differentiate(
        self,
        kept: Any,
        reserve: int,
        weights: Any,
        dy: Strided,
        dfinal: tuple[int, int],
        wanted: Wanted,
        team: ThreadTeam | None = None,
    ) -> None:
        """The gradients of such a call with these weights, from those of its output and final states."""
