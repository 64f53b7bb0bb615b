"""The machine code that runs a job on a framework's tensors, which the framework describes by a C function of DLPack.

It compares each tensor of a call with that of an earlier one, binds the kernel arguments, and runs a job of one thread.
:mod:`fusedrnn.engines.cpu.tensor_call` writes the structs.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.launch.call_kernel import emit_bind
from fusedrnn.jit.builder import I32, I64, VOID, Function, Module, Value, Variable
from fusedrnn.jit.c_function import c_function, emit_c_function
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import load, load_once
from fusedrnn.jit.struct import Struct

TENSOR_GUARD = Struct(
    "type", "object", "data", "ndim", "dtype", "symbol",
    "shape0", "shape1", "shape2", "stride0", "stride1", "stride2",
)  # fmt: skip
"""What an argument must be.

- It is of this ``type``. If ``object`` is not 0, it is this very object.
- If ``ndim`` is not negative, it is a tensor in CPU memory with this ``dtype`` (a DLDataType in 32 bits), ``shape`` and
  ``strides`` (in elements), and it has memory: its address is not 0. If ``data`` is not 0, it is at this address. Its
  address becomes the value of ``symbol``.
"""
ANY_STRIDE = -(1 << 62)
"""The stride of an axis of one element."""
TENSOR_CALL = Struct(
    "items_offset", "size_offset", "type_offset", "describe", "guards", "num_guards", "description_offset", "values",
    "values_size", "reserve_symbol", "weights_symbol", "workspace_symbol", "dx_partials_symbol", "args_symbol",
    "relocs", "num_fields", "args_offset", "workspace_offset", "job",
)  # fmt: skip
"""A call: how objects are laid out; DLPack's ``dltensor_from_py_object_no_sync``; the guards; the values of the symbols
of kernel arguments that are the same at every call; the job of the caller's thread alone, 0 if the caller runs it.

Fields named ``*_symbol`` are numbers of symbols whose values differ from call to call; number 0 stands for none. These
offsets are relative to the scratch buffer: ``description_offset`` (where a tensor is described), ``args_offset`` (the
kernel arguments) and ``workspace_offset`` (the workspace).
"""
DESCRIPTION_BYTES = 48
"""Size of DLPack's DLTensor."""
_DEVICE, _NDIM, _DTYPE, _SHAPE, _STRIDES, _BYTE_OFFSET = 8, 16, 20, 24, 32, 40
_CPU = 1


@load_once()
def load_tensor_call() -> Callable[..., int]:
    """The function ``run_if_alike(call, scratch, tensors, reserve, weights)``: 0 if a tensor differs, else 1."""
    return c_function("run_if_alike", load("tensor_call", current_target(), build_tensor_call))


def build_tensor_call() -> Module:
    """The module of ``run_if_alike``, a builtin function of the interpreter.

    ``tensors`` is a tuple; ``reserve`` and ``weights`` are the addresses of the reserve and of packed weights.
    """
    module = Module("tensor_call")
    bind, are_alike = emit_bind(module), _emit_are_alike(module)
    names = ["call", "scratch", "tensors", "reserve", "weights"]
    f = Function(module, "run_if_alike", names, returns=True)
    call, scratch, tensors, reserve, weights = f.arguments
    c = TENSOR_CALL.read(f, call)
    f.copy(scratch, c.values, c.values_size)
    alike = f.var(f.call(are_alike, call, scratch, tensors))
    with f.if_(alike.get().is_set):
        workspace, kernel_args = scratch + c.workspace_offset, scratch + c.args_offset
        f.store(workspace, scratch + c.workspace_symbol * 8)
        f.store(weights, scratch + c.weights_symbol * 8)
        for symbol, value in ((c.reserve_symbol, reserve), (c.dx_partials_symbol, workspace)):
            with f.if_(symbol.is_set):
                f.store(value, scratch + symbol * 8)
        f.store(kernel_args, scratch + c.args_symbol * 8)
        f.call(bind, c.relocs, c.num_fields, scratch, kernel_args)
        with f.if_(c.job.is_set):
            thread = f.intrinsic("PyEval_SaveThread", I64, [])
            f.call_address(c.job, kernel_args, f.constant(0))
            f.intrinsic("PyEval_RestoreThread", VOID, [thread])
    f.ret(alike.get())
    emit_c_function(module, f, objects=(names.index("tensors"),), keeps_lock=True)
    return module


def _emit_are_alike(module: Module) -> Function:
    """A function of (call, scratch, tensors): whether each tensor is as its guard says; stores their addresses."""
    f = Function(module, "are_alike", ["call", "scratch", "tensors"], returns=True)
    call, scratch, tensors = f.arguments
    c = TENSOR_CALL.read(f, call)
    items = tensors + c.items_offset
    alike = f.var(f.load(tensors + c.size_offset).equals(c.num_guards).select(f.constant(1), 0))
    description = scratch + c.description_offset
    with f.if_(alike.get().is_set), f.loop(0, c.num_guards) as index:
        guard = c.guards + index * TENSOR_GUARD.size
        g, item = TENSOR_GUARD.read(f, guard), f.load(items + index * 8)
        same = f.load(item + c.type_offset).equals(g.type) & (g.object.is_zero | item.equals(g.object))
        alike.set(same.select(alike.get(), 0))
        with f.if_(alike.get().is_set & (g.ndim >= 0)):
            status = f.call_address(c.describe, item, description, returns=I32).sext(I64)
            with f.if_else(status.is_zero) as (described, failed):
                with described:
                    _compare(f, description, guard, alike)
                    f.store(f.load(description), scratch + g.symbol * 8)
                with failed:
                    f.intrinsic("PyErr_Clear", VOID, [])
                    alike.set(0)
    f.ret(alike.get())
    return f


def _compare(f: Function, description: Value, guard: Value, alike: Variable) -> None:
    """Clear ``alike`` if a described tensor differs from its guard."""
    g, data = TENSOR_GUARD.read(f, guard), f.load(description)
    device, ndim, dtype = (f.load(description + offset, I32, 4).sext(I64) for offset in (_DEVICE, _NDIM, _DTYPE))
    same = device.equals(_CPU) & ndim.equals(g.ndim) & dtype.equals(g.dtype)
    same = same & f.load(description + _BYTE_OFFSET).is_zero & (g.data.is_zero | data.equals(g.data))
    same = same & data.is_set  # a tensor of zeros may have no memory
    with f.if_else(same) as (comparable, different):
        with comparable:
            shape, strides = f.load(description + _SHAPE), f.load(description + _STRIDES)
            shape0, stride0 = (guard + 8 * TENSOR_GUARD.index[name] for name in ("shape0", "stride0"))
            with f.loop(0, g.ndim) as axis:
                stride = f.load(stride0 + axis * 8)
                same_stride = stride.equals(ANY_STRIDE) | stride.equals(f.load(strides + axis * 8))
                same_size = f.load(shape + axis * 8).equals(f.load(shape0 + axis * 8))
                alike.set((same_size & same_stride).select(alike.get(), 0))
        with different:
            alike.set(0)
