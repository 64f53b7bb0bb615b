"""Keras's recurrent layers on the fused operator."""

from __future__ import annotations

import keras

from fusedrnn.keras.fused_loop import FusedLoop


class RNN(FusedLoop, keras.layers.RNN):
    """:class:`keras.layers.RNN` on the fused operator, for Keras's three cells and for stacks of them.

    The constructor, the weights and the results are Keras's. With other cells it runs as Keras's layer.

    Example:
        >>> layer = RNN([keras.layers.GRUCell(16), keras.layers.GRUCell(8)], return_sequences=True)
        >>> layer(np.zeros((4, 30, 5), np.float32)).shape
        (4, 30, 8)
    """


class LSTM(FusedLoop, keras.layers.LSTM):
    """:class:`keras.layers.LSTM` on the fused operator: the constructor, the weights and the results are Keras's.

    Example:
        >>> layer = LSTM(16, return_sequences=True)
        >>> layer(np.zeros((4, 30, 5), np.float32)).shape
        (4, 30, 16)
    """


class GRU(FusedLoop, keras.layers.GRU):
    """:class:`keras.layers.GRU` on the fused operator: the constructor, the weights and the results are Keras's."""


class SimpleRNN(FusedLoop, keras.layers.SimpleRNN):
    """:class:`keras.layers.SimpleRNN` on the fused operator: constructor, weights and results are Keras's."""
