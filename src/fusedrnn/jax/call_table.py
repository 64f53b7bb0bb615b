"""The prepared calls for XLA. The first call of a job with a shape makes one; later calls find it by machine code."""

from __future__ import annotations

import ctypes
import math
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from fusedrnn.engines.cpu.buffer_call import BufferCall, GatheredParams, load_run_buffers
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.launch.buffer_kernel import BAD_LENGTH, NO_MEMORY, NOT_ALIGNED
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.tiling import Tiling, unsupported_heads
from fusedrnn.engines.cpu.weights.transpose_kernel import TransposeCall, load_transpose
from fusedrnn.jax import ffi_layout as ffi
from fusedrnn.jax.array_layout import ArrayLayout
from fusedrnn.jax.calls import Call, Job, NetworkJob, restore
from fusedrnn.jax.handler_kernel import ENTRY, MAX_BUFFERS, NOT_PREPARED, OTHER_VERSION, TABLE, build_handler
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import address, function, load
from fusedrnn.jit.target import widest_target
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.native_state import num_threads_cell, publish_num_threads
from fusedrnn.runtime.thread_pool import process_num_threads
from fusedrnn.spec import RNNSpec

TARGET_NAME = "fusedrnn_call"
# The number of prepared calls to keep. Each takes about ten kilobytes.
_MAX_CALLS = 256
# XLA copies a message without holding the lock, so it must stay in memory for a while after later ones.
_MAX_REASONS = 256
_MESSAGES = {
    BAD_LENGTH: b"fusedrnn: each of lengths must be from 0 to the number of steps",
    NO_MEMORY: b"fusedrnn: there is no memory for the workspace or the packed weights",
    NOT_ALIGNED: b"fusedrnn: the buffer of the reserve does not begin at a multiple of 64",
    NOT_PREPARED: b"fusedrnn: interrupted: a signal handler raised an exception",
    OTHER_VERSION: b"fusedrnn: this jaxlib has an unknown version of the foreign function interface",
}


class CallTable:
    """The prepared calls, and the handler that runs them.

    Attributes:
        handler: The address of the function for XLA.
    """

    def __init__(self) -> None:
        code = load("jax_handler", current_target(), build_handler)
        self._insert = function(code, "insert", 2)
        self._remove = function(code, "remove", 2, returns=True)
        self._code, self.handler = code, code.address("handler")
        self._lock = Lock()
        self._calls: OrderedDict[tuple[int, ...], tuple[Any, BufferCall | TransposeCall]] = OrderedDict()
        self._prepare = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(self._prepare_or_explain)
        self._texts = {status: ctypes.create_string_buffer(text) for status, text in _MESSAGES.items()}
        self._reasons: deque[ctypes.Array[ctypes.c_char]] = deque(maxlen=_MAX_REASONS)
        self._messages = np.zeros(max(OTHER_VERSION, NOT_PREPARED) + 1, np.int64)
        for status, buffer in self._texts.items():
            self._messages[status] = ctypes.addressof(buffer)
        self._table = aligned_empty((len(TABLE),), np.int64)
        values = {
            "lock": 0, "first": 0, "num_threads": num_threads_cell(), "prepare": address(self._prepare),
            "messages": self._messages.ctypes.data,
        }  # fmt: skip
        self._table[:] = TABLE.values(values)
        function(code, "set_table", 1)(self._table.ctypes.data)
        publish_num_threads(process_num_threads())

    def _prepare_or_explain(self, frame: int, key: int, rows: int, columns: int) -> int:
        """Prepare a call for the frame of XLA's call; if that fails, set a message and return 0."""
        try:
            self._prepare_call(key, _description(frame), rows, columns)
        except BaseException as error:  # machine code calls this, and cannot handle an exception
            text = "".join(traceback.format_exception_only(error)).strip()
            self._explain(text)
            return 0
        return 1

    def _explain(self, reason: str) -> None:
        """Set the message for a call that cannot be prepared."""
        buffer = ctypes.create_string_buffer(f"fusedrnn: {reason}".encode())
        self._messages[NOT_PREPARED] = ctypes.addressof(buffer)
        self._reasons.append(buffer)  # after the message is set, as this may free the oldest one

    def _prepare_call(self, key: int, description: str, rows: int, columns: int) -> None:
        job = restore(key, description)
        threads = process_num_threads()
        publish_num_threads(threads)
        with self._lock:
            place = key, rows, columns, threads
            if place not in self._calls:
                run, call = prepare(job, rows, columns, threads)
                entry = aligned_empty((len(ENTRY),), np.int64)
                entry[:] = [0, *place, 0, run, call.address]
                self._calls[place] = entry, call
                self._insert(self._table.ctypes.data, entry.ctypes.data)
                self._forget_old()

    def _forget_old(self) -> None:
        """Remove the oldest calls that no thread runs, if there are too many."""
        for place, (entry, _) in list(self._calls.items()):
            if len(self._calls) <= _MAX_CALLS:
                break
            if self._remove(self._table.ctypes.data, entry.ctypes.data):
                del self._calls[place]


