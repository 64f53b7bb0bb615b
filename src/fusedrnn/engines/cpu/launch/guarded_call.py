"""Calls like the one before, on NumPy arrays of the same shapes: checked, filled in and run by machine code at once.

What took checking at length is written down once: what the arrays were like, the records' template, the job. The next
call hands over its arrays as they are; if any is not alike, nothing has happened, and the call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.cpu.launch import ndarray_abi as objects
from fusedrnn.engines.cpu.launch.guard_kernel import BLOCK, SLOT, load_serve
from fusedrnn.engines.cpu.launch.kernel_args import OBJECTS, KernelArgs
from fusedrnn.engines.cpu.plan.thread_trials import Forecast, ThreadChoice
from fusedrnn.jit.loader import Job, address
from fusedrnn.runtime.buffers import Workspaces
from fusedrnn.runtime.thread_pool import ThreadTeam, get_pool, load_pool, release_pool, try_acquire_pool

Array = NDArray[Any]


class Unprepared(Exception):
    """There are arrays among the samples that machine code cannot know again."""


class Prepared:
    """A job on arrays like some sample.

    Args:
        job: What runs.
        made: Its records, and if it may be called with threads awake, those for that too.
        team: The threads for it.
        workspaces: Where it gets its scratch.
        thread_choice: What calls of a forecast have shown of several threads.
        samples: The arrays in the order in which they will come, None for those that will be None: the value that each
            one's address is, and whether it is written to.
        constants: Values that are the same at every call.
        loose: Where the parameters' values begin, if they come as they lie and not packed.
        wanted: Where their gradients' values begin, if they are wanted.
        offsets: How far behind the first parameter each lies.
        parts: Whether directions need room for parts of the input's gradient.

    Raises:
        Unprepared: If a sample is of a kind that machine code does not know.
    """

    def __init__(
        self,
        job: Job,
        made: KernelArgs,
        team: ThreadTeam,
        workspaces: Workspaces,
        thread_choice: Callable[[Forecast | None], ThreadChoice | None],
        samples: Sequence[tuple[Any, str, bool]],
        constants: Mapping[str, int],
        *,
        loose: str = "",
        wanted: str = "",
        offsets: Sequence[int] = (),
        parts: bool = False,
    ) -> None:
        self._team, self._workspaces = team, workspaces
        self._dtypes = [value.dtype for value, *_ in samples if value is not None]  # known by their identity
        place = made.place
        slots = [objects.described(value, place[name], written) for value, name, written in samples]
        found = objects.layout()
        if found is None or None in slots:
            raise Unprepared
        self._serve = load_serve()
        assert len(slots) <= OBJECTS
        self._slots = np.array(slots, np.int64)
        assert self._slots.shape[1] == len(SLOT)
        self._values = np.zeros(len(place), np.int64)
        for name, value in constants.items():
            self._values[place[name]] = value
        self._values[place["spins"]] = team.spins
        self._offsets = np.array(offsets, np.int64)
        given = {name for _, name, _ in samples}
        self._fields = {
            **found._asdict(), "type": id(np.ndarray), "slots": self._slots.ctypes.data, "count": len(slots),
            "values": self._values.ctypes.data, "values_size": self._values.nbytes,
            # A parameter vector among the arrays is the base itself.
            "weights_into": place[("nothing" if "params" in given else "params") if loose else "weights"],
            "reserve_into": place["reserve"], "seed_into": place["seed"], "workspace_into": place["workspace"],
            "parts_into": place["dx_partials"] if parts else 0,
            "loose_from": place["params"] if loose else 0, "loose_into": place[loose] if loose else 0,
            "wanted_from": place["dparams"] if wanted else 0, "wanted_into": place[wanted] if wanted else 0,
            "offsets": self._offsets.ctypes.data, "offset_count": len(offsets), "records_into": place["records"],
            "job": address(job), "dispatch": address(load_pool().dispatch), "spins": team.spins,
        }  # fmt: skip
        self._now = self._block(made)
        self._awake = self._now if made.awake is None else self._block(made.awake)
        self._alone = self._now if made.alone is None else self._block(made.alone)
        self._forecast = (made.awake if made.awake is not None else made).plan.forecast
        self._trend = thread_choice(self._forecast)

    def _block(self, made: KernelArgs) -> tuple[Array, int, int, int]:
        """The block of these records, where it is, their members and their workspace's size."""
        fields = {
            **self._fields, "objects_at": made.objects_at, "records_at": made.records_at, "plan_at": made.plan_at,
            "fields": made.template.address, "field_count": made.template.count,
            "members": made.num_threads, "workers": self._team.threads - 1,
        }  # fmt: skip
        block = np.array([fields[name] for name in BLOCK.names], np.int64)
        # The template belongs to the records: they live as long as the block.
        self._kept = (*getattr(self, "_kept", ()), made)
        return block, block.ctypes.data, made.num_threads, made.size

    def run(self, arrays: tuple[Any, ...], weights: int = 0, reserve: int = 0, seed: int = 0) -> bool:
        """Run it on these arrays, held for as long; False if it has not run: they are not alike, or the pool is taken.

        ``weights`` is where the packed parameters are, or those that are not among the arrays and come as they lie.
        """
        team = self._team
        _, block, members, size = self._awake if team.note_call_start() else self._now
        thread_choice = self._trend if members > 1 else None
        if thread_choice is not None:
            began = perf_counter()
            if not thread_choice.use_several(began):
                _, block, members, size = self._alone
        scratch = self._workspaces.acquire(size)
        if members == 1:
            ran = self._serve(block, scratch.address, arrays, 0, weights, reserve, seed)
        else:
            lease = try_acquire_pool()
            if lease is None:
                return False
            try:
                pool = get_pool(team.threads)
                if pool is None:
                    return False
                ran = self._serve(block, scratch.address, arrays, pool.control(), weights, reserve, seed)
            finally:
                release_pool(lease)
        self._workspaces.release(scratch)
        team.note_call_end(members)
        if thread_choice is not None and self._forecast is not None and ran:
            now = perf_counter()
            thread_choice.note(members > 1, now - began, now, self._forecast)
        return bool(ran)
