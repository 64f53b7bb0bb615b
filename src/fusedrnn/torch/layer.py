"""Layer: a network of any cell, including user cells, as a PyTorch module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.user_cell import UserCell
from fusedrnn.engines.cpu.tiling import unsupported_heads
from fusedrnn.initial_params import initial_fills
from fusedrnn.layout import Parameter as LayoutEntry
from fusedrnn.spec import RNNSpec
from fusedrnn.torch import autocast, composed
from fusedrnn.torch.cell_references import reference_to
from fusedrnn.torch.eligibility import MODULE_DTYPES, plan_dtype, weight_dtype
from fusedrnn.torch.formats import checked_compute
from fusedrnn.torch.input_forms import States, run_packed, run_tensor
from fusedrnn.torch.modules import FusedLayer
from fusedrnn.torch.plan import ModulePlan, as_ratio, spec_of, user_layer_plan


class Layer(FusedLayer, Module):
    """A recurrent network of any cell on the fused operator; it takes and returns what ``torch.nn.GRU`` does.

    The state is a tensor if the cell has one state; else it is a tuple of the states in their order. Parameters have
    torch.nn's names, such as ``weight_ih_l0``, or the names of the cell's vectors and scalars, such as ``beta_l0``,
    with ``_reverse`` for the second direction. ``forward`` also takes ``lengths``, for padded sequences, and
    ``resets``, where sequences begin anew.

    Args:
        cell: A cell from :func:`fusedrnn.cell.cell` or :mod:`fusedrnn.cells`; or a mode, ``"rnn_relu"``,
            ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        input_size: I.
        hidden_size: H.
        num_layers: L; each layer after the first reads the output of the previous layer.
        bias: Whether gates have biases, one for the input and one for the recurrent product.
        batch_first: Whether input and output are (N, T, features).
        dropout: Probability in [0, 1) with which training drops elements between layers.
        input_dropout: Probability in [0, 1) with which training drops elements of the input.
        residual: What each layer adds to its output: its input (``"identity"``) or a projection of its input
            (``"projection"``), as in :class:`fusedrnn.RNNSpec`; None for nothing.
        bidirectional: Whether each layer runs in both directions.
        compute: The format of GEMM operands, as in :class:`fusedrnn.RNNSpec`.
        device: The device of the parameters.
        dtype: The dtype of the parameters; None for torch's default.

    Heads of a size that has no kernels (see :meth:`fusedrnn.cell.UserCell.with_heads`) run as a loop of PyTorch's
    operations, with a warning.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an invalid value.

    Example:
        >>> from fusedrnn import cells
        >>> layer = Layer(cells.minimal_gated_unit, 10, 20, bidirectional=True)
        >>> y, h_n = layer(torch.randn(5, 3, 10))  # (5, 3, 40), (2, 3, 20)
    """

    proj_size = 0

    def __init__(
        self, cell: str | Cell, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
        residual: str | None = None, input_dropout: float = 0.0,
        compute: str | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        Module.__init__(self)
        spec = RNNSpec(
            cell, input_size, hidden_size, num_layers, bidirectional, dropout, bias="double" if bias else "none",
            residual=residual, input_dropout=input_dropout,
        )  # fmt: skip
        self._set_cell(cell)
        self.input_size, self.hidden_size, self.num_layers = spec.input_size, spec.hidden_size, spec.num_layers
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), spec.bidirectional
        self.dropout, self.input_dropout, self.residual = spec.dropout, spec.input_dropout, spec.residual
        for entry in spec.layout.by_layer_direction:
            weight = Parameter(torch.empty(entry.shape, device=device, dtype=dtype))
            self.register_parameter(entry.torch_name, weight)
        if (refusal := unsupported_heads(self.spec)) is not None:
            warnings.warn(f"{refusal}: the layer runs as a loop of PyTorch's operations", stacklevel=2)
        if compute is not None:
            self.compute = checked_compute(compute, "float64" if weight.dtype.itemsize > 4 else "float32")
        self.reset_parameters()

    @property
    def cell(self) -> str | Cell:
        """The cell, or the mode. It may be replaced by one with the same parameters, such as one with other rates.

        Raises:
            TypeError: If it is set to something else.
            ValueError: If it is set to a cell with other parameters.
        """
        return self._cell

    @cell.setter
    def cell(self, cell: str | Cell) -> None:
        spec = self.spec
        own, others = (
            {entry.torch_name: entry.shape for entry in each.layout.by_layer_direction}
            for each in (spec, replace(spec, mode=cell))
        )
        if own != others:
            raise ValueError(f"cell must have the same parameters as {self._cell!r}; got {cell!r}")
        self._set_cell(cell)

    def _set_cell(self, cell: str | Cell) -> None:
        self._cell, self.mode = cell, reference_to(cell)

    @property
    def spec(self) -> RNNSpec:
        """The network, for :class:`fusedrnn.RNNOp`; its layout names the parameters."""
        dtype = MODULE_DTYPES.get(weight_dtype(self), "float32")
        return RNNSpec(
            self.cell, self.input_size, self.hidden_size, self.num_layers, self.bidirectional, self.dropout,
            dtype=dtype, bias="double" if self.bias else "none", compute=self.compute, residual=self.residual,
            input_dropout=self.input_dropout,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Initialize all parameters, as torch.nn does, or as the cell declares by ``initial=``.

        If a weight is parametrized or pruned, what it is computed from is initialized: like the weight if it has the
        same shape. Parameters of submodules stay as they are.
        """
        spec, parameters = self.spec, self._own_parameters()
        sources = {entry.torch_name: _source_of(entry, parameters) for entry in spec.layout}
        limit = 1 / math.sqrt(spec.hidden_size)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name not in sources.values():
                    parameter.uniform_(-limit, limit)
            for entry, rows, initial, negated in initial_fills(spec):
                source = sources[entry.torch_name]
                if source is None:
                    continue
                weight = parameters[source]
                values = weight[rows].uniform_(initial.low, initial.high)
                if initial.is_log:
                    values.log_()
                if negated is not None:
                    weight[negated] = -values

    def _own_parameters(self) -> dict[str, Parameter]:
        """The layer's floating parameters and what its parametrizations compute from, by name."""
        named = self.named_parameters(remove_duplicate=False)
        own = {name: parameter for name, parameter in named if name.startswith("parametrizations.") or "." not in name}
        return {name: parameter for name, parameter in own.items() if parameter.is_floating_point()}

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
            "residual": None, "input_dropout": 0.0, "compute": None,
        }  # fmt: skip
        options = [f"{name}={getattr(self, name)}" for name in defaults if getattr(self, name) != defaults[name]]
        name = f"{self.cell.name}{self.cell.changes}" if isinstance(self.cell, UserCell) else str(self.cell)
        return ", ".join([name, str(self.input_size), str(self.hidden_size), *options])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Use the cell of this process, whose equations may differ from those of the pickled cell."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_cell(self._cell)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError("torch.jit.script cannot compile Layer; export it by torch.export, or trace it")

    def _plan(self, dtype: torch.dtype, compute: str | None = None) -> ModulePlan | None:
        return user_layer_plan(
            self.mode, self.input_size, self.hidden_size, self.num_layers, self.bidirectional, self.bias,
            as_ratio(self.dropout), dtype, 0, compute or self.compute, self.residual, as_ratio(self.input_dropout),
        )  # fmt: skip

    def composed_forward(
        self, input: Any, hx: Any = None, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool = False, reset_states: States | None = None,
    ) -> Any:  # fmt: skip
        """:meth:`forward` by PyTorch's own operations, for other devices and dtypes and in transforms. It is slow.

        Raises:
            TypeError: If ``input`` or a state is no tensor.
            ValueError: If a tensor has another dtype than the parameters, or an attribute has changed to a wrong value.
            RuntimeError: If a tensor has the wrong shape.
        """
        args = lengths, resets, all_states, reset_states
        result = autocast.forward(self, self._composed, None, input, hx, *args)
        return self._composed(None, input, hx, *args) if result is None else result

    def _composed(
        self, run: None, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None, all_states: bool,
        reset_states: States | None, compute: str | None = None,
    ) -> Any:  # fmt: skip
        """The results by PyTorch's own operations. ``compute`` replaces our own."""
        is_packed = isinstance(input, PackedSequence)
        x = input.data if is_packed else input
        dtype = weight_dtype(self)
        _check_tensor("input", x, dtype)
        plan = self._plan(plan_dtype(self), compute)
        spec = None if plan is None else spec_of(plan, self.training)
        if plan is None or spec is None:
            # Attributes have changed. The spec raises the error that names the wrong one.
            raise ValueError(f"the layer must describe a network; got {self.spec}")
        self._check_input(x, is_packed)
        states = None if hx is None else (*self._checked_states(hx, plan, input, dtype), *(reset_states or ()))
        index = {name: getattr(self, name) for name in plan.names}
        by_name = [index.get(entry.torch_name) for entry in spec.layout.by_layer_direction]

        def call(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            sizes = input.batch_sizes if is_packed else None
            options: dict[str, Any] = {"lengths": lengths, "batch_sizes": sizes, "resets": resets}
            return composed.run(spec, x, states, by_name, **options, all_states=all_states)

        num_states = len(spec.state_names) if all_states else None
        if is_packed:
            return run_packed(call, input, states, num_states)
        return run_tensor(call, x, states, self.batch_first, composed.run, num_states)

    def _check_input(self, x: Tensor, is_packed: bool) -> None:
        axes = (2,) if is_packed else (2, 3)
        if x.dim() not in axes or x.shape[-1] != self.input_size:
            expected = " or ".join(f"{number}-D" for number in axes)
            raise RuntimeError(
                f"input must be {expected}, its last axis {self.input_size}, the input_size; got shape {tuple(x.shape)}"
            )
        if not x.shape[1 if self.batch_first and x.dim() == 3 else 0]:
            raise RuntimeError(f"input must have at least one step; got shape {tuple(x.shape)}")

    def _checked_states(self, hx: Any, plan: ModulePlan, input: Any, dtype: torch.dtype) -> States:
        """The initial states as a tuple."""
        count = len(plan.state_sizes)
        states = (hx,) if count == 1 else hx
        if not isinstance(states, (tuple, list)) or len(states) != count:
            got = f"{len(states)} states" if isinstance(states, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx must be a tuple of {count} states, {', '.join(plan.spec.state_names)}; got {got}")
        if isinstance(input, PackedSequence):
            batch: tuple[int, ...] = (int(input.batch_sizes[0]),)
        else:
            batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        for name, state, size in zip(plan.spec.state_names, states, plan.state_sizes, strict=True):
            _check_tensor(f"the state {name}", state, dtype)
            shape = (*plan.state_rows, *batch, size)
            if state.shape != shape:
                raise RuntimeError(f"the state {name} must have shape {shape}; got {tuple(state.shape)}")
        return tuple(states)


def _source_of(entry: LayoutEntry, parameters: Mapping[str, Parameter]) -> str | None:
    """The name of the parameter that is a weight, or that it is computed from element by element; None for none."""
    name = entry.torch_name
    candidates = name, f"parametrizations.{name}.original", f"{name}_orig"
    return next((each for each in candidates if each in parameters and parameters[each].shape == entry.shape), None)


def _check_tensor(name: str, tensor: Any, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype}, as the parameters have; got {tensor.dtype}")


Layer.__module__ = "fusedrnn.torch"  # the public name, which pickles store
