"""Network: layers of different sizes as a PyTorch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Module, ModuleList

from fusedrnn.cell.cells import Cell
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.torch.layer import Layer


class Network(Module):
    """A stack of layers of one cell with a list of hidden sizes: a :class:`Layer` for each size, one after the other.

    Adjacent layers of the same size form one :class:`Layer` with several layers, as in
    :meth:`fusedrnn.NetworkSpec.stack`. Parameters have the names of that :class:`Layer`, such as
    ``layers.0.weight_ih_l0``.

    Args:
        cell: The cell, as in :class:`Layer`.
        input_size: I.
        hidden_sizes: H of each layer.
        bias: Whether gates have biases, one for the input and one for the recurrent product.
        batch_first: Whether input and output are (N, T, features).
        dropout: Probability in [0, 1) with which training drops elements between layers.
        bidirectional: Whether each layer runs in both directions.
        residual: What each layer adds to its output: ``"identity"`` or ``"projection"``, as in
            :meth:`fusedrnn.NetworkSpec.stack`; None for nothing.
        input_dropout: Probability in [0, 1) with which training drops elements of the input.
        compute: The format of GEMM operands, as in :class:`fusedrnn.RNNSpec`.
        device: The device of the parameters.
        dtype: The dtype of the parameters; None for torch's default.

    Attributes:
        layers: The layers, a ModuleList.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an invalid value.

    Example:
        >>> network = Network("lstm", 10, (64, 48, 32))
        >>> y, states = network(torch.randn(5, 3, 10))  # (5, 3, 32); states[0] is (h_n, c_n) of the first layer
    """

    def __init__(
        self, cell: str | Cell, input_size: int, hidden_sizes: Sequence[int], bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
        residual: str | None = None, input_dropout: float = 0.0,
        compute: str | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        spec = NetworkSpec.stack(
            cell, input_size, hidden_sizes, bidirectional=bidirectional, dropout=dropout, residual=residual,
            input_dropout=input_dropout, bias="double" if bias else "none",
        )  # fmt: skip
        self.layers = ModuleList([
            Layer(
                cell, layer.input_size, layer.hidden_size, layer.num_layers, bias, batch_first, layer.dropout,
                layer.bidirectional, residual=layer.residual, input_dropout=layer.input_dropout, compute=compute,
                device=device, dtype=dtype,
            )
            for layer in spec.layers
        ])  # fmt: skip

    @property
    def spec(self) -> NetworkSpec:
        """The network, for :class:`fusedrnn.NetworkOp`. Its layout has the same names of parameters."""
        specs: list[Any] = [layer.spec for layer in self.layers]
        return NetworkSpec(tuple(specs))

    def reset_parameters(self) -> None:
        """Initialize all parameters, as :meth:`Layer.reset_parameters` does."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.reset_parameters()

    def forward(
        self, input: Any, hx: Any = None, lengths: Any = None, resets: Any = None, reset_states: Any = None
    ) -> Any:
        """Run over sequences, layer after layer.

        Args:
            input: As in :class:`Layer`: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I), or a PackedSequence.
            hx: A tuple with the initial states of each of ``layers``, in the form that the layer takes, or None for
                zeros. None instead of the tuple stands for zeros in all.
            lengths: Valid steps of each sequence, as in :class:`Layer`; None for all.
            resets: Where sequences begin anew in all layers, as in :class:`Layer`; None for no marks.
            reset_states: The states after resets, a tuple like ``hx``; None for zeros.

        Returns:
            The output of the last layer, and a tuple with the final states of each of ``layers``.

        Raises:
            TypeError: If ``hx`` or ``reset_states`` is no tuple with an entry for each layer; or as :class:`Layer`
                raises it.
            ValueError: If there are ``reset_states`` without ``resets``; or as :class:`Layer` raises it.
        """
        if resets is None and reset_states is not None:
            raise ValueError("reset_states must be None without resets")
        entries = self._by_layer("hx", hx), self._by_layer("reset_states", reset_states)
        final = []
        for layer, initial, replacing in zip(self.layers, *entries, strict=True):
            input, state = layer(input, initial, lengths, resets, reset_states=replacing)
            final.append(state)
        return input, tuple(final)

    def _by_layer(self, name: str, states: Any) -> Any:
        """The states of each layer, None for zeros."""
        count = len(self.layers)
        if states is None:
            return (None,) * count
        if not isinstance(states, (tuple, list)) or len(states) != count:
            got = f"{len(states)} entries" if isinstance(states, (tuple, list)) else type(states).__name__
            raise TypeError(f"{name} must be None or a tuple of {count}, the states of each layer; got {got}")
        return states


Network.__module__ = "fusedrnn.torch"  # the public name, which pickles store
