"""The loop of a Keras layer over the steps of its input, run by the fused operator."""

from __future__ import annotations

from typing import Any

from keras import ops, tree

from fusedrnn.keras import backends
from fusedrnn.keras.backends import Backend
from fusedrnn.keras.cell_spec import cells_of, draws_masks_of_ours, refusal, spec_of
from fusedrnn.keras.masked_steps import MaskedSteps
from fusedrnn.keras.own_calls import has_own_calls
from fusedrnn.keras.parameters import Parameters

NESTED = list, tuple


class FusedLoop:
    """A mixin for :class:`keras.layers.RNN` and its subclasses.

    A call that the operator does not support runs the loop of the next class in the method resolution order.
    """

    activity_regularizer: Any
    built: bool
    cell: Any
    compute_dtype: str
    go_backwards: bool
    return_sequences: bool
    stateful: bool
    unroll: bool
    zero_output_for_mask: bool

    def inner_loop(self, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        """The last output (N, H), the output of each step and the final states, like Keras's ``inner_loop``."""
        results = _run(self, sequences, initial_state, mask, training)
        if results is not None:
            return results
        return super().inner_loop(sequences, initial_state, mask, training=training)  # type: ignore[misc]


def _run(layer: FusedLoop, sequences: Any, initial_state: Any, mask: Any, training: Any) -> Any:
    """The results of :meth:`FusedLoop.inner_loop`; None if Keras's own loop is to run."""
    backend, cells = backends.BACKEND, cells_of(layer.cell)
    if backend is None or not can_read(layer, sequences, mask) or not _can_run(layer, cells, training):
        return None
    states = _flat_states(initial_state, cells, sequences.shape[0])
    if states is None:
        return None
    if layer.stateful:  # Keras writes the new states over the old ones before backward
        states = tree.map_structure(ops.copy, states)
    x, steps = read_steps(backend, layer, sequences, mask)
    before = states[-1][0] if backends.carries_initial_output(layer.unroll) else None
    final = []
    for cell, own in zip(cells, states, strict=True):
        if training and cell.dropout > 0:
            x = x * cell.get_dropout_mask(x[0])
        results = backend.run(
            spec_of(cell, layer.compute_dtype), x, [state[None] for state in own], [Parameters.of(cell)],
            None if steps is None else steps.lengths,
        )  # fmt: skip
        if results is None:
            return None
        x, new = results
        final.append([state[0] for state in new])
    return *_outputs(layer, steps, x, final[-1][0], before), _as_nested(final, initial_state)


def can_read(layer: Any, sequences: Any, mask: Any) -> bool:
    """Whether the operator supports an input and a mask of these shapes, and the layer does not require cuDNN."""
    shape = () if isinstance(sequences, (dict, *NESTED)) else tuple(sequences.shape)
    if len(shape) != 3 or None in shape or 0 in shape:
        return False
    mask, cell = first_of(mask), cells_of(layer.cell)[0]
    if backends.requires_cudnn(layer, mask):
        return False
    is_mask = mask is None or tuple(mask.shape) == shape[:2]
    return is_mask and getattr(cell, "built", False) and shape[2] == cell.kernel.shape[0]


def first_of(mask: Any) -> Any:
    """The mask of the input. Keras may pass a list that also has a mask for each state."""
    return mask[0] if isinstance(mask, NESTED) else mask


def _can_run(layer: FusedLoop, cells: Any, training: Any) -> bool:
    compute_dtype = layer.compute_dtype
    if refusal(layer.cell) or any([cell.compute_dtype != compute_dtype for cell in cells]):
        return False
    if any([has_own_calls(cell) for cell in (layer.cell, *cells)]):
        return False
    if not training:
        return True
    return all(draws_masks_of_ours(cell) for cell in cells if cell.dropout > 0 or cell.recurrent_dropout > 0)


def read_steps(backend: Backend, layer: Any, sequences: Any, mask: Any) -> tuple[Any, MaskedSteps | None]:
    """The input (T, N, I) in the order in which a layer reads it, and its masked steps, None if there are none."""
    mask = first_of(mask)
    # call() itself takes NumPy's arrays too, which only __call__ converts.
    x = (sequences if ops.is_tensor(sequences) else ops.convert_to_tensor(sequences)).swapaxes(0, 1)
    mask = None if mask is None else ops.cast(ops.swapaxes(mask, 0, 1), "bool")
    if getattr(layer, "go_backwards", False):
        x, mask = ops.flip(x, axis=0), None if mask is None else ops.flip(mask, axis=0)
    is_padding = None if mask is None else backend.padding_of(mask)
    if is_padding is None:
        return x, None
    steps = MaskedSteps(mask, is_padding)
    return steps.to_front(x), steps


def _flat_states(initial_state: Any, cells: Any, batch: int) -> list[list[Any]] | None:
    """The states of each cell, in lists; None if a shape is unusual."""
    nested = initial_state if len(cells) > 1 else [initial_state]
    if not isinstance(nested, NESTED) or len(nested) != len(cells):
        return None
    states = [list(own) if isinstance(own, NESTED) else [own] for own in nested]
    for cell, own in zip(cells, states, strict=True):
        count = len(cell.state_size) if isinstance(cell.state_size, NESTED) else 1
        if len(own) != count or any(tuple(state.shape) != (batch, cell.units) for state in own):
            return None
    return states


def _as_nested(final: list[list[Any]], initial_state: Any) -> Any:
    """The final states, nested as the initial states are."""
    if len(final) == 1:
        return final[0]
    return [own if isinstance(before, NESTED) else own[0] for own, before in zip(final, initial_state, strict=True)]


def _outputs(layer: FusedLoop, steps: MaskedSteps | None, y: Any, h: Any, before: Any) -> tuple[Any, Any]:
    """The output of the last step (N, H), and the outputs of all steps (N, T, H) if the layer returns them."""
    if steps is None:
        return h, y.swapaxes(0, 1) if layer.return_sequences else h
    are_zero = backends.zeroes_masked_outputs(layer)
    last = steps.last_output(h, before, are_zero)
    if not layer.return_sequences:
        return last, last
    return last, steps.outputs(y, before, are_zero).swapaxes(0, 1)
