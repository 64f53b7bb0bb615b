"""Fixtures of the tests of char_lm."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
from examples.char_lm.text import load


@pytest.fixture(scope="module")
def english():
    return load(None)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these gain nothing from a second, and lose where something else runs on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]), fusedrnn.thread_limits(1):
        yield
    torch.set_num_threads(before)
