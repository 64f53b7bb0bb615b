"""The engine: one spec's kernels, packed weights and workspace, and the calls that run a sequence on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn import config
from fusedrnn.codegen.target import current
from fusedrnn.engine import machine, records
from fusedrnn.engine.backward_plan import make_backward_plan
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.pack import Packed, Packer
from fusedrnn.engine.plan import Geometry, make_plan
from fusedrnn.engine.records import Records
from fusedrnn.engine.reserve import Kept, ReserveLayout
from fusedrnn.engine.sequence import cell_of, derivative_of
from fusedrnn.engine.threads import borrow_gang, get_num_threads
from fusedrnn.engine.workspace import Pool, Workspaces
from fusedrnn.gradients import Gradients
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
# Idle reserves that an op keeps for its next calls, if as many were in use at once.
_MOST_RESERVES = 16


class CPUEngine:
    """Runs one spec. Any number of threads may call it at once.

    Raises:
        NotImplementedError: Naming what the spec asks for and this engine does not have.
    """

    def __init__(self, spec: RNNSpec) -> None:
        for name in ("projection_size", "state_clip_min", "state_clip_max"):
            if getattr(spec, name) is not None:
                raise NotImplementedError(f"{name} is not supported yet")
        self.spec, self.target = spec, current()
        self._geometry = Geometry.of(spec, self.target)
        self._packer = Packer(spec, self.target, self._geometry, cell_of(spec.mode).merged)
        self._workspaces, self._reserves = Workspaces(), Pool(_MOST_RESERVES)
        self._plans: dict[str, tuple[tuple[Any, ...], Records]] = {}
        self._jobs: dict[str, machine.Job] = {}
        self._lock = Lock()

    def compile(self, training: bool = False) -> None:
        """Have the machine code at hand, in ``training`` that of both ways; the first call does it otherwise."""
        for name in ("training", "backward") if training else ("forward",):
            self._job(name)

    def _job(self, name: str) -> machine.Job:
        job = self._jobs.get(name)
        if job is None:
            mode, dtype = self.spec.mode, self.spec.dtype
            with self._lock:
                machine.prepare()
                machine.packing(dtype, self.target)
                if name == "backward":
                    job = machine.backward(mode, dtype, self.target)
                else:
                    job = machine.forward(mode, dtype, self.target, training=name == "training")
                self._jobs[name] = job
        return job

    def reserve_bytes(self, steps: int, batch: int, keep: str) -> int:
        """Bytes of the reserve of a forward call with T steps of N sequences."""
        return ReserveLayout.of(self.spec, self._geometry, steps, batch, keep).size

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference on valid arguments.

        ``x`` (T, N, I) and ``y`` (T, N, D·H) with elements side by side in the last axis, ``states`` each contiguous
        (L·D, N, H), ``lengths`` (N,). Writes ``y``, but not its padding; returns the final states.
        """
        return self._run_forward(x, self._packed(params, False), states, lengths, y, None)

    def train(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array] | None,
        lengths: Array | None,
        y: Array,
        keep: str,
        seed: int,
    ) -> tuple[tuple[Array, ...], Kept]:
        """The same in training: with dropout, and with a reserve that keeps ``"gates"`` or just ``"states"``."""
        packed = self._packed(params, True)
        steps, batch = x.shape[:2]
        layout = ReserveLayout.of(self.spec, self._geometry, steps, batch, keep)
        kept = Kept(layout, keep, seed, lengths, self._reserves.lease(layout.size), packed)
        return self._run_forward(x, packed, states, lengths, y, kept), kept

    def backward(
        self, kept: Kept, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients
    ) -> None:
        """Gradients of a forward call from those of its results.

        ``dy`` (T, N, D·H) with elements side by side in the last axis, ``dstates`` each contiguous (L·D, N, H); None
        for zeros. Nothing behind a sequence's length is read or written.
        """
        layout = kept.layout

        def make(threads: int) -> Records:
            again = kept.keep == "states"  # what was not kept, which takes room
            plan = make_backward_plan(self.spec, self.target, layout.steps, layout.batch, threads, recompute=again)
            return records.backward_records(self.spec, plan, self._packer.layout.passes, layout)

        values: dict[str, int] = {"reserve": kept.lease.address, "weights": kept.packed.lease.address}
        records.strided(values, "dy", dy)
        records.strided(values, "dx", gradients.x)
        records.requests(values, gradients)
        dh_n, dc_n = (*dstates, None)[:2]
        dh0, dc0 = (*(gradients.states or (None,)), None)[:2]
        states = {"dh_n": dh_n, "dc_n": dc_n, "dh0": dh0, "dc0": dc0}
        records.arrays(values, {**states, "dparams": gradients.params})
        self._call("backward", (layout.steps, layout.batch, kept.keep), make, values, kept.lengths, kept.seed)

    def _packed(self, params: Array, training: bool) -> Packed:
        self.compile(training)
        began = time.perf_counter()
        packed = self._packer.packed(params, training)
        if config.debug() >= 2:
            config.report(f"weights {(time.perf_counter() - began) * 1e6:.1f} us")
        return packed

    def _run_forward(
        self,
        x: Array,
        packed: Packed,
        states: Sequence[Array] | None,
        lengths: Array | None,
        y: Array,
        kept: Kept | None,
    ) -> tuple[Array, ...]:
        steps, batch = x.shape[:2]
        final = tuple(np.empty(shape, x.dtype) for shape in self.spec.state_shape(batch))
        name = "forward" if kept is None else "training"
        layout = None if kept is None else kept.layout

        def make(threads: int) -> Records:
            plan = make_plan(self.spec, self.target, steps, batch, threads, training=kept is not None)
            return records.forward_records(self.spec, plan, self._packer.layout.passes, layout)

        values: dict[str, int] = {"weights": packed.lease.address, "reserve": kept.lease.address if kept else 0}
        records.strided(values, "x", x)
        records.strided(values, "y", y)
        h0, c0 = (*(states or (None,)), None)[:2]
        h_n, c_n = (*final, None)[:2]
        records.arrays(values, {"h0": h0, "c0": c0, "h_n": h_n, "c_n": c_n})
        keep, seed = (kept.keep, kept.seed) if kept else ("", 0)
        self._call(name, (steps, batch, keep), make, values, lengths, seed)
        return final

    def _call(
        self,
        name: str,
        problem: tuple[int, int, str],
        make: Callable[[int], Records],
        values: dict[str, int],
        lengths: Array | None,
        seed: int,
    ) -> None:
        """Run a job on the gang, or on this thread alone if the gang is taken or the problem too small for it."""
        job = self._job(name)
        began = time.perf_counter()
        with borrow_gang(get_num_threads()) as gang:
            made = self._planned(name, (*problem, 1 if gang is None else gang.workers + 1), make)
            plan = made.plan
            with self._workspaces.borrow(plan.size, plan.zeroed) as base:
                values["workspace"] = base
                values["parts"] = base if values.get("dx") else 0
                values["spins"] = 0 if gang is None else gang.spins
                values["seed"] = seed if seed < 1 << 63 else seed - (1 << 64)
                call, alive = made.fill(values, lengths)
                if gang is None or plan.members == 1:
                    job(call.ctypes.data, 0)
                else:
                    gang.run(machine.address(job), call.ctypes.data, plan.members)
                del alive
        if config.debug() >= 2:
            config.report(f"{name} {(time.perf_counter() - began) * 1e6:.1f} us")

    def _planned(self, name: str, key: tuple[Any, ...], make: Callable[[int], Records]) -> Records:
        """What is planned for a problem; the last one of its kind is kept, since shapes mostly repeat."""
        last = self._plans.get(name)
        if last is not None and last[0] == key:
            return last[1]
        made = make(key[-1])
        self._plans[name] = key, made
        if config.debug() >= 1:
            more = "" if name == "forward" else f"; {derivative_of(self.spec.mode)}"
            config.report(f"{self.spec} on {self.target.name}: {made.plan}{more}")
        return made
