"""The contenders in PyTorch: torch.nn's modules, and the same after ``fusedrnn.torch.accelerate``.

For a user cell, they are a loop of PyTorch's operations, and ``fusedrnn.torch.Layer``. The same code calls both, so a
difference in time is a difference between the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.bench.data import Batch, Contender, GetResults, Results, Workload, gradient_results, outputs
from fusedrnn.cell.cells import Cell


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this context, run PyTorch, and so both modules, on ``count`` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Tensors:
    """A batch as tensors, packed if it has lengths. Packing is not timed."""

    def __init__(self, batch: Batch, training: bool) -> None:
        import torch

        self.steps = len(batch.x)
        self.lengths: Any = None if batch.lengths is None else torch.from_numpy(batch.lengths)
        self.packed: Any = None if batch.lengths is None else self._pack(batch.x)
        self.x: Any = torch.from_numpy(batch.x) if self.packed is None else self.packed.data
        self.x.requires_grad_(training)
        self.input: Any = self.x if self.packed is None else self.packed
        states = tuple(torch.from_numpy(state).requires_grad_(training) for state in batch.states)
        self.states, self.hx = states, states if len(states) > 1 else states[0]
        dy = torch.from_numpy(batch.dy) if self.packed is None else self._pack(batch.dy).data
        self.upstream = [dy, *map(torch.from_numpy, batch.dstates)]

    def _pack(self, array: Array) -> Any:
        import torch
        from torch.nn.utils.rnn import pack_padded_sequence

        return pack_padded_sequence(torch.from_numpy(array), self.lengths, enforce_sorted=False)

    def padded(self, data: Any) -> Array:
        """A tensor like ``x`` as an array (T, N, features), with zeros in the padding."""
        if self.packed is not None:
            from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

            data, _ = pad_packed_sequence(PackedSequence(data, *self.packed[1:]), total_length=self.steps)
        array: Array = data.numpy()
        return array


def torch_nn(work: Workload, accelerated: bool = False, module: Any = None) -> Contender:
    """The module, by default PyTorch's, in inference mode."""
    import torch

    module = (module or _module(work, accelerated)).eval()
    tensors_of = lru_cache(maxsize=1)(partial(_Tensors, training=False))

    def run(batch: Batch) -> GetResults:
        tensors = tensors_of(batch)
        with torch.inference_mode():
            y, states = module(tensors.input)
        return lambda: outputs(work.spec, tensors.padded(_data(y)), _arrays(_tuple(states)))

    return run


def train_torch_nn(work: Workload, accelerated: bool = False, module: Any = None) -> Contender:
    """The module, by default PyTorch's, as in a training loop: new parameters for every call, all gradients at once."""
    import torch

    spec, module = work.spec, (module or _module(work, accelerated)).train()
    weights = dict(module.named_parameters())
    update = _small_update(list(weights.values()))
    tensors_of = lru_cache(maxsize=1)(partial(_Tensors, training=True))

    def run(batch: Batch) -> GetResults:
        tensors = tensors_of(batch)
        update()
        y, states = module(tensors.input, tensors.hx)
        out = (_data(y), *_tuple(states))
        leaves = [tensors.x, *tensors.states, *weights.values()]
        # A cell may compute its output without the previous output.
        grads = torch.autograd.grad(out, leaves, tensors.upstream, allow_unused=True, materialize_grads=True)

        def get_results() -> Results:
            y, *final_states = (output.detach() for output in out)
            dx, *rest = grads
            dstates, dweights = rest[: len(final_states)], rest[len(final_states) :]
            dparams = spec.layout.pack(dict(zip(weights, _arrays(dweights), strict=True)), names="torch")
            forward = outputs(spec, tensors.padded(y), _arrays(final_states))
            return forward | gradient_results(spec, tensors.padded(dx), dparams, _arrays(dstates))

        return get_results

    return run


def _module(work: Workload, accelerated: bool) -> Any:
    """PyTorch's module with the workload's parameters.

    Raises:
        RuntimeError: If it cannot be accelerated, because torch.nn would then be compared with itself.
    """
    import torch

    spec = work.spec
    if isinstance(spec.mode, Cell):
        return _cell_module(work, accelerated)
    kind: Any = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(spec.mode_name, torch.nn.RNN)
    options: dict[str, Any] = {"nonlinearity": spec.mode_name.removeprefix("rnn_")} if kind is torch.nn.RNN else {}
    if spec.projection_size:
        options["proj_size"] = spec.projection_size
    options |= {"bidirectional": spec.bidirectional, "dtype": getattr(torch, spec.dtype)}
    module = kind(spec.input_size, spec.hidden_size, spec.num_layers, **options)
    load(module, work)
    if accelerated:
        from fusedrnn.torch import accelerate

        report = accelerate(module)
        if not report:
            raise RuntimeError(f"nothing was accelerated: {report}")
    return module


def _cell_module(work: Workload, accelerated: bool) -> Any:
    """A layer of a user cell; if not accelerated, it runs as a loop of PyTorch's operations."""
    import torch

    from fusedrnn.torch import Layer

    spec = work.spec
    kind: Any = Layer if accelerated else type("Loop", (Layer,), {"forward": Layer.composed_forward})
    options = {"bidirectional": spec.bidirectional, "dtype": getattr(torch, spec.dtype)}
    module = kind(spec.mode, spec.input_size, spec.hidden_size, spec.num_layers, **options)
    load(module, work)
    return module


def load(module: Any, work: Workload) -> None:
    """Give a module the parameters of a workload, by PyTorch's names."""
    import torch

    weights = work.spec.layout.unpack(work.params, names="torch")
    module.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()})


def _small_update(parameters: list[Any]) -> Callable[[], None]:
    """A function that changes the parameters like an optimizer, so that no module can keep packed weights.

    It moves the first element of each up by one unit in the last place, and down again at the next call. This is too
    little to change a result beyond the tolerance.
    """
    import torch

    firsts = [parameter.detach().view(-1)[:1] for parameter in parameters]  # views share the version counter
    before = [first.clone() for first in firsts]
    after = [torch.nextafter(first, torch.full_like(first, torch.inf)) for first in before]
    values = cycle((after, before))

    def update() -> None:
        torch._foreach_copy_(firsts, next(values))

    return update


def _data(y: Any) -> Any:
    """The tensor of an output, packed or not."""
    import torch

    return y if isinstance(y, torch.Tensor) else y.data


def _tuple(states: Any) -> tuple[Any, ...]:
    return states if isinstance(states, tuple) else (states,)


def _arrays(tensors: Any) -> tuple[Array, ...]:
    return tuple(tensor.numpy() for tensor in tensors)
