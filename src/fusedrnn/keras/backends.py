"""The operator for the tensors of Keras's backend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import keras

from fusedrnn.keras.parameters import Parameters, Results
from fusedrnn.spec import RNNSpec

_MODULES = {"torch": "fusedrnn.keras.on_torch", "jax": "fusedrnn.keras.on_jax"}


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


def _loaded() -> Any:
    name = _MODULES.get(keras.backend.backend())
    return None if name is None else importlib.import_module(name)


BACKEND: Backend | None = _loaded()
"""The backend of this process; None if the operator does not run on its tensors."""


def carries_initial_output(unroll: bool) -> bool:
    """Whether a masked step that precedes all others has the initial state as its output, and not zeros.

    Keras on JAX takes the state, but not where it unrolls the loop.
    """
    return bool(keras.backend.backend() == "jax" and not unroll)
