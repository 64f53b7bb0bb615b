"""Layers and cells of ours and of torch.nn with the same parameters, and their results as flat lists."""

import torch
from torch.nn.utils.rnn import PackedSequence

import fusedrnn.torch

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
KINDS = LAYERS + CELLS
MODES = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}


def make_pair(kind, *args, **options):
    """Ours and torch.nn's, with the same parameters."""
    modules = []
    for package in (fusedrnn.torch, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(package, kind)(*args, **options))
    return modules


def flat(results):
    """The tensors in a module's results or in a state, in order; of a packed sequence its data."""
    if isinstance(results, PackedSequence):
        return [results.data]
    return [results] if isinstance(results, torch.Tensor) else [tensor for part in results for tensor in flat(part)]


def first(results):
    """The output of a layer, or the first state of a cell."""
    return results if isinstance(results, torch.Tensor) else results[0]


def input_for(kind, dtype=torch.float32):
    """Input of 3 features for a layer (5, 2, 3) or a cell (2, 3)."""
    return torch.randn((2, 3) if kind.endswith("Cell") else (5, 2, 3), dtype=dtype)


def random_state(net, N, *, requires_grad=False):
    """A random hx of a layer."""
    shape = net.num_layers * (1 + net.bidirectional), N, net.hidden_size
    h0, c0 = (torch.randn(shape, requires_grad=requires_grad) for _ in range(2))
    return (h0, c0) if net.mode == "LSTM" else h0
