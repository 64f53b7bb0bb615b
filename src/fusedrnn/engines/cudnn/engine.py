"""cuDNN behind the operator, by way of PyTorch's binding: NumPy arrays go to a CUDA device, and results come back.

The same code runs on tensors in the memory of the processor, where PyTorch's own implementation takes cuDNN's place:
that is how it is tested where there is no CUDA device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fusedrnn.engines.cudnn.operands import (
    Memory,
    Operands,
    Places,
    array_of,
    flatten,
    is_out_of_memory,
    join,
    places,
    split,
)
from fusedrnn.engines.cudnn.precision import full_precision
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, write_or_add
from fusedrnn.frozen_array import is_frozen
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]


def make(spec: RNNSpec) -> CuDNNEngine:
    """The engine on the current CUDA device.

    Raises:
        NotImplementedError: Saying what is not there.
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
    """PyTorch's graph of a call, or only what it was made from, to make it again; and the device memory held.

    ``operands`` is None if no sequence had a step; ``results`` are the output and the final states.
    """

    operands: Operands | None
    results: tuple[Tensor, ...] | None
    where: Places
    nbytes: int


class CuDNNEngine:
    """Runs one spec on a device of PyTorch's; see :class:`fusedrnn.engines.interface.Engine`.

    Every call copies its arrays to the device and its results back; parameters that can never change
    (:func:`fusedrnn.frozen`) stay there until others come. In float32, TF32 is off while a call runs.

    Args:
        spec: What to run: dropout, clipping, peepholes and other functions are not cuDNN's.
        device: Where; on the processor, PyTorch's own implementation runs.
    """

    def __init__(self, spec: RNNSpec, device: torch.device | str) -> None:
        self.spec, self.device = spec, torch.device(device)
        self._resident: tuple[Array, tuple[Tensor, ...]] | None = None

    def compile(self, training: bool = False) -> None:
        """Start the device and its libraries, by a call of one step."""
        if training:
            self.train(self._blank(1, 1), "gates", 0)
        else:
            self.forward(self._blank(1, 1))

    def forward(self, operands: ForwardOperands) -> tuple[Array, ...]:
        """Inference; see :class:`fusedrnn.engines.interface.Engine`."""
        x, params, states, lengths, y = operands
        where = places(self.spec, lengths, len(x))
        results = None
        if not where.empty:
            with self._ours(differentiable=False):
                results = self._run(self._operands(x, params, states, where), training=False)
        return self._write(results, where, states, y)

    def train(
        self, operands: ForwardOperands, save: SavePolicy, seed: int
    ) -> tuple[tuple[Array, ...], CudnnResiduals]:
        """Training; see :class:`fusedrnn.engines.interface.Engine`. To save states alone is to save the operands."""
        x, params, states, lengths, y = operands
        where = places(self.spec, lengths, len(x))
        if where.empty:
            return self._write(None, where, states, y), CudnnResiduals(None, None, where, 0)
        memory = Memory()
        with self._ours(differentiable=True):
            tensors = self._operands(x, params, states, where)
            for tensor in tensors.tensors:
                memory.add(tensor)
            with saved_tensors_hooks(memory.add, lambda tensor: tensor):
                results = self._run(tensors, training=True)
        final = self._write(results, where, states, y)
        if save == "states":
            return final, CudnnResiduals(tensors, None, where, memory.nbytes)
        for tensor in results:
            memory.add(tensor)
        return final, CudnnResiduals(tensors, results, where, memory.nbytes)

    def backward(self, residuals: CudnnResiduals, operands: BackwardOperands) -> None:
        """The gradients; see :class:`fusedrnn.engines.interface.Engine`."""
        where, tensors, grads = residuals.where, residuals.operands, operands.grads
        results: dict[str, tuple[Array, ...]] = {}
        if tensors is not None:
            with self._ours(differentiable=True):
                outputs = self._run(tensors, training=True) if residuals.results is None else residuals.results
                results = self._differentiate(tensors, outputs, where, operands)
        if grads.x is not None and results:
            (dx,) = results["x"]
            grads.x[where.rows] = grads.x[where.rows] + dx if grads.add_x else dx
        if grads.params is not None:
            flat = results["params"][0] if results else np.zeros_like(grads.params)
            write_or_add(grads.params, flat, grads.add_params)
        for index, buffer in enumerate(grads.states or ()):
            # An empty sequence passes the gradients of its states through.
            dstate = operands.dstates[index]
            gradient = np.zeros_like(buffer) if dstate is None else dstate.copy()
            if results:
                gradient[:, where.order] = results["states"][index]
            write_or_add(buffer, gradient, grads.add_states)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """The device memory that a call of that size saves, measured by one; with lengths it may be less."""
        return self.train(self._blank(steps, batch), save, 0)[1].nbytes

    def _blank(self, steps: int, batch: int) -> ForwardOperands:
        """Zeros for the operands of a call."""
        spec = self.spec
        shapes = (steps, batch, spec.input_size), (spec.layout.size,), (steps, batch, spec.output_size)
        x, params, y = (np.zeros(shape, spec.dtype) for shape in shapes)
        return ForwardOperands(x, params, None, None, y)

    @contextmanager
    def _ours(self, differentiable: bool) -> Iterator[None]:
        """Whatever modes the caller is in: a graph or none, no autocast, float32 as such.

        Raises:
            MemoryError: If torch has no memory.
        """
        rounds = self.device.type == "cuda" and self.spec.dtype == "float32"
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            torch.autocast(self.device.type, enabled=False),
            full_precision if rounds else nullcontext(),
        ):
            try:
                yield
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise MemoryError(str(error)) from error
                raise

    def _tensor(self, array: Array) -> Tensor:
        """A copy on the device."""
        return torch.tensor(np.ascontiguousarray(array), device=self.device)

    def _operands(self, x: Array, params: Array, states: Sequence[Array] | None, where: Places) -> Operands:
        data = self._tensor(x[where.rows])
        rows = x.shape[1] if where.batch_sizes is None else int(where.batch_sizes[0])
        if states is None:
            initial = tuple(data.new_zeros(shape) for shape in self.spec.state_shape(rows))
        else:
            initial = tuple(self._tensor(state[:, where.order]) for state in states)
        sizes = None if where.batch_sizes is None else torch.tensor(where.batch_sizes, device="cpu")
        for tensor in (data, *initial):
            tensor.requires_grad_()
        return Operands(data, initial, self._weights(params), sizes)

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
        function: Any = getattr(torch, spec.mode)
        hidden = operands.states if spec.mode == "lstm" else operands.states[0]
        options = spec.bias != "none", spec.num_layers, 0.0, training, spec.bidirectional
        if sizes is None:
            results = function(operands.x, hidden, operands.weights, *options, False)
        else:
            results = function(operands.x, sizes, hidden, operands.weights, *options)
        return tuple(results)

    def _write(
        self, results: Sequence[Tensor] | None, where: Places, states: Sequence[Array] | None, y: Array
    ) -> tuple[Array, ...]:
        """Write the output; the final states: of an empty sequence, the initial ones."""
        shapes = self.spec.state_shape(y.shape[1])
        final = [np.zeros(shape, y.dtype) for shape in shapes] if states is None else [one.copy() for one in states]
        if results is not None:
            y[where.rows] = array_of(results[0])
            for into, state in zip(final, results[1:], strict=True):
                into[:, where.order] = array_of(state)
        return tuple(final)

    def _differentiate(
        self,
        tensors: Operands,
        results: tuple[Tensor, ...],
        where: Places,
        operands: BackwardOperands,
    ) -> dict[str, tuple[Array, ...]]:
        """The requested gradients by name, for the rows and sequences that PyTorch was given."""
        cotangents = [None if operands.dy is None else operands.dy[where.rows]]
        cotangents += [None if dstate is None else dstate[:, where.order] for dstate in operands.dstates]
        pairs = [(result, self._tensor(ct)) for result, ct in zip(results, cotangents, strict=True) if ct is not None]
        if not pairs:
            pairs = [(results[0], torch.zeros_like(results[0]))]
        groups = {"x": (tensors.x,), "states": tensors.states, "params": tensors.weights}
        requested = {name: group for name, group in groups.items() if getattr(operands.grads, name) is not None}
        if not requested:
            return {}
        gradients = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                [leaf for group in requested.values() for leaf in group],
                [cotangent for _, cotangent in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
        parts = {name: [next(gradients) for _ in group] for name, group in requested.items()}
        if "params" in parts:
            parts["params"] = [join(self.spec, parts["params"])]
        return {name: tuple(map(array_of, group)) for name, group in parts.items()}
