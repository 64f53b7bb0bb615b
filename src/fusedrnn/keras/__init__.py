"""Keras's recurrent layers on the fused operator, with the same constructors, weights and results.

``from fusedrnn.keras import LSTM`` replaces ``keras.layers.LSTM``; :func:`accelerate` replaces the layers of an
existing model. Keras must run on PyTorch or JAX. What the operator does not support (other activations, dropout of
states, other devices) runs by Keras's own loop.
"""

from fusedrnn.extras import needed_by

with needed_by("fusedrnn.keras", "keras"):
    import keras as _keras  # noqa: F401 -- for a clear error if it is missing

from fusedrnn.conversion_report import LayerReport, Report
from fusedrnn.keras import saving as _saving
from fusedrnn.keras.bidirectional import Bidirectional
from fusedrnn.keras.conversion import accelerate, restore
from fusedrnn.keras.layers import GRU, LSTM, RNN, SimpleRNN

_saving.register(RNN, LSTM, GRU, SimpleRNN, Bidirectional)

__all__ = ["GRU", "LSTM", "RNN", "Bidirectional", "LayerReport", "Report", "SimpleRNN", "accelerate", "restore"]
