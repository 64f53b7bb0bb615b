"""A job on NumPy arrays, run by machine code if the arrays pass their guards.

The guards, the kernel arguments and the job are stored once, from the arrays of a checked call. Each further call hands
over its arrays as they are. If an array fails its guard, nothing runs, and the operator makes a checked call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import Executor
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.launch.call_kernel import CALL_CACHE, GUARD, load_guarded_call
from fusedrnn.engines.cpu.launch.kernel_args import JobArgs, PlannedJob
from fusedrnn.engines.operands import ArrayUse
from fusedrnn.jit import ndarray_abi
from fusedrnn.jit.loader import address
from fusedrnn.runtime.native_state import control_cell
from fusedrnn.runtime.pool_kernel import NO_POOL, RAN
from fusedrnn.runtime.thread_pool import ensure_pool, get_num_threads, load_pool, pool_team

R = TypeVar("R")
# The struct of a cached call, its address, its threads, and the size of its scratch. A plain tuple unpacks faster
# than a named one.
CallStruct = tuple[Array, int, int, int]


class CannotGuard(Exception):
    """An array is of a kind that no guard can describe, or the interpreter lays out objects in an unknown way."""


def try_to_cache(debug: int, cached_call: Callable[..., R], *arguments: Any) -> R | None:
    """A cached call of these arguments; None if one cannot be guarded, or if ``debug`` > 1: then all are checked."""
    if debug >= 2:
        return None
    try:
        return cached_call(*arguments)
    except CannotGuard:
        return None


class GuardedJob:
    """A job on arrays like those of an earlier call.

    Args:
        executor: What ran the call.
        planned: Its arguments.
        uses: How it uses each of its arrays, by name.
        arrays: An array of the kind that each operand must be, or None.
        symbols: The symbol whose value is an array's address, by the name of the array; only where the names differ.
        constants: Values of symbols that are the same at every call.
        fields: Fields of :data:`fusedrnn.engines.cpu.launch.call_kernel.CALL_CACHE` that depend on the call.
        num_values: The number of the first symbol whose value :meth:`run` takes from ``values``.

    Raises:
        CannotGuard: If there is no guard for one of the arrays.
    """

    def __init__(
        self,
        executor: Executor,
        planned: PlannedJob[Any],
        uses: Mapping[str, ArrayUse],
        arrays: Sequence[Array | None],
        symbols: Mapping[str, str],
        constants: Mapping[str, int],
        fields: Mapping[str, int],
        num_values: int,
    ) -> None:
        self._team, self._scratch_pool = pool_team(planned.threads), executor.scratch_pool
        sleeping, spinning = planned.args, planned.spinning_args
        self._forecast = spinning.forecast
        single = spinning if self._forecast is None else planned.single_args
        self._is_single = planned.is_single
        self._args = sleeping, spinning, single
        self._thread_choice = executor.thread_choices.of(planned.name, self._forecast)
        self._call = load_guarded_call()
        index, by_name = sleeping.symbol_index, dict(zip(uses, arrays, strict=True))
        # Guards compare the identity of dtypes, so these must stay alive.
        self._dtypes = [array.dtype for array in arrays if array is not None]
        assert len(arrays) <= sleeping.num_arrays
        self._set_guards([
            ndarray_abi.guard_of(array, index[symbols.get(name, name)], uses[name].written)
            for name, array in by_name.items()
        ])
        self._values = np.zeros(num_values, np.int64)
        for name, value in {**constants, **_strides(by_name), "spins": self._team.spins}.items():
            self._values[index[name]] = value
        self._given_values = struct.Struct(f"{len(index) - num_values}q")
        fields = {**self._common_fields(index), **fields, "job": address(planned.job)}
        self._sleeping = self._call_struct(fields, sleeping)
        self._spinning = self._sleeping if spinning is sleeping else self._call_struct(fields, spinning)
        self._single = self._spinning if single is spinning else self._call_struct(fields, single)

    def _set_guards(self, guards: Sequence[list[int] | None]) -> None:
        if ndarray_abi.object_layout() is None or None in guards:
            raise CannotGuard
        self._guards = np.array(guards, np.int64)
        assert self._guards.shape[1] == len(GUARD)

    def _common_fields(self, symbols: Mapping[str, int]) -> dict[str, int]:
        """The fields of :data:`CALL_CACHE` that do not depend on the arguments."""
        layout = ndarray_abi.object_layout()
        assert layout is not None
        return {
            **layout._asdict(), "ndarray_type": id(np.ndarray),
            "guards": self._guards.ctypes.data, "num_guards": len(self._guards),
            "values": self._values.ctypes.data, "values_size": self._values.nbytes,
            **{f"{name}_symbol": symbols[name] for name in ("reserve", "workspace", "args")},
            "dispatch": address(load_pool().dispatch), "control": control_cell(), "threads": self._team.threads,
        }  # fmt: skip

    @staticmethod
    def _call_struct(fields: Mapping[str, int], args: JobArgs) -> CallStruct:
        """The cached call with these arguments."""
        fields = {
            **fields, "extents_offset": args.extents_offset, "args_offset": args.args_offset,
            "workspace_offset": args.workspace_offset, "num_threads": args.num_threads,
            "relocs": args.relocs, "num_fields": args.num_fields,
        }  # fmt: skip
        call = np.array(CALL_CACHE.values(fields), np.int64)
        return call, call.ctypes.data, args.num_threads, args.size

    def run(
        self, arrays: tuple[Any, ...], weights: int = 0, reserve: int = 0, seed: int = 0, values: Sequence[int] = ()
    ) -> bool:
        """Run the job on these arrays; False if it has not run: a guard failed, or another call has the threads.

        ``weights`` is the address of the packed parameters, or of unpacked parameters that are not among the arrays.
        ``values`` are the values of the last symbols.
        """
        team, choice, began = self._team, None, 0.0
        _, cache, num_threads, size = self._single
        if not self._is_single:
            began = perf_counter()
            several = self._spinning if team.note_call_start(began) else self._sleeping
            choice = self._thread_choice if several[2] > 1 else None
            if choice is None or choice.use_several(began):
                _, cache, num_threads, size = several
        scratch = self._scratch_pool.acquire(size)
        if values:
            self._given_values.pack_into(scratch.buffer.data, self._values.nbytes, *values)
        status = self._call(cache, scratch.address, arrays, weights, reserve, seed)
        if status == NO_POOL and ensure_pool(team.threads):
            status = self._call(cache, scratch.address, arrays, weights, reserve, seed)
        self._scratch_pool.release(scratch)
        if not self._is_single:
            now = perf_counter()
            team.note_call_end(num_threads, now)
            if choice is not None and self._forecast is not None and status == RAN:
                choice.note(num_threads > 1, now - began, now, self._forecast)
        return status == RAN


class GuardedCall(GuardedJob):
    """The job of a spec on arrays like those of an earlier call.

    Args:
        executor: What ran the call.
        problem: What it computed.
        uses: How it uses each of its arrays, by name.
        arrays: An array of the kind that each operand must be, or None.
        weights: The symbol whose value is the argument ``weights`` of :meth:`run`: ``"weights"`` for packed
            parameters, ``"params"`` for unpacked ones, ``"nothing"`` if unpacked ones are among the arrays.
        constants: Values of symbols, other than strides, that are the same at every call.

    Raises:
        CannotGuard: If there is no guard for one of the arrays.
    """

    def __init__(
        self,
        executor: Executor,
        problem: Problem,
        uses: Mapping[str, ArrayUse],
        arrays: Sequence[Array | None],
        weights: str,
        constants: Mapping[str, int],
    ) -> None:
        planned = executor.planned(problem, get_num_threads())
        symbols = planned.args.symbol_index
        self._param_offsets = np.array(executor.weight_cache.offsets, np.int64)
        first_param = executor.spec.layout.by_layer_direction[0].name
        unpacked, computes_dparams = weights != "weights", _is_given("dparams", uses, arrays)
        optional = {
            "dx_partials_symbol": ("dx_partials", _is_given("dx", uses, arrays)),
            "unpacked_base": ("params", unpacked), "unpacked_first": (f"unpacked {first_param}", unpacked),
            "dparams_base": ("dparams", computes_dparams), "dparams_first": (first_param, computes_dparams),
        }  # fmt: skip
        fields = {
            "param_offsets": self._param_offsets.ctypes.data, "num_params": len(self._param_offsets),
            "weights_symbol": symbols[weights], "seed_symbol": symbols["seed"],
            **{field: symbols[symbol] if used else 0 for field, (symbol, used) in optional.items()},
        }  # fmt: skip
        array_symbols = {} if weights == "nothing" else {"params": "nothing"}
        super().__init__(executor, planned, uses, arrays, array_symbols, constants, fields, len(symbols))


def _is_given(name: str, uses: Mapping[str, ArrayUse], arrays: Sequence[Array | None]) -> bool:
    """Whether there is an array of that name."""
    return dict(zip(uses, arrays, strict=True)).get(name) is not None


def _strides(arrays: Mapping[str, Array | None]) -> dict[str, int]:
    """The strides of the arrays (T, N, features), by symbol."""
    return {
        f"{name}_{axis}": stride
        for name in ("x", "y", "dy", "dx") if (array := arrays.get(name)) is not None
        for axis, stride in zip(("step", "row"), array.strides, strict=False)
    }  # fmt: skip
