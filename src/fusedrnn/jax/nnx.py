"""flax.nnx's recurrent layers on the fused operator, with the same constructors, parameters and results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusedrnn.extras import needed_by

with needed_by("fusedrnn.jax.nnx", "flax"):
    from flax import nnx
    from flax.nnx.nn.recurrent import flip_sequences

from fusedrnn.jax import nnx_cells
from fusedrnn.jax.mesh_types import vary_with
from fusedrnn.jax.nnx_scan import run_scan, without_time
from fusedrnn.jax.param_arrays import ParamArrays
from fusedrnn.jax.rnn import rnn, uncut
from fusedrnn.spec import RNNSpec

__all__ = ["RNN", "Bidirectional"]

Array = Any
Carry = Any


class RNN(nnx.RNN):
    """``nnx.RNN`` that runs its cell by the fused operator, for the whole sequence.

    The constructor, the call, the parameters and the random state are those of ``nnx.RNN``. The operator runs
    ``LSTMCell``, ``OptimizedLSTMCell``, ``GRUCell`` and ``SimpleCell`` that compute in float32 or float64, with
    activations that :class:`fusedrnn.RNNSpec` has. All other cells run by flax's scan; :attr:`refusal` says why.

    With ``seq_lengths`` two things differ from ``nnx.RNN``, whether the operator or flax's scan runs: outputs after the
    end of a sequence are zero, and the final carry of a sequence of length 0 is its initial carry.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from fusedrnn.jax.nnx import RNN
        >>> layer = RNN(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0)))
        >>> layer(jnp.ones((2, 7, 3))).shape
        (2, 7, 5)
    """

    @property
    def refusal(self) -> str:
        """Why calls run flax's scan with any input; empty if they run the operator."""
        return refusal(self)

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Run the cell over the sequences.

        Args:
            inputs: (..., T, I), or (T, ..., I) if time-major; the dots stand for any number of axes.
            initial_carry: A carry such as the cell's ``initialize_carry`` returns, which is the default.
            seq_lengths: The valid steps of each sequence, integers from 0 to T of the shape of the batch axes; a list
                of them, too.
            return_carry: Whether to return the final carry too.
            time_major: Whether the first axis is the time.
            reverse: Whether to run from the end of each sequence to its beginning.
            keep_order: Whether the output of a reversed run is in the order of the input.
            rngs: Random numbers for the initial carry.

        Returns:
            The output, (..., T, H) or (T, ..., H), or the final carry and the output. None for one of the options from
            ``return_carry`` to ``keep_order`` stands for the constructor's.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        seq_lengths = None if seq_lengths is None else uncut(seq_lengths)
        runs_operator = not refusal(self)
        if runs_operator:
            inputs = jnp.asarray(inputs)
        if initial_carry is None and (runs_operator or seq_lengths is not None):
            rngs = _rng_stream(self, rngs)
            initial_carry = _initial_carry(self, inputs, time_major, rngs)
        if runs_operator:
            call = fused_call([self.cell], inputs, [initial_carry], seq_lengths, time_major, reverse)
            if call is not None:
                (carry,), outputs = call
                if reverse and not keep_order:
                    num_batch_dims = inputs.ndim - 2
                    outputs = flip_sequences(outputs, seq_lengths, num_batch_dims, time_major)
                return (carry, outputs) if return_carry else outputs
        return run_scan(
            self, inputs, initial_carry=initial_carry, seq_lengths=seq_lengths, return_carry=return_carry,
            time_major=time_major, reverse=reverse, keep_order=keep_order, rngs=rngs,
        )  # fmt: skip


