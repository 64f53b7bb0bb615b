"""The operator for the tensors of Keras's backend."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import keras

from fusedrnn.spec import RNNSpec

_MODULES = {"torch": "fusedrnn.keras.on_torch", "jax": "fusedrnn.keras.on_jax"}
Results = tuple[Any, tuple[Any, ...]]
"""The output (T, N, D·H) and the final states, each (D, N, H)."""


class Parameters(NamedTuple):
    """The tensors of a Keras cell.

    Attributes:
        kernel: (I, G·H).
        recurrent_kernel: (H, G·H).
        bias: (G·H,), of a GRU with ``reset_after`` (2, G·H), or None.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any

    @classmethod
    def of(cls, cell: Any) -> Parameters:
        """Those that a cell has now, in the dtype in which the calling layer computes."""
        bias = None if cell.bias is None else cell.bias.value
        return cls(cell.kernel.value, cell.recurrent_kernel.value, bias)


class Backend(Protocol):
    """A module of this package that runs the operator on one kind of tensors."""

    def run(
        self, spec: RNNSpec, x: Any, states: Sequence[Any], parameters: Sequence[Parameters], lengths: Any
    ) -> Results | None:
        """Run a network of one layer; None if these tensors are not for the operator.

        Args:
            spec: The network.
            x: The input (T, N, I).
            states: The initial states, each (D, N, H).
            parameters: Those of each direction.
            lengths: Steps of each sequence, integers (N,); None for T everywhere.
        """

    def padding_of(self, mask: Any) -> bool | None:
        """Whether masked steps are all behind the others; None if the mask leaves out none.

        A mask whose values are not known, because a graph is being traced, may have them anywhere.

        Args:
            mask: Bools (T, N).
        """


@functools.cache
def current() -> Backend | None:
    """The backend of this process; None if the operator does not run on its tensors."""
    name = _MODULES.get(keras.backend.backend())
    return None if name is None else importlib.import_module(name)  # type: ignore[return-value]


def carries_initial_output(unroll: bool) -> bool:
    """Whether a masked step that precedes all others has the initial state as its output, and not zeros.

    Keras on JAX takes the state, but not where it unrolls the loop.
    """
    return bool(keras.backend.backend() == "jax" and not unroll)
