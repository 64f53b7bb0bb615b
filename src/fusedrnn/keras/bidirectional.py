"""Keras's Bidirectional on the fused operator: both directions in one call."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from fusedrnn.keras import backends
from fusedrnn.keras.cell_spec import cells_of, refusal, spec_of
from fusedrnn.keras.fused_loop import NESTED, can_read, read_steps
from fusedrnn.keras.layers import GRU, LSTM, RNN, SimpleRNN
from fusedrnn.keras.own_calls import has_own_calls
from fusedrnn.keras.parameters import Parameters

_CLASSES = RNN, LSTM, GRU, SimpleRNN
_MERGES = {
    "sum": lambda forward, backward: forward + backward,
    "ave": lambda forward, backward: (forward + backward) / 2,
    "mul": lambda forward, backward: forward * backward,
    None: lambda forward, backward: (forward, backward),
}


class Bidirectional(keras.layers.Bidirectional):
    """:class:`keras.layers.Bidirectional` on the fused operator: constructor, weights and results are Keras's.

    Two of our layers that differ only in their direction run in one call of the operator. Otherwise each direction runs
    as its own layer does; so do subclasses of our layers, and layers with hooks or a call of their own.

    Example:
        >>> layer = Bidirectional(LSTM(16, return_sequences=True))
        >>> layer(np.zeros((4, 30, 5), np.float32)).shape
        (4, 30, 32)
    """

    def call(self, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = None) -> Any:
        """The merged outputs, and the final states of both directions if they are returned."""
        results = _run(self, sequences, initial_state, mask, training)
        if results is not None:
            return results
        return super().call(sequences, initial_state=initial_state, mask=mask, training=training)


def differ_in_direction_only(layer: Any) -> bool:
    """Whether one call of the operator runs both layers of a Bidirectional."""
    forward, backward = layer.forward_layer, layer.backward_layer
    # A subclass may have any method of its own, which only its own call runs.
    if type(forward) not in _CLASSES or type(backward) is not type(forward):
        return False
    if any([has_own_calls(each) for each in (forward, backward, forward.cell, backward.cell)]):
        return False
    return (
        len(cells_of(forward.cell)) == 1
        and not forward.go_backwards
        and backward.go_backwards
        and forward.unroll == backward.unroll
        # Keras reads these of the layers for what they return, and of the wrapper for what it merges.
        and forward.return_sequences == backward.return_sequences == layer.return_sequences
        and forward.return_state == backward.return_state == layer.return_state
        and not (forward.stateful or backward.stateful)
        and forward.activity_regularizer is None
        and backward.activity_regularizer is None
        and not refusal(forward.cell)
        and not refusal(backward.cell)
        and forward.built
        and backward.built
        and {each.compute_dtype for each in (forward, backward, forward.cell, backward.cell)} == {layer.compute_dtype}
        # The same object: torch.compile cannot compare specs.
        and spec_of(forward.cell, layer.compute_dtype) is spec_of(backward.cell, layer.compute_dtype)
        and forward.cell.use_bias == backward.cell.use_bias
    )


def _run(layer: Bidirectional, sequences: Any, initial_state: Any, mask: Any, training: Any) -> Any:
    """The results of one call of the operator; None if each direction is to run by itself."""
    backend, forward, backward = backends.BACKEND, layer.forward_layer, layer.backward_layer
    if backend is None or not differ_in_direction_only(layer) or not can_read(forward, sequences, mask):
        return None
    cells = forward.cell, backward.cell
    if training and any(cell.dropout > 0 or cell.recurrent_dropout > 0 for cell in cells):
        return None
    zero = backends.zeroes_masked_outputs(forward), backends.zeroes_masked_outputs(backward)
    if mask is not None and zero != (forward.return_sequences,) * 2:
        return None
    x, steps = read_steps(backend, forward, sequences, mask)
    states = _initial_states(layer, initial_state, x)
    if states is None:
        return None
    results = backend.run(
        spec_of(cells[0], layer.compute_dtype, bidirectional=True), x, states, [Parameters.of(cell) for cell in cells],
        None if steps is None else steps.lengths,
    )  # fmt: skip
    if results is None:
        return None
    _draw_masks(cells, x, states)
    y, final = results
    if not layer.return_sequences:
        before = states[0] if backends.carries_initial_output(forward.unroll) else (None, None)
        last = final[0] if steps is None else [
            steps.last_output(h, h0, are_zero=False) for h, h0 in zip(final[0], before, strict=True)
        ]  # fmt: skip
        outputs = _merged(layer.merge_mode, last[0], last[1])
    else:
        y = (y if steps is None else steps.outputs(y, None, are_zero=True)).swapaxes(0, 1)
        outputs = y if layer.merge_mode == "concat" else _merged(layer.merge_mode, *ops.split(y, 2, axis=-1))
    if not layer.return_state:
        return outputs
    returned = [state[direction] for direction in (0, 1) for state in final]
    return (*outputs, *returned) if layer.merge_mode is None else (outputs, *returned)


def _draw_masks(cells: Any, x: Any, states: Any) -> None:
    """Draw masks of dropout from the seeds and drop them, as Keras's layers do in inference."""
    for cell, state in zip(cells, states[0], strict=True):
        cell.get_dropout_mask(x[0])
        cell.get_recurrent_dropout_mask(state)
        cell.reset_dropout_mask()
        cell.reset_recurrent_dropout_mask()


def _merged(mode: str | None, forward: Any, backward: Any) -> Any:
    if mode == "concat":
        return ops.concatenate([forward, backward], axis=-1)
    return _MERGES[mode](forward, backward)


def _initial_states(layer: Bidirectional, initial_state: Any, x: Any) -> list[Any] | None:
    """The initial states, each (2, N, H); None if they are no list of tensors that fits the cells."""
    cell, batch = layer.forward_layer.cell, x.shape[1]
    count = len(cell.state_size) if isinstance(cell.state_size, NESTED) else 1
    if initial_state is None:
        return [ops.zeros((2, batch, cell.units), dtype=layer.compute_dtype) for _ in range(count)]
    # A single tensor is one state for Keras, and what is no tensor is an error of Keras's.
    states = list(initial_state) if isinstance(initial_state, NESTED) else []
    shapes = [tuple(getattr(state, "shape", ())) for state in states]
    if shapes != [(batch, cell.units)] * (2 * count):
        return None
    return [
        ops.cast(ops.stack([states[number], states[count + number]]), layer.compute_dtype) for number in range(count)
    ]
