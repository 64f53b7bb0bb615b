"""Weights of bfloat16 and float16 are converted once, and again whenever their content has changed."""

import gc

import pytest
import torch

import fusedrnn.torch
from fusedrnn.torch import widened_weights

HALVES = (torch.bfloat16, torch.float16)


def fresh(layer, x):
    """The results of a layer with these weights that has never run."""
    other = type(layer)(layer.input_size, layer.hidden_size).to(x.dtype)
    with torch.no_grad():
        for parameter, source in zip(other.parameters(), layer.parameters(), strict=True):
            parameter.copy_(source)
        return other(x)[0]


def changes(layer):
    """Ways of changing weights, each of which must show; those through NumPy bump no version."""
    weight = layer.weight_hh_l0
    yield lambda: weight.add_(0.5)
    yield lambda: weight.data.mul_(-1)
    yield lambda: weight.data.view(torch.int16).numpy().__setitem__((-1, -1), 0)
    yield lambda: layer.bias_ih_l0.data.view(torch.int16).numpy().__setitem__(-1, 0)
    yield lambda: setattr(weight, "data", torch.randn_like(weight))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("hidden", [1, 3, 8])
@pytest.mark.parametrize("steps", [1, 40])
def test_changed_weights_show(dtype, hidden, steps):
    layer = fusedrnn.torch.LSTM(3, hidden).to(dtype)
    x = torch.randn(steps, 2, 3).to(dtype)
    with torch.no_grad():
        layer(x)
        for change in changes(layer):
            change()
            torch.testing.assert_close(layer(x)[0], fresh(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_unchanged_weights_are_converted_once(dtype):
    layer = fusedrnn.torch.GRU(3, 8).to(dtype)
    weights = list(layer.parameters())
    with torch.no_grad():
        first = widened_weights.widened(weights)
        assert widened_weights.widened(weights) is first
        assert all(weight.dtype is torch.float32 for weight in first)
    assert widened_weights.widened(weights) is first  # in training too
    layer(torch.zeros(2, 1, 3, dtype=dtype))[0].sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype is dtype for weight in weights)
    assert not any(weight.requires_grad for weight in first)


def test_copies_end_with_the_weights():
    layer = fusedrnn.torch.RNN(3, 8).to(torch.bfloat16)
    with torch.inference_mode():
        layer(torch.zeros(1, 1, 3, dtype=torch.bfloat16))
    count = len(widened_weights.COPIES)
    del layer
    gc.collect()
    assert len(widened_weights.COPIES) == count - 1


def test_copies_of_inference_mode_serve_training():
    """Frozen weights: only the input gets a gradient."""
    layer = fusedrnn.torch.RNN(3, 8).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 1, 3).to(torch.bfloat16)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_(True)
    layer(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0
