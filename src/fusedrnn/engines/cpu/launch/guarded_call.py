"""A job on NumPy arrays, run by machine code if the arrays pass their guards.

The guards, the kernel arguments and the job are written down once, from the arrays of a checked call. Each further call
passes its arrays as they are. If one does not pass its guard, nothing happens, and the operator makes a checked call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.launch import ndarray_abi
from fusedrnn.engines.cpu.launch.guard_kernel import CALL_CACHE, GUARD, load_guarded_call
from fusedrnn.engines.cpu.launch.kernel_args import OBJECTS, KernelArgs
from fusedrnn.engines.cpu.plan.thread_trials import ThreadChoice
from fusedrnn.jit.loader import Job, address
from fusedrnn.runtime.buffers import Workspaces
from fusedrnn.runtime.thread_pool import ThreadTeam, get_pool, load_pool, release_pool, try_acquire_pool

Array = NDArray[Any]


class CannotGuard(Exception):
    """An array is of a kind that no guard can describe, or the interpreter lays out objects in an unknown way."""


class _Variant(NamedTuple):
    """The struct of a cached call on so many threads, its address, and the size of its scratch buffer."""

    struct: Array
    address: int
    num_threads: int
    scratch_size: int


class GuardedCall:
    """A job on arrays like those of an earlier call.

    Args:
        job: The job.
        args: Its kernel arguments for threads that sleep, for threads that are awake, and for one thread.
        team: The threads for it.
        workspaces: Where its scratch buffers come from.
        thread_choice: Decides between several threads and one; None for calls that stay as planned.
        samples: For each argument: an array of the kind that it must be, or None; the name of the value that its
            address is; and whether the job writes it.
        constants: Values that are the same at every call.
        unpacked: The name of the first unpacked parameter's value; empty if weights are packed.
        dparams: The name of the first parameter gradient's value; empty if these are not computed.
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
        sleeping, awake, single = self._args = args
        self._team, self._workspaces, self._thread_choice = team, workspaces, thread_choice
        self._forecast = awake.plan.forecast
        self._call = load_guarded_call()
        place = sleeping.place
        self._set_guards(samples, place)
        self._values = np.zeros(len(place), np.int64)
        for name, value in {**constants, "spins": team.spins}.items():
            self._values[place[name]] = value
        self._param_offsets = np.array(offsets, np.int64)
        weights = "weights"
        if unpacked:  # a parameter vector among the arguments is the base itself
            weights = "nothing" if any(name == "params" for _, name, _ in samples) else "params"
        fields = {
            "guards": self._guards.ctypes.data, "num_guards": len(self._guards),
            "values": self._values.ctypes.data, "values_size": self._values.nbytes,
            "weights_value": place[weights], "reserve_value": place["reserve"], "seed_value": place["seed"],
            "workspace_value": place["workspace"], "args_value": place["records"],
            "dx_partials_value": place["dx_partials"] if computes_dx else 0,
            "unpacked_base": place["params"] if unpacked else 0, "unpacked_first": place[unpacked] if unpacked else 0,
            "dparams_base": place["dparams"] if dparams else 0, "dparams_first": place[dparams] if dparams else 0,
            "param_offsets": self._param_offsets.ctypes.data, "num_params": len(offsets),
            "job": address(job), "dispatch": address(load_pool().dispatch),
            "num_workers": team.threads - 1, "spins": team.spins,
        }  # fmt: skip
        self._sleeping, self._awake, self._single = (self._variant(fields, each) for each in (sleeping, awake, single))

    def _set_guards(self, samples: Sequence[tuple[Any, str, bool]], place: Mapping[str, int]) -> None:
        guards = [ndarray_abi.guard_of(sample, place[name], written) for sample, name, written in samples]
        if ndarray_abi.object_layout() is None or None in guards:
            raise CannotGuard
        assert len(guards) <= OBJECTS
        self._dtypes = [sample.dtype for sample, *_ in samples if sample is not None]  # guards compare their identity
        self._guards = np.array(guards, np.int64)
        assert self._guards.shape[1] == len(GUARD)

    def _variant(self, fields: Mapping[str, int], args: KernelArgs) -> _Variant:
        layout = ndarray_abi.object_layout()
        assert layout is not None
        fields = {
            **fields, **layout._asdict(), "ndarray_type": id(np.ndarray), "extents_offset": args.objects_at,
            "args_offset": args.records_at, "plan_offset": args.plan_at, "num_threads": args.num_threads,
            "fields": args.template.address, "num_fields": args.template.count,
        }  # fmt: skip
        struct = np.array([fields[name] for name in CALL_CACHE.names], np.int64)
        return _Variant(struct, struct.ctypes.data, args.num_threads, args.size)

    def run(self, arrays: tuple[Any, ...], weights: int = 0, reserve: int = 0, seed: int = 0) -> bool:
        """Run the job on these arrays; False if it has not run: a guard fails, or another call has the threads.

        ``weights`` is the address of the packed parameters, or of unpacked ones that are not among the arrays.
        """
        team = self._team
        _, cache, num_threads, size = self._awake if team.note_call_start() else self._sleeping
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
