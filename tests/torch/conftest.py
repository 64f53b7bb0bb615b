"""What all tests in PyTorch share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Forget what earlier tests compiled: after some compilations of one function Dynamo runs it as it is."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
