"""A job on NumPy arrays, run by machine code if the arrays pass their guards.

The guards, the kernel arguments and the job are written down once, from the arrays of a checked call. Each further call
passes its arrays as they are. If one does not pass its guard, nothing happens, and the operator makes a checked call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.launch import ndarray_abi
from fusedrnn.engines.cpu.launch.guard_kernel import CALL_CACHE, GUARD, load_guarded_call
from fusedrnn.engines.cpu.launch.kernel_args import MAX_ARRAYS, KernelArgs
from fusedrnn.engines.cpu.plan.thread_trials import ThreadChoice
from fusedrnn.jit.loader import Job, address
from fusedrnn.runtime.buffers import Workspaces
from fusedrnn.runtime.thread_pool import ThreadTeam, get_pool, load_pool, release_pool, try_acquire_pool

Array = NDArray[Any]
# The struct of a cached call, its address, its threads, and the size of its scratch. A plain tuple: it unpacks faster
# than a named one.
Variant = tuple[Array, int, int, int]


class CannotGuard(Exception):
    """An array is of a kind that no guard can describe, or the interpreter lays out objects in an unknown way."""


class GuardedCall:
    """A job on arrays like those of an earlier call.

    Args:
        job: The job.
        args: Its kernel arguments for threads that sleep, for threads that spin, and for one thread.
        team: The threads for it.
        workspaces: Where its scratch buffers come from.
        thread_choice: Decides between several threads and one; None for calls that stay as planned.
        samples: For each argument: an array of the kind that it must be, or None; the symbol for its address; and
            whether the job writes it.
        constants: Values of symbols that are the same at every call.
        unpacked: The symbol of the first unpacked parameter; empty if weights are packed.
        dparams: The symbol of the first parameter's gradient; empty if these are not computed.
        offsets: Byte offset of each parameter in the flat vector.
        computes_dx: Whether the job computes the input's gradient.

    Raises:
        CannotGuard: If there is no guard for one of the samples.
    """

    def __init__(
        self,
        job: Job,
        args: tuple[KernelArgs, KernelArgs, KernelArgs],
        team: ThreadTeam,
        workspaces: Workspaces,
        thread_choice: ThreadChoice | None,
        samples: Sequence[tuple[Any, str, bool]],
        constants: Mapping[str, int],
        *,
        unpacked: str = "",
        dparams: str = "",
        offsets: Sequence[int] = (),
        computes_dx: bool = False,
    ) -> None:
        sleeping, spinning, single = self._args = args
        self._team, self._workspaces, self._thread_choice = team, workspaces, thread_choice
        self._forecast = spinning.plan.forecast
        self._call = load_guarded_call()
        symbols = sleeping.symbol_index
        self._set_guards(samples, symbols)
        self._values = np.zeros(len(symbols), np.int64)
        for name, value in {**constants, "spins": team.spins}.items():
            self._values[symbols[name]] = value
        self._param_offsets = np.array(offsets, np.int64)
        weights = "weights"
        if unpacked:  # a parameter vector among the arguments is the base itself
            weights = "nothing" if any(name == "params" for _, name, _ in samples) else "params"
        fields = {
            **self._common_fields(symbols), "weights_symbol": symbols[weights],
            "dx_partials_symbol": symbols["dx_partials"] if computes_dx else 0,
            "unpacked_base": symbols["params"] if unpacked else 0,
            "unpacked_first": symbols[unpacked] if unpacked else 0,
            "dparams_base": symbols["dparams"] if dparams else 0,
            "dparams_first": symbols[dparams] if dparams else 0,
            "job": address(job),
        }  # fmt: skip
        self._sleeping = self._variant(fields, sleeping)
        self._spinning = self._sleeping if spinning is sleeping else self._variant(fields, spinning)
        self._single = self._spinning if single is spinning else self._variant(fields, single)

    def _set_guards(self, samples: Sequence[tuple[Any, str, bool]], symbols: Mapping[str, int]) -> None:
        guards = [ndarray_abi.guard_of(sample, symbols[name], written) for sample, name, written in samples]
        if ndarray_abi.object_layout() is None or None in guards:
            raise CannotGuard
        assert len(guards) <= MAX_ARRAYS
        self._dtypes = [sample.dtype for sample, *_ in samples if sample is not None]  # guards compare their identity
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
            "reserve_symbol": symbols["reserve"], "seed_symbol": symbols["seed"],
            "workspace_symbol": symbols["workspace"], "args_symbol": symbols["args"],
            "param_offsets": self._param_offsets.ctypes.data, "num_params": len(self._param_offsets),
            "dispatch": address(load_pool().dispatch),
            "num_workers": self._team.threads - 1, "spins": self._team.spins,
        }  # fmt: skip

    @staticmethod
    def _variant(fields: Mapping[str, int], args: KernelArgs) -> Variant:
        """The cached call with these kernel arguments."""
        fields = {
            **fields, "extents_offset": args.extents_offset, "args_offset": args.args_offset,
            "plan_offset": args.plan_offset, "num_threads": args.num_threads,
            "relocs": args.relocs, "num_fields": args.num_fields,
        }  # fmt: skip
        struct = np.array([fields[name] for name in CALL_CACHE.names], np.int64)
        return struct, struct.ctypes.data, args.num_threads, args.size

    def run(self, arrays: tuple[Any, ...], weights: int = 0, reserve: int = 0, seed: int = 0) -> bool:
        """Run the job on these arrays; False if it has not run: a guard fails, or another call has the threads.

        ``weights`` is the address of the packed parameters, or of unpacked ones that are not among the arrays.
        """
        team = self._team
        _, cache, num_threads, size = self._spinning if team.note_call_start() else self._sleeping
        thread_choice = self._thread_choice if num_threads > 1 else None
        if thread_choice is not None:
            began = perf_counter()
            if not thread_choice.use_several(began):
                _, cache, num_threads, size = self._single
        scratch = self._workspaces.acquire(size)
        if num_threads == 1:
            ran = self._call(cache, scratch.address, arrays, 0, weights, reserve, seed)
        else:
            lease = try_acquire_pool()
            if lease is None:
                return False
            try:
                pool = get_pool(team.threads)
                if pool is None:
                    return False
                ran = self._call(cache, scratch.address, arrays, pool.control(), weights, reserve, seed)
            finally:
                release_pool(lease)
        self._workspaces.release(scratch)
        team.note_call_end(num_threads)
        if thread_choice is not None and self._forecast is not None and ran:
            now = perf_counter()
            thread_choice.note(num_threads > 1, now - began, now, self._forecast)
        return bool(ran)
