"""A job on a framework's tensors like those of an earlier call, checked and run by machine code.

If a framework describes its tensors by C functions (DLPack's exchange API), a call of one step costs little more than
its tensors do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs
from fusedrnn.engines.cpu.launch.tensor_kernel import (
    ANY_STRIDE,
    DESCRIPTION_BYTES,
    TENSOR_CALL,
    TENSOR_GUARD,
    load_tensor_call,
)
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.jit import ndarray_abi
from fusedrnn.jit.loader import address
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.runtime.thread_pool import ThreadTeam

_MAX_AXES = 3
_CAPSULE = b"dlpack_exchange_api"
_MAJOR_VERSION = 1
_DESCRIBE_OFFSET = 40
"""Where the exchange API has ``dltensor_from_py_object_no_sync``: after a version, a pointer and three functions."""
_FLOAT, _LANES = 2, 1 << 16
"""DLPack's code for floating-point numbers, and its number of lanes, one, in the upper 16 bits."""


def describe_function(tensor_class: type) -> int:
    """The address of the function that describes tensors of this class for DLPack; 0 if there is none that we know."""
    capsule = getattr(tensor_class, "__dlpack_c_exchange_api__", None)
    if capsule is None or ndarray_abi.object_layout() is None:
        return 0
    get_pointer: Any = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = get_pointer(capsule, _CAPSULE)
    if ctypes.c_uint32.from_address(api).value != _MAJOR_VERSION:
        return 0
    return ctypes.c_int64.from_address(api + _DESCRIBE_OFFSET).value


class _TensorDiffers(Exception):
    """A tensor is not as its guard says."""


class TensorGuard(NamedTuple):
    """What an argument of a call must be.

    Attributes:
        example: The argument of the earlier call.
        symbol: The symbol of the kernel arguments whose value is its address; None if there is none.
        shape: Its shape; None for an object that is only compared.
        strides: Its strides in elements.
        data: Its address, if it must stay there.
        is_same: Whether the argument must be the very object.
    """

    example: object
    symbol: str | None = None
    shape: Sequence[int] | None = None
    strides: Sequence[int] = ()
    data: int = 0
    is_same: bool = False


