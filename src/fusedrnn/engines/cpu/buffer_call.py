"""Calls on buffers by address that machine code runs without the interpreter: the structs that this code reads.

A call is laid out once, for one shape. Any number of threads may run it at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.launch.buffer_kernel import BUFFER_ARGS, BUFFER_CALL, CLOCK, build_run_buffers
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs
from fusedrnn.engines.cpu.launch.native_weights import FORWARD, MAX_ARRAYS, TRAINING, WEIGHTS, WEIGHTS_SLOT
from fusedrnn.engines.cpu.varlen import round_robin, table_offsets
from fusedrnn.engines.cpu.weights.cache import WeightCache
from fusedrnn.engines.cpu.weights.pack_kernel import load_pack
from fusedrnn.engines.cpu.weights.transpose_kernel import Block, TransposeCall, load_transpose
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import address, function, load, load_once
from fusedrnn.jit.struct import Struct
from fusedrnn.runtime.buffers import aligned_empty, round_up_to_cache_line
from fusedrnn.runtime.fingerprint import load_fingerprint
from fusedrnn.runtime.native_memory import free_with, scratch_slots
from fusedrnn.runtime.native_state import control_cell
from fusedrnn.runtime.thread_pool import ensure_pool, load_pool, pool_team

_NONE = -1
_clock = np.zeros(len(CLOCK), np.int64)


class GatheredParams(NamedTuple):
    """The arrays that a call has in place of the flat vector of parameters.

    Attributes:
        sizes: The bytes of each.
        blocks: The blocks that are transposed into the flat vector, which has the buffer number after theirs.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Block, ...]