class Bidirectional(nnx.Bidirectional):
    """``nnx.Bidirectional`` that runs both directions in one call of the fused operator.

    It does so if both directions are of the class ``nnx.RNN`` or ours, and have cells that the operator runs, of the
    same class, size and dtype. Otherwise each direction runs by itself; :attr:`refusal` says why.
    """

    @property
    def refusal(self) -> str:
        """Why the directions run one after the other with any input; empty if one call runs both."""
        return refusal_of_pair(self)

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: tuple[Carry, Carry] | None = None,
        rngs: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Run both directions and merge their outputs; see :meth:`RNN.__call__` for the arguments.

        Args:
            inputs: (..., T, I), or (T, ..., I) if time-major.
            initial_carry: The initial carry of each direction; one array may have both, along its first axis.
            rngs: Random numbers for the initial carries.
            seq_lengths: The valid steps of each sequence.
            return_carry: Whether to return the final carries too.
            time_major: Whether the first axis is the time.
            reverse: Has no effect, as in flax.
            keep_order: Has no effect, as in flax.

        Returns:
            The merged output, or the final carry of each direction and the merged output.
        """
        time_major = self.time_major if time_major is None else time_major
        return_carry = self.return_carry if return_carry is None else return_carry
        seq_lengths = None if seq_lengths is None else uncut(seq_lengths)
        if not refusal_of_pair(self):
            inputs, rngs = jnp.asarray(inputs), self.rngs if rngs is None else rngs
            rngs = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
            layers = self.forward_rnn, self.backward_rnn
            carries = [
                _initial_carry(layer, inputs, time_major, rngs) if carry is None else carry
                for layer, carry in zip(layers, _carry_of_each(initial_carry), strict=True)
            ]
            initial_carry = carries[0], carries[1]
            call = fused_call([layer.cell for layer in layers], inputs, carries, seq_lengths, time_major, False)
            if call is not None:
                outputs = self._merged(call[1])
                return (tuple(call[0]), outputs) if return_carry else outputs
        if seq_lengths is not None:
            return self._one_by_one(inputs, initial_carry, rngs, seq_lengths, return_carry, time_major)
        return super().__call__(
            inputs, initial_carry=initial_carry, rngs=rngs, return_carry=return_carry, time_major=time_major,
        )  # fmt: skip

    def _one_by_one(
        self, inputs: Array, initial_carry: Any, rngs: Any, seq_lengths: Array, return_carry: bool, time_major: bool
    ) -> Any:
        """What flax's call does, with our rules for ``seq_lengths``, which flax's own directions do not have."""
        rngs = self.rngs if rngs is None else rngs
        rngs = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        layers = self.forward_rnn, self.backward_rnn
        results = []
        for layer, carry, reverse in zip(layers, _carry_of_each(initial_carry), (False, True), strict=True):
            call = RNN.__call__ if type(layer) is nnx.RNN else type(layer).__call__
            results.append(call(
                layer, inputs, initial_carry=carry, rngs=rngs, seq_lengths=seq_lengths, return_carry=True,
                time_major=time_major, reverse=reverse, keep_order=True,
            ))  # fmt: skip
        carries, outputs = zip(*results, strict=True)
        merged = jax.tree.map(self.merge_fn, *outputs)
        return (carries, merged) if return_carry else merged

    def _merged(self, outputs: Array) -> Any:
        if self.merge_fn is nnx.Bidirectional.merge_fn:  # the operator has concatenated them
            return outputs
        return jax.tree.map(self.merge_fn, *jnp.split(outputs, 2, axis=-1))


def _carry_of_each(initial_carry: Any) -> tuple[Carry | None, Carry | None]:
    """The initial carry of each direction; None for the default."""
    if initial_carry is None:
        return None, None
    forward, backward = initial_carry  # also of an array, which has no truth value
    return forward, backward


def refusal_of_pair(layer: Any) -> str:
    """Why the directions of a layer of the class ``nnx.Bidirectional`` run one by one; empty if one call runs both."""
    pair = layer.forward_rnn, layer.backward_rnn
    for direction in pair:
        if type(direction) not in (nnx.RNN, RNN):
            return f"one of its directions is {type(direction).__name__}, not RNN"
        if reason := refusal(direction):
            return f"of one of its directions, {reason}"
    if pair[0] is pair[1]:
        return "both directions are the same layer"
    cells = [direction.cell for direction in pair]
    if type(cells[0]) is not type(cells[1]) or len({nnx_cells.spec_of(cell, "float32") for cell in cells}) > 1:
        return "its directions have different cells"
    return ""


def refusal(layer: Any) -> str:
    """Why the operator does not run a layer of the class ``nnx.RNN`` with any input; empty if it runs it."""
    if layer.broadcast_rngs is not None:
        return "it splits random numbers for its cell (broadcast_rngs)"
    if any(axes not in (None, nnx.Carry) for axes in layer.state_axes.values()):
        return "its cell has other state at each step (state_axes)"
    return nnx_cells.refusal(layer.cell)


def _rng_stream(layer: Any, rngs: Any) -> Any:
    """The random numbers for the initial carry, as ``nnx.RNN`` takes them; with these, it does not take others."""
    rngs = layer.rngs if rngs is None else rngs
    return rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs


def _initial_carry(layer: Any, inputs: Array, time_major: bool, rngs: Any) -> Carry:
    """The carry with which ``nnx.RNN`` begins, from the same random numbers; it varies over a mesh as the inputs do."""
    _, shape = without_time(layer, inputs, time_major)
    return vary_with(inputs, layer.cell.initialize_carry(shape, _rng_stream(layer, rngs)))


def fused_call(
    cells: Sequence[Any],
    inputs: Array,
    carries: Sequence[Carry],
    lengths: Array | None,
    time_major: bool,
    reverse: bool,
) -> tuple[list[Carry], Array] | None:
    """Run the operator with a cell for each direction; None if flax is to run, or to raise its error.

    Returns:
        The final carry of each direction, and the output of both, in the order of the input.
    """
    if inputs.ndim < 2 or 0 in inputs.shape or inputs.shape[-1] != cells[0].in_features:
        return None
    # With lengths, flax's scan would compute after the end too.
    if lengths is None and inputs.shape[0 if time_major else -2] == 1 and isinstance(inputs, jax.core.Tracer):
        return None  # in a graph, the check whether the parameters have changed takes as long as a step
    states = [_states(cell, carry) for cell, carry in zip(cells, carries, strict=True)]
    batch_dims = inputs.shape[1:-1] if time_major else inputs.shape[:-2]
    shape = (*batch_dims, cells[0].hidden_features)
    if any(state.shape != shape for own in states for state in own):
        return None
    if lengths is not None:
        if lengths.shape != batch_dims or not jnp.issubdtype(lengths.dtype, jnp.integer):
            return None
        lengths = lengths.reshape(-1)
    dtypes = {nnx_cells.dtype_of(cell, inputs, own) for cell, own in zip(cells, states, strict=True)}
    dtype = dtypes.pop()
    if dtypes or dtype is None or not all(map(nnx_cells.has_its_sizes, cells)):
        return None
    spec = nnx_cells.spec_of(cells[0], dtype, reverse=reverse, bidirectional=len(cells) == 2)
    return _run(spec, nnx_cells.params_of(spec, cells), inputs, states, lengths, time_major)


def _run(
    spec: RNNSpec, params: ParamArrays, inputs: Array, states: Sequence[Sequence[Array]], lengths: Any, time_major: bool
) -> tuple[list[Carry], Array]:
    features, batch_dims = inputs.shape[-1], inputs.shape[1:-1] if time_major else inputs.shape[:-2]
    axes = (inputs.shape[0], math.prod(batch_dims)) if time_major else (math.prod(batch_dims), inputs.shape[-2])
    x = inputs.reshape(*axes, features).astype(spec.dtype)
    initial = tuple(
        jnp.stack(state).reshape(len(state), -1, spec.hidden_size) for state in zip(*states, strict=True)
    )  # fmt: skip
    y, final = rnn(spec, params, x, initial, lengths, batch_first=not time_major)
    outputs = y.reshape(*inputs.shape[:-1], spec.output_size)
    return [_carry([state[d].reshape(*batch_dims, -1) for state in final]) for d in range(len(states))], outputs


def _states(cell: Any, carry: Carry) -> tuple[Array, ...]:
    """The states of the operator, h first, from the carry of a cell of flax: (c, h) in an LSTM, else h."""
    return tuple(map(jnp.asarray, reversed(carry))) if isinstance(carry, (tuple, list)) else (jnp.asarray(carry),)


def _carry(states: Sequence[Array]) -> Carry:
    return tuple(reversed(states)) if len(states) > 1 else states[0]
