"""The engine on cuDNN, by way of PyTorch: copies NumPy arrays to a CUDA device, and results back.

With the CPU as device, PyTorch's own implementation takes cuDNN's place: tests without a CUDA device use that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedrnn.arrays import Array
from fusedrnn.engines.cudnn.operands import (
    Operands,
    PackedIndices,
    array_of,
    flatten,
    join,
    packed_indices,
    split,
    storage_bytes,
)
from fusedrnn.engines.cudnn.precision import full_precision
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, write_or_add
from fusedrnn.frozen_array import is_frozen
from fusedrnn.spec import RNNSpec


def make(spec: RNNSpec) -> CuDNNEngine:
    """The engine on the current CUDA device.

    Raises:
        NotImplementedError: If torch lacks CUDA or cuDNN, or there is no device; the message says which.
    """
    if torch.version.cuda is None:
        raise NotImplementedError(f"torch {torch.__version__} is built without CUDA")
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"torch {torch.__version__} is built without cuDNN")
    if not torch.cuda.is_available():
        raise NotImplementedError("there is no CUDA device that torch can use")
    if not torch.backends.cudnn.enabled:
        raise NotImplementedError("cuDNN is switched off (torch.backends.cudnn.enabled is False)")
    return CuDNNEngine(spec, torch.device("cuda", torch.cuda.current_device()))


@dataclass(frozen=True)
class CudnnResiduals:
    """What a training call saves.

    Attributes:
        operands: Its operands; None if no sequence has a step.
        results: The output and the final states, which hold PyTorch's graph; None if backward computes them again.
        indices: The rows that PyTorch got.
        nbytes: Bytes of device memory.
    """

    operands: Operands | None
    results: tuple[Tensor, ...] | None
    indices: PackedIndices
    nbytes: int


class CuDNNEngine:
    """Runs one spec on a PyTorch device; see :class:`fusedrnn.engines.interface.Engine`.

    Every call copies its arrays to the device and its results back. Parameters that can never change
    (:func:`fusedrnn.frozen`) stay there until a call has other frozen ones. In float32, TF32 is off while a call runs.

    Args:
        spec: What to run, without dropout, clipping, peepholes or other activations, which cuDNN lacks.
        device: Where to run it.
    """

    def __init__(self, spec: RNNSpec, device: torch.device | str) -> None:
        self.spec, self.device = spec, torch.device(device)
        self._resident: tuple[Array, tuple[Tensor, ...]] | None = None

    def compile(self, training: bool = False) -> None:
        """Start the device and its libraries with a call of one step."""
        zeros = self._zeros(1, 1)
        if training:
            self.train(zeros, "gates", 0)
        else:
            self.forward(zeros)

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.interface.Engine`."""
        indices = packed_indices(self.spec, operands.lengths, len(operands.x))
        results = None
        if not indices.empty:
            with self._torch_modes(differentiable=False):
                results = self._run(self._to_device(operands, indices), training=False)
        return self._write(results, indices, operands)

    def train(self, operands: ForwardOperands, save: SavePolicy, seed: int) -> tuple[tuple[Array, ...], CudnnResiduals]:
        """Training; see :class:`fusedrnn.engines.interface.Engine`. ``save="states"`` saves the operands."""
        indices = packed_indices(self.spec, operands.lengths, len(operands.x))
        if indices.empty:
            return self._write(None, indices, operands), CudnnResiduals(None, None, indices, 0)
        graph: list[Tensor] = []

        def add_to_graph(tensor: Tensor) -> Tensor:
            graph.append(tensor)
            return tensor

        with self._torch_modes(differentiable=True):
            tensors = self._to_device(operands, indices)
            with saved_tensors_hooks(add_to_graph, lambda tensor: tensor):
                results = self._run(tensors, training=True)
        final = self._write(results, indices, operands)
        saved = None if save == "states" else results
        nbytes = storage_bytes([tensors.x, *tensors.states, *tensors.weights, *graph, *(saved or ())])
        return final, CudnnResiduals(tensors, saved, indices, nbytes)

    def backward(self, residuals: CudnnResiduals, operands: BackwardOperands) -> None:
        """The gradients; see :class:`fusedrnn.engines.interface.Engine`."""
        tensors, indices, grads = residuals.operands, residuals.indices, operands.grads
        computed: dict[str, tuple[Array, ...]] = {}
        if tensors is not None:
            with self._torch_modes(differentiable=True):
                results = self._run(tensors, training=True) if residuals.results is None else residuals.results
                computed = self._differentiate(tensors, results, indices, operands)
        if grads.x is not None and computed:
            (dx,) = computed["x"]
            grads.x[indices.rows] = grads.x[indices.rows] + dx if grads.add_x else dx
        if grads.params is not None:
            dparams = computed["params"][0] if computed else np.zeros_like(grads.params)
            write_or_add(grads.params, dparams, grads.add_params)
        for index, buffer in enumerate(grads.states or ()):
            # An empty sequence passes the gradients of its states through.
            dstate = operands.dstates[index]
            gradient = np.zeros_like(buffer) if dstate is None else dstate.copy()
            if computed:
                gradient[:, indices.sequences] = computed["states"][index]
            write_or_add(buffer, gradient, grads.add_states)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The device memory that a call of that size saves, measured by such a call; with lengths it may be less."""
        return self.train(self._zeros(steps, batch), save, 0)[1].nbytes

    def _zeros(self, steps: int, batch: int) -> ForwardOperands:
        spec = self.spec
        shapes = (steps, batch, spec.input_size), (spec.layout.size,), (steps, batch, spec.output_size)
        x, params, y = (np.zeros(shape, spec.dtype) for shape in shapes)
        return ForwardOperands(x, params, None, None, y)

    @contextmanager
    def _torch_modes(self, differentiable: bool) -> Iterator[None]:
        """Set PyTorch's modes, whatever the caller's are: with a graph or without, no autocast, no TF32.

        Raises:
            MemoryError: If PyTorch cannot allocate memory.
        """
        may_use_tf32 = self.device.type == "cuda" and self.spec.dtype == "float32"
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            torch.autocast(self.device.type, enabled=False),
            full_precision if may_use_tf32 else nullcontext(),
        ):
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
                    raise MemoryError(str(error)) from error
                raise

    def _tensor(self, array: Array) -> Tensor:
        return torch.tensor(np.ascontiguousarray(array), device=self.device)

    def _to_device(self, operands: ForwardOperands, indices: PackedIndices) -> Operands:
        batch_sizes = indices.batch_sizes
        x = self._tensor(operands.x[indices.rows])
        if operands.states is None:
            batch = operands.x.shape[1] if batch_sizes is None else int(batch_sizes[0])
            initial = tuple(x.new_zeros(shape) for shape in self.spec.state_shape(batch))
        else:
            initial = tuple(self._tensor(state[:, indices.sequences]) for state in operands.states)
        for tensor in (x, *initial):
            tensor.requires_grad_()
        sizes = None if batch_sizes is None else torch.tensor(batch_sizes, device="cpu")
        return Operands(x, initial, self._weights(operands.params), sizes)

    def _weights(self, params: Array) -> tuple[Tensor, ...]:
        """The weights on the device, in PyTorch's order."""
        resident = self._resident
        if resident is not None and resident[0] is params:
            return resident[1]
        weights = split(self.spec, self._tensor(params))
        if self.device.type == "cuda":
            flatten(self.spec, weights)
        for weight in weights:
            weight.requires_grad_()
        if is_frozen(params):
            self._resident = params, weights
        return weights

    def _run(self, operands: Operands, training: bool) -> tuple[Tensor, ...]:
        """The output and the final states."""
        spec, sizes = self.spec, operands.batch_sizes
        run: Any = getattr(torch, spec.mode_name)
        hidden = operands.states if spec.mode == "lstm" else operands.states[0]
        options = operands.weights, spec.bias != "none", spec.num_layers, 0.0, training, spec.bidirectional
        return tuple(
            run(operands.x, hidden, *options, False) if sizes is None else run(operands.x, sizes, hidden, *options)
        )

    def _write(
        self, results: Sequence[Tensor] | None, indices: PackedIndices, operands: ForwardOperands
    ) -> tuple[Array, ...]:
        """Write the output and return the final states; those of an empty sequence are its initial ones."""
        states, y = operands.states, operands.y
        shapes = self.spec.state_shape(y.shape[1])
        final = [np.zeros(s, y.dtype) for s in shapes] if states is None else [state.copy() for state in states]
        if results is not None:
            y[indices.rows] = array_of(results[0])
            for array, state in zip(final, results[1:], strict=True):
                array[:, indices.sequences] = array_of(state)
        return tuple(final)

    def _differentiate(
        self, tensors: Operands, results: tuple[Tensor, ...], indices: PackedIndices, operands: BackwardOperands
    ) -> dict[str, tuple[Array, ...]]:
        """The requested gradients by name, for the rows and sequences that PyTorch got."""
        cotangents = [None if operands.dy is None else operands.dy[indices.rows]]
        cotangents += [None if dstate is None else dstate[:, indices.sequences] for dstate in operands.dstates]
        pairs = [(result, self._tensor(ct)) for result, ct in zip(results, cotangents, strict=True) if ct is not None]
        if not pairs:
            pairs = [(results[0], torch.zeros_like(results[0]))]
        groups = {"x": (tensors.x,), "states": tensors.states, "params": tensors.weights}
        requested = {name: leaves for name, leaves in groups.items() if getattr(operands.grads, name) is not None}
        if not requested:
            return {}
        outputs, grad_outputs = zip(*pairs, strict=True)
        inputs = [leaf for leaves in requested.values() for leaf in leaves]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = iter(torch.autograd.grad(outputs, inputs, grad_outputs, **options))
        groups = {name: tuple(next(gradients) for _ in leaves) for name, leaves in requested.items()}
        if "params" in groups:
            groups["params"] = (join(self.spec, groups["params"]),)
        return {name: tuple(map(array_of, group)) for name, group in groups.items()}