class BufferCall:
    """A forward or backward call of one shape on buffers by address.

    Arrays are contiguous and of the spec's dtype, except that ``lengths`` are 32-bit integers (N,), ``resets`` are
    bools (T, N), False in the padding, ``seed`` is one 64-bit integer, and ``reserve`` is bytes that begin at a cache
    line. The padding of ``y`` and ``dx`` is set to zero.

    Args:
        executor: Runs the spec.
        problem: What to compute.
        threads: The most threads.
        buffers: The name of each buffer in the order in which a call passes them: ``"x"``, ``"params"``, ``"lengths"``,
            ``"reserve"``, ``"dparams"``, or another symbol of :mod:`fusedrnn.engines.cpu.launch.kernel_args`. Buffers
            of states, results and gradients may be left out.
        batch_first: Whether x, y and their gradients are (N, T, features); else they are (T, N, features).
        arrays: The arrays that hold the parameters: the buffer ``"params"`` and those that follow it, whose names are
            ``""``. None if ``"params"`` is the flat vector.

    Attributes:
        address: The address of the call, for :func:`load_run_buffers`.
    """

    def __init__(
        self, executor: Executor, problem: Problem, threads: int, buffers: Sequence[str], batch_first: bool = False,
        arrays: GatheredParams | None = None,
    ) -> None:  # fmt: skip
        # A flat vector that is made from arrays is kept with its packed weights, which short calls then use too.
        problem = problem._replace(packed=problem.packed or arrays is not None)
        self._executor, self._problem, self._buffers = executor, problem, list(buffers)
        self._batch_first = batch_first
        self._planned = planned = executor.planned(problem, threads)
        single = planned.single_args
        plans = {"single": single, "sleeping": single, "spinning": single}
        if not planned.is_single:
            plans |= {"sleeping": planned.args, "spinning": planned.spinning_args}
        phase, steps, batch, *_ = problem
        self._cache = executor.weight_cache_for(steps, batch)
        self._weights = _native_weights(self._cache, arrays) if problem.packed else None
        self._values = self._constant_values(single.symbol_index, threads)
        self._operands = self._symbols_of_buffers(single.symbol_index)
        self._param_offsets = np.array(self._cache.offsets, np.int64)
        self._args = {key: _buffer_args(args) for key, args in plans.items()}
        fields = {
            **{key: args[0].ctypes.data for key, args in self._args.items()},
            **self._sizes(plans), **self._buffer_numbers(), **self._symbol_numbers(single.symbol_index),
            "slots": scratch_slots(), "values": self._values.ctypes.data, "values_size": self._values.nbytes,
            "operands": self._operands.ctypes.data, "num_operands": len(self._operands),
            "weights": 0 if self._weights is None else self._weights.address,
            "level": FORWARD if phase == "inference" else TRAINING,
            "param_offsets": self._param_offsets.ctypes.data, "num_params": len(self._param_offsets),
            "job": address(planned.job), "dispatch": address(load_pool().dispatch),
            "control": control_cell(), "threads": 1 if planned.is_single else threads,
            "ensure_pool": address(_ensure_pool_function()), "clock": _clock.ctypes.data,
        }  # fmt: skip
        self._call = _struct(BUFFER_CALL, fields)
        self.address: int = self._call.ctypes.data

    def _sizes(self, plans: Mapping[str, KernelArgs]) -> dict[str, int]:
        """The sizes of the call and of its scratch: the kernel arguments and the workspace, then the tables."""
        phase, steps, batch, *_ = self._problem
        scratch = round_up_to_cache_line(max(args.size for args in plans.values()))
        num_groups = max(len(args.plan.row_starts) for args in plans.values()) - 1
        tables = table_offsets(steps, batch)["active_rows"] + 8 * (num_groups * steps + steps + 1)
        features = self._executor.spec.input_size if phase == "backward" else self._executor.spec.output_size
        return {
            "steps": steps, "batch": batch, "tables_offset": scratch,
            "scratch_size": scratch + tables if "lengths" in self._buffers else scratch,
            "zeroed_size": steps * batch * features * self._item,
        }  # fmt: skip

    def _buffer_numbers(self) -> dict[str, int]:
        """The numbers of the buffers that get a special treatment in the machine code."""
        padded = "dx" if self._problem.phase == "backward" else "y"
        return {
            **{name: self._number(name) for name in ("params", "dparams", "lengths", "seed")},
            "zeroed": self._number(padded) if "lengths" in self._buffers else _NONE, "aligned": self._number("reserve"),
        }  # fmt: skip

    def _symbol_numbers(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The numbers of the symbols whose values the machine code computes."""
        first_param = self._executor.spec.layout.by_layer_direction[0].name
        return {
            **{f"{symbol}_symbol": symbols[symbol] for symbol in ("weights", "workspace", "args", "tables", "seed")},
            "unpacked_symbol": symbols[f"unpacked {first_param}"] if self._weights is None else 0,
            "dparams_symbol": symbols[first_param] if "dparams" in self._buffers else 0,
            "dx_partials_symbol": symbols["dx_partials"] if "dx" in self._buffers else 0,
        }

    @property
    def _item(self) -> int:
        return np.dtype(self._executor.spec.dtype).itemsize

    def _number(self, name: str) -> int:
        """The number of a buffer; -1 if there is none of that name."""
        return self._buffers.index(name) if name and name in self._buffers else _NONE

    def _constant_values(self, symbols: Mapping[str, int], threads: int) -> Array:
        """The values of symbols that are the same at every call."""
        values = np.zeros(len(symbols), np.int64)
        spec, (_, steps, batch, *_) = self._executor.spec, self._problem
        for name, features in (
            ("x", spec.input_size), ("dx", spec.input_size), ("y", spec.output_size), ("dy", spec.output_size),
        ):  # fmt: skip
            if name in self._buffers and f"{name}_row" in symbols:
                row = features * self._item
                strides = (row, steps * row) if self._batch_first else (batch * row, row)
                values[symbols[f"{name}_step"]], values[symbols[f"{name}_row"]] = strides
        values[symbols["spins"]] = pool_team(threads).spins
        return values

    def _symbols_of_buffers(self, symbols: Mapping[str, int]) -> Array:
        """The number of each buffer whose address is the value of a symbol, and the number of that symbol."""
        special = "params", "dparams", "lengths", "seed", ""
        pairs = [(number, symbols[name]) for number, name in enumerate(self._buffers) if name not in special]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def run(self, addresses: Sequence[int]) -> int:
        """Run it on buffers at these addresses; see :func:`fusedrnn.engines.cpu.launch.buffer_kernel.emit_run_buffers`.

        For callers in Python, such as tests.
        """
        buffers = np.array(addresses, np.int64)
        return int(load_run_buffers()(self.address, buffers.ctypes.data))


def _struct(layout: Struct, fields: dict[str, int]) -> Array:
    struct = aligned_empty((len(layout),), np.int64)
    struct[:] = layout.values(fields)
    return struct


def _buffer_args(args: KernelArgs) -> tuple[Array, Array, Array]:
    """The struct of a plan's kernel arguments, and arrays that it points to."""
    row_starts = np.array(args.plan.row_starts, np.int64)
    unsorted_indices = np.ascontiguousarray(round_robin(args.plan.row_starts), np.int64)
    struct = _struct(BUFFER_ARGS, {
        "num_threads": args.num_threads, "relocs": args.relocs, "num_fields": args.num_fields,
        "args_offset": args.args_offset, "workspace_offset": args.workspace_offset,
        "row_starts": row_starts.ctypes.data, "num_groups": len(row_starts) - 1,
        "unsorted_indices": unsorted_indices.ctypes.data,
    })  # fmt: skip
    return struct, row_starts, unsorted_indices


class _NativeWeights:
    """The packed weights of a spec for machine code: a few slots, and how to pack into them."""

    def __init__(self, cache: WeightCache, arrays: GatheredParams | None) -> None:
        tiling, layout = cache.tiling, cache.layout
        if arrays is not None and len(arrays.sizes) > MAX_ARRAYS:
            raise ValueError(f"parameters may be at most {MAX_ARRAYS} arrays; there are {len(arrays.sizes)}")
        tuning = tunings.current()
        slots = tuning.max_packed_vectors
        self._slots = aligned_empty((slots, len(WEIGHTS_SLOT)), np.int64)
        self._slots[:] = 0
        self._layout = layout
        self._repack = _repack_function(cache) if tiling.scale_offsets else None
        size = tiling.spec.layout.size * tiling.item
        self._sizes = np.array([size] if arrays is None else arrays.sizes, np.int64)
        self._transposes = None if arrays is None else TransposeCall(arrays.blocks)
        self._struct = _struct(WEIGHTS, {
            "slots": self._slots.ctypes.data, "num_slots": slots, "clock": 0,
            "sizes": self._sizes.ctypes.data, "num_arrays": len(self._sizes),
            "transpose": 0 if self._transposes is None else address(load_transpose(tiling.spec.dtype)),
            "transposes": 0 if self._transposes is None else self._transposes.address,
            "flat_offset": layout.flat_offset, "flat_size": size,
            "packed_size": layout.flat_offset, "packed_size_forward": layout.backward_offset,
            "tasks": layout.tasks.ctypes.data, "num_tasks": len(layout.tasks),
            "num_tasks_forward": len(layout.forward_tasks),
            "pack": address(load_pack(tiling.spec.operand_format, tiling.target)),
            "pack_threads": int(2 * size <= tuning.parallel_pack_bytes),
            "repack": 0 if self._repack is None else address(self._repack),
            "fingerprint": address(load_fingerprint()), "dispatch": address(load_pool().dispatch),
        })  # fmt: skip
        self.address: int = self._struct.ctypes.data
        free_with(self, self._slots)


@lru_cache(maxsize=256)
def _native_weights(cache: WeightCache, arrays: GatheredParams | None) -> _NativeWeights:
    return _NativeWeights(cache, arrays)


def _repack_function(cache: WeightCache) -> Callable[..., None]:
    """A C function of (slot, params) that quantizes parameters and packs them: once for each parameter vector."""

    def repack(slot: int, params: int) -> None:
        size = cache.tiling.spec.layout.size * cache.tiling.item
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(params))
        packed = ctypes.c_int64.from_address(slot + WEIGHTS_SLOT.offset("address")).value
        cache.pack_quantized_into(packed, data)
        ctypes.c_int64.from_address(slot + WEIGHTS_SLOT.offset("packed")).value = 1

    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(repack)


@lru_cache(maxsize=1)
def _ensure_pool_function() -> Callable[..., None]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(ensure_pool)


@load_once()
def load_run_buffers() -> Callable[..., int]:
    """The function ``run(call, buffers)``: the address of a :class:`BufferCall`, and that of its buffers' addresses."""
    return function(load("run_buffers", current_target(), build_run_buffers), "run", 2, returns=True)
