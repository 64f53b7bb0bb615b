"""GEMMs as Python functions, and arrays for them."""

from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.loader import function, load
from fusedrnn.runtime.buffers import aligned_empty


def compiled(name, target, emit):
    """A GEMM as a Python function with the arguments of the function that ``emit`` emits."""

    def build():
        module = Module(name)
        gemm = emit(module)
        f = Function(module, "go", [f"argument{number}" for number in range(len(gemm.arguments))], exported=True)
        f.call(gemm, *f.arguments)
        f.ret()
        return module

    count = len(emit(Module(name)).arguments)
    return function(load(name, target, build), "go", count)


def aligned(values):
    """A copy of the values that is aligned to vectors."""
    copy = aligned_empty(values.shape, values.dtype)
    copy[:] = values
    return copy