class TensorCall:
    """A job on tensors like those of an earlier call.

    Args:
        executor: What runs the spec.
        problem: What it computes.
        team: The threads that the call may use.
        varlen: Its sequence lengths, None for T everywhere.
        guards: What each tensor of the call must be. The caller holds references to the examples.
        constants: Values of symbols that are the same at every call.
        describe: The address that :func:`describe_function` returned; not 0.

    Attributes:
        is_possible: Whether no tensor has too many axes, and nothing is logged; if not, nothing else may be used.
    """

    def __init__(
        self, executor: Executor, problem: Problem, team: ThreadTeam, varlen: VarLen | None,
        guards: Sequence[TensorGuard], constants: Mapping[str, int], describe: int,
    ) -> None:  # fmt: skip
        planned = executor.planned(problem, team.threads)
        self.is_possible = not executor.debug and all([len(guard.shape or ()) <= _MAX_AXES for guard in guards])
        if not self.is_possible:
            return
        self._executor, self._planned, self._varlen = executor, planned, varlen
        self._run, self._scratch_pool = load_tensor_call(), executor.scratch_pool
        symbols = planned.args.symbol_index
        dtype = _FLOAT | 8 * np.dtype(executor.spec.dtype).itemsize << 8 | _LANES
        self._guards = np.array([_fields(guard, symbols, dtype) for guard in guards], np.int64)
        self._constants = {"spins": team.spins, **constants}
        layout = ndarray_abi.object_layout()
        assert layout is not None
        computes_dx = any([guard.symbol == "dx" for guard in guards])
        self._fields = {
            "items_offset": layout.items_offset, "size_offset": layout.size_offset, "type_offset": layout.type_offset,
            "describe": describe, "guards": self._guards.ctypes.data, "num_guards": len(guards),
            "reserve_symbol": 0 if problem.phase == "inference" else symbols["reserve"],
            "weights_symbol": symbols["weights"], "workspace_symbol": symbols["workspace"],
            "dx_partials_symbol": symbols["dx_partials"] if computes_dx else 0, "args_symbol": symbols["args"],
        }  # fmt: skip
        self._structs: dict[tuple[int, bool], tuple[int, Any]] = {}
        self._single = self._struct(planned.args, runs=True) if planned.is_single else 0

    def _struct(self, args: KernelArgs, runs: bool = False) -> int:
        """The address of the struct of a call with these kernel arguments, which also ``runs`` the job."""
        key = id(args), runs
        known = self._structs.get(key)
        if known is not None:
            return known[0]
        planned, varlen = self._planned, self._varlen
        values = np.zeros(len(args.symbol_index), np.int64)
        constants = dict(self._constants)
        if varlen is not None:
            tables = varlen.tables(args.plan.row_starts).ctypes.data
            constants |= {"row_offsets": varlen.row_offsets_address, "tables": tables}
        for symbol, value in constants.items():
            values[args.symbol_index[symbol]] = value
        assert args.args_offset - args.extents_offset >= DESCRIPTION_BYTES
        fields = {
            **self._fields, "values": values.ctypes.data, "values_size": values.nbytes,
            "description_offset": args.extents_offset, "relocs": args.relocs, "num_fields": args.num_fields,
            "args_offset": args.args_offset, "workspace_offset": args.workspace_offset,
            "job": address(planned.job) if runs else 0,
        }  # fmt: skip
        struct = np.array(TENSOR_CALL.values(fields), np.int64)
        # Another thread may have been faster: its struct is kept, since it may be in use.
        return self._structs.setdefault(key, (struct.ctypes.data, (args, values, struct)))[0]

    def accepts(self, tensors: tuple[Any, ...]) -> bool:
        """Whether each tensor is as its guard says."""
        return self._run_struct(self._struct(self._planned.args), tensors, 0, 0)

    def run(self, tensors: tuple[Any, ...], team: ThreadTeam, reserve: int = 0, weights: int = 0) -> bool:
        """Run the job on these tensors.

        Args:
            tensors: The tensors, in the order of the guards.
            team: The threads that the call may use.
            reserve: The address of the reserve in training and backward.
            weights: The address of packed weights; 0 if the job reads the tensors of the parameters.

        Returns:
            False if a tensor is not as its guard says. Then nothing has run.
        """
        if self._single:
            return self._run_struct(self._single, tensors, reserve, weights)

        def bind(args: KernelArgs, scratch: Scratch) -> int:
            if not self._run(self._struct(args), scratch.address, tensors, reserve, weights):
                raise _TensorDiffers
            return scratch.address + args.args_offset

        try:
            self._executor.run_planned(self._planned, team, bind)
        except _TensorDiffers:
            return False
        return True

    def _run_struct(self, struct: int, tensors: tuple[Any, ...], reserve: int, weights: int) -> bool:
        scratch = self._scratch_pool.acquire(self._planned.args.size)
        ran = self._run(struct, scratch.address, tensors, reserve, weights)
        self._scratch_pool.release(scratch)
        return bool(ran)


def _fields(guard: TensorGuard, symbols: Mapping[str, int], dtype: int) -> list[int]:
    """The fields of a guard's struct."""
    is_same = id(guard.example) if guard.is_same else 0
    symbol = symbols[guard.symbol or "nothing"]
    if guard.shape is None:
        fields = [id(type(guard.example)), is_same, 0, -1, 0, symbol]
        return fields + [0] * (len(TENSOR_GUARD) - len(fields))
    strides = [stride if size > 1 else ANY_STRIDE for size, stride in zip(guard.shape, guard.strides, strict=True)]
    unused = [0] * (_MAX_AXES - len(strides))
    return [
        id(type(guard.example)), is_same, guard.data, len(strides), dtype, symbol,
        *guard.shape, *unused, *strides, *unused,
    ]  # fmt: skip
