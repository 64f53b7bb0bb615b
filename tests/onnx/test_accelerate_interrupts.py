"""Interrupts of replaced nodes in ONNX Runtime: no result is wrong, and no interrupt is swallowed."""

import sys

import numpy as np
import pytest

from fusedrnn.onnx import accelerate
from fusedrnn.onnx.ort import op_library, shared_object
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
