"""Interrupts of replaced nodes in ONNX Runtime: no result is wrong, and no interrupt is swallowed."""

import sys

import numpy as np
import pytest

from fusedrnn.onnx import accelerate
from fusedrnn.onnx.ort import op_library, shared_object
from fusedrnn.onnx.ort.layer_runner import LayerRunner
from fusedrnn.onnx.ort.op_kernel import CHECK, RUN
from onnx_networks import gru_stack

pytestmark = pytest.mark.skipif(not shared_object.is_supported(), reason="no custom operators on this system")


def assert_same(outputs, expected):
    for output, other in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(output, other)


@pytest.mark.parametrize("purpose", [CHECK, RUN])
def test_a_handler_that_raises_before_the_first_line(purpose, monkeypatch):
    """ctypes drops the exception and returns anything at all; the outputs may be allocated, but not computed."""
    model, feeds = gru_stack()
    session, inputs, others = accelerate(model, replace="always", num_threads=1), feeds(6, 3), feeds(6, 2)
    inputs["lengths"][:] = 1, 5, 6  # which Python runs
    expected = session.run(None, inputs)
    original, dropped = op_library._Calls.__call__, []

    def call(self, number, address, why):
        if why == purpose:
            raise KeyboardInterrupt
        original(self, number, address, why)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda entry: dropped.append(entry.exc_type))
        patch.setattr(op_library._Calls, "__call__", call)
        if purpose == CHECK:
            session.run(None, inputs)  # whose shapes are known
        with pytest.raises(Exception, match="interrupted: a signal handler"):
            session.run(None, others if purpose == CHECK else inputs)
    assert dropped == [KeyboardInterrupt]
    assert_same(session.run(None, inputs), expected)


def test_other_errors_than_exceptions(monkeypatch):
    """They are raised unchanged, by that call alone."""
    model, feeds = gru_stack()
    session, inputs = accelerate(model, replace="always", num_threads=1), feeds(6, 3)
    with monkeypatch.context() as patch:
        patch.setattr(LayerRunner, "check", raising(KeyboardInterrupt("here")))
        with pytest.raises(KeyboardInterrupt, match="here"):
            session.run(None, inputs)
        with pytest.raises(Exception, match="KeyboardInterrupt"):
            session.session.run(None, inputs)
        patch.setattr(LayerRunner, "check", raising(RuntimeError("there")))
        with pytest.raises(Exception, match="there"):
            session.run(None, inputs)
    session.run(None, inputs)


@pytest.mark.parametrize("error", [KeyboardInterrupt("here"), RuntimeError("here")])
def test_an_error_while_nodes_are_measured(error, monkeypatch):
    """An interrupt ends the call; after other errors ONNX Runtime runs the whole model."""
    model, feeds = gru_stack()
    monkeypatch.setattr(LayerRunner, "check", raising(error))
    if isinstance(error, Exception):
        assert "here" in accelerate(model, feeds=feeds(6, 3), num_threads=1).report.reason
    else:
        with pytest.raises(KeyboardInterrupt, match="here"):
            accelerate(model, feeds=feeds(6, 3), num_threads=1)


def test_a_lost_interrupt_ends_measuring(monkeypatch):
    model, feeds = gru_stack()
    monkeypatch.setattr(sys, "unraisablehook", lambda entry: None)
    monkeypatch.setattr(op_library._Calls, "__call__", raising(KeyboardInterrupt()))
    with pytest.raises(Exception, match="interrupted: a signal handler"):
        accelerate(model, feeds=feeds(6, 3), num_threads=1)


def raising(error):
    def function(*arguments):
        raise error

    return function
