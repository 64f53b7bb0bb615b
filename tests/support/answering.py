"""The smallest machine code that tells where it came from, for tests of what is kept on disk."""

import ctypes

import numpy as np

from fusedrnn.jit.builder import Declared, Function, Module, Signature
from fusedrnn.jit.host import available_targets

TARGET = available_targets()[0]


class Builder:
    """Builds ``answer(into)``, which writes a number, and counts how often it did."""

    def __init__(self, number=42):
        self.number, self.calls = number, 0

    def __call__(self):
        self.calls += 1
        module = Module("answer")
        f = Function(module, "answer", ["into"], exported=True)
        f.store(self.number, f.arguments[0])
        f.ret()
        return module


def answer(code):
    """The number that the code writes."""
    into = np.zeros(1, np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(code.address("answer"))(into.ctypes.data)
    return into[0]


def build_caller():
    """Builds ``twice(into)``, which calls ``answer`` twice and adds 1."""
    module = Module("caller")
    f = Function(module, "twice", ["into"], exported=True)
    called = Declared(module, Signature("answer", ("into",)))
    for _ in range(2):
        f.call(called, f.arguments[0])
    f.store(f.load(f.arguments[0]) + 1, f.arguments[0])
    f.ret()
    return module
