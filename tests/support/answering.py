"""The smallest machine code that tells where it came from, for tests of what is kept on disk."""

import ctypes

import numpy as np
from llvmlite import ir

from fusedrnn.jit.builder import Function
from fusedrnn.jit.host import available_targets

TARGET = available_targets()[0]


class Builder:
    """Builds ``answer(into)``, which writes a number, and counts how often it did."""

    def __init__(self, number=42):
        self.number, self.calls = number, 0

    def __call__(self):
        self.calls += 1
        module = ir.Module("answer")
        f = Function(module, "answer", ["into"], exported=True)
        f.store(self.number, f.arguments[0])
        f.ret()
        return module


def answer(code):
    """The number that the code writes."""
    into = np.zeros(1, np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(code.address("answer"))(into.ctypes.data)
    return into[0]