def prepare(job: Job, rows: int, columns: int, threads: int) -> tuple[int, BufferCall | TransposeCall]:
    """The address of the function that runs a job, and its argument, the call; see :data:`ENTRY`."""
    if isinstance(job, NetworkJob):
        return address(load_run_buffers()), _buffer_call(job, *job.call.sizes((rows, columns)), threads)
    if any(max(block.source, block.dest) >= MAX_BUFFERS for block in job.blocks):
        raise ValueError(f"a vector of parameters is made of more than {MAX_BUFFERS - 1} arrays")
    return address(load_transpose(job.dtype)), TransposeCall(job.blocks)


def _buffer_call(job: NetworkJob, steps: int, batch: int, threads: int) -> BufferCall:
    """The call of the CPU engine for a job of T steps of N sequences."""
    call, kind, needs = job
    buffers = call.buffers(kind, needs)
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"a network of {call.spec.mode!r} has more than {MAX_BUFFERS} operands and results")
    executor = executor_of(call.spec)
    layout = None
    if kind != "forward":
        layout = executor.training_call(steps, batch, resets=True if "resets" in call.options else None).layout
    problem = executor.problem("inference" if kind == "forward" else kind, steps, batch, layout)
    arrays = None if call.arrays is None else _gathered_params(call.arrays, call.spec.dtype)
    return BufferCall(executor, problem, threads, buffers, call.batch_first, arrays)


def _gathered_params(layout: ArrayLayout, dtype: str) -> GatheredParams:
    item = np.dtype(dtype).itemsize
    return GatheredParams(tuple(math.prod(shape) * item for shape in layout.shapes), layout.to_vector(dtype))


@lru_cache(maxsize=256)
def executor_of(spec: RNNSpec) -> Executor:
    """The executor of a spec."""
    return Executor(spec)


def reserve_size(call: Call, steps: int, batch: int) -> int:
    """Bytes that suffice for a training call's reserve on any processor: an exported program may run on another."""
    if unsupported_heads(call.spec) is not None:
        return 0
    tiling = Tiling(call.spec, widest_target())
    return ReserveLayout.of(tiling, steps, batch, "gates", "resets" in call.options).size


def _description(frame: int) -> str:
    """The description of the job, from the attributes of a frame; the first attribute is the key."""

    def integer(at: int) -> int:
        return ctypes.c_int64.from_address(at).value

    names = [_text(integer(integer(frame + ffi.ATTR_NAMES) + 8 * n)) for n in range(integer(frame + ffi.NUM_ATTRS))]
    if names != ["key", "plan"]:
        raise RuntimeError(f"the attributes of the call must be key and plan; got {', '.join(names)}")
    return _text(integer(integer(frame + ffi.ATTRS) + 8))


def _text(span: int) -> str:
    """The text of an XLA_FFI_ByteSpan at that address."""
    at, size = (ctypes.c_int64.from_address(span + offset).value for offset in (ffi.SPAN_ADDRESS, ffi.SPAN_SIZE))
    return ctypes.string_at(at, size).decode()


@lru_cache(maxsize=1)
def register() -> Callable[..., Any]:
    """Register the handler with XLA, once; returns the lowering to it."""
    table = CallTable()
    _immortal.append(table)
    jax.ffi.register_ffi_target(TARGET_NAME, _capsule(table.handler), platform="cpu")
    lowering: Callable[..., Any] = jax.ffi.ffi_lowering(TARGET_NAME)
    return lowering


_immortal: list[object] = []


def _capsule(function_address: int) -> Any:
    return jax.ffi.pycapsule(ctypes.c_void_p(function_address))
