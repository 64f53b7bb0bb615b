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
            parameters: The parameters of each direction.
            lengths: Valid steps of each sequence, integers (N,); None for T everywhere.
        """

    def padding_of(self, mask: Any) -> bool | None:
        """Whether all masked steps come after the others; None if no step is masked.

        While a graph is traced or a function is mapped, the values of the mask are not known, and masked steps may be
        anywhere.

        Args:
            mask: Bools (T, N).
        """


def _loaded() -> Any:
    name = _MODULES.get(keras.backend.backend())
    return None if name is None else importlib.import_module(name)


BACKEND: Backend | None = _loaded()
"""The backend of this process; None if the operator does not run on its tensors."""


def carries_initial_output(unroll: bool) -> bool:
    """Whether the output of masked steps at the beginning is the initial state rather than zeros.

    Keras on JAX takes the initial state, except where it unrolls the loop.
    """
    return bool(keras.backend.backend() == "jax" and not unroll)


def zeroes_masked_outputs(layer: Any) -> bool:
    """Whether the output of masked steps is zero rather than that of the step before.

    Where Keras unrolls the loop on JAX, ``zero_output_for_mask`` has no effect.
    """
    return bool(layer.zero_output_for_mask and not (layer.unroll and keras.backend.backend() == "jax"))


def requires_cudnn(layer: Any, mask: Any = None) -> bool:
    """Whether ``use_cudnn=True`` is for Keras to refuse: with a ValueError, where it has no such loop.

    Keras has one on every device, but not for masks, dropout of states and GRUs without ``reset_after``, and on JAX not
    for LSTMs and unrolled loops.
    """
    if getattr(layer, "use_cudnn", None) is not True:
        return False
    cell = layer.cell
    is_unusual = cell.recurrent_dropout > 0 or not getattr(cell, "reset_after", True) or mask is not None
    is_lstm = isinstance(layer, keras.layers.LSTM)
    return bool(is_unusual or (keras.backend.backend() == "jax" and (is_lstm or layer.unroll)))
