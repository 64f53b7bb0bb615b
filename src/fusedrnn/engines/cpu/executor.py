"""Calls of one spec's kernels on operands by address: weights, plan, records, threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from fusedrnn import env
from fusedrnn.engines.cpu.jobs import load_job
from fusedrnn.engines.cpu.kernels.stages import derivative_of, is_plain, lowered_cell
from fusedrnn.engines.cpu.kernels.tiling import Tiling
from fusedrnn.engines.cpu.launch import kernel_args as records
from fusedrnn.engines.cpu.launch.args_kernel import load_fill
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs
from fusedrnn.engines.cpu.plan.backward import make_backward_plan
from fusedrnn.engines.cpu.plan.forward import make_forward_plan
from fusedrnn.engines.cpu.plan.thread_trials import ThreadChoices
from fusedrnn.engines.cpu.reserve_layout import Kept, ReserveLayout
from fusedrnn.engines.cpu.varlen import Ragged
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightCache, WeightPointers
from fusedrnn.engines.cpu.weights.pack_kernel import load_pack
from fusedrnn.engines.pointers import Strided, Wanted
from fusedrnn.jit.host import target_for
from fusedrnn.jit.loader import Job
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease, Workspaces
from fusedrnn.runtime.fingerprint import load_fingerprint
from fusedrnn.runtime.thread_pool import ThreadTeam, get_num_threads, load_pool, pool_team
from fusedrnn.spec import RNNSpec

logger = logging.getLogger(__name__)

Array = NDArray[Any]
# T, N and what a reserve keeps; what makes records for so many threads, awake or not.
Problem = tuple[int, int, str]
Maker = Callable[..., KernelArgs]
# Idle reserves that an op keeps for its next calls, if as many were in use at once.
MOST_RESERVES = 16
# How often a call may read the weights as they lie: some rows of a step at once. In training they mostly have changed.
_ROWS_AT_ONCE, _FEW, _FEW_IN_TRAINING = 4, 2, 6


class Calls:
    """Runs one spec. Any number of threads may call it at once.

    Memory at an address must be there, and aligned to its elements; nothing is checked. All arrays of states are
    contiguous (L·D, N, size). See :class:`fusedrnn.engines.pointers.ByAddress`.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec, self.target = spec, target_for(spec.hidden_size, spec.dtype)
        self._tiling = Tiling.of(spec, self.target)
        self.workspaces, self._reserves = Workspaces(), BufferPool(MOST_RESERVES)
        idle = self.workspaces, self._reserves
        self._plain = is_plain(lowered_cell(spec.variant))
        self.weight_cache = WeightCache(spec, self.target, self._tiling, idle)
        self.thread_choices = ThreadChoices()
        self._plans: dict[str, tuple[tuple[Any, ...], KernelArgs]] = {}
        self._jobs: dict[str, Job] = {}
        # That of the last call, since shapes mostly repeat.
        self._layout = (1, 1, "gates"), ReserveLayout.of(spec, self._tiling, 1, 1, "gates")
        self._lock = Lock()
        self._debug = env.debug()  # looked at again for each new problem, not at each call

    def compile(self, training: bool = False) -> None:
        """Have the machine code at hand, in ``training`` that of both ways; the first call does it otherwise."""
        for name in ("training", "backward") if training else ("forward",):
            self.job(name)

    def job(self, name: str) -> Job:
        """The machine code of ``"forward"``, ``"training"`` or ``"backward"``."""
        job = self._jobs.get(name)
        if job is None:
            variant, dtype = self.spec.variant, self.spec.dtype
            with self._lock:
                # All that any call needs, so that no later call compiles.
                load_fill()
                load_fingerprint()
                load_pool()
                load_pack(dtype, self.target)
                job = self._jobs[name] = load_job(name, variant, dtype, self.target)
        return job

    def reserve_bytes(self, steps: int, batch: int, keep: str) -> int:
        """Bytes of the reserve of a forward call with T steps of N sequences."""
        return ReserveLayout.of(self.spec, self._tiling, steps, batch, keep).size

    def weights(
        self, steps: int, batch: int, addresses: tuple[int, ...], training: bool, team: ThreadTeam, owner: object
    ) -> PackedWeights | WeightPointers:
        """The parameters at these addresses, in the order of ``ParameterLayout.by_pass``, as a call shall have them.

        0 stands for zeros. Packed they are their own, packed again whenever their content has changed, and forgotten
        with their owner; for a call so short that this does not pay they are used where they lie.
        """
        if ("training" if training else "forward") not in self._jobs:
            self.compile(training)
        if self.is_short(steps, batch, training):
            return WeightPointers(addresses)
        return self.weight_cache.packed(addresses, training, team, owner)

    def placed(self, addresses: tuple[int, ...] = (), packed: int = 0) -> WeightPointers:
        """Weights of a call that are elsewhere now: as they lie at these addresses, or packed at that one."""
        return WeightPointers(addresses or self.weight_cache.nowhere, address=packed)

    def ragged(self, lengths: Array, steps: int) -> Ragged:
        """Sequences of different lengths, int64 (N,), each from 0 to T."""
        return Ragged(lengths, steps)

    def ragged_packed(self, batch_sizes: Array) -> Ragged:
        """Packed sequences by falling length: how many of them have each step, int64 (T,)."""
        return Ragged.packed(batch_sizes)

    def keeping(
        self,
        steps: int,
        batch: int,
        ragged: Ragged | None = None,
        keep: str = "gates",
        seed: int = 0,
    ) -> tuple[Kept, Lease]:
        """What a call of :meth:`run` in training shall keep, and the memory for it."""
        key, layout = self._layout
        if key != (steps, batch, keep):
            key = steps, batch, keep
            layout = ReserveLayout.of(self.spec, self._tiling, *key)
            self._layout = key, layout
        return Kept(layout, keep, seed, ragged), self._reserves.lease(layout.size)

    def run(
        self,
        steps: int,
        batch: int,
        packed: PackedWeights | WeightPointers,
        x: Strided,
        initial: tuple[int, int],
        y: Strided,
        final: tuple[int, int],
        *,
        ragged: Ragged | None = None,
        kept: Kept | None = None,
        reserve: int = 0,
        team: ThreadTeam | None = None,
    ) -> None:
        """Run a sequence; in training, with ``kept``, fill the reserve at that address.

        ``initial`` and ``final`` are the addresses of h and c, 0 for zeros, or for nowhere.
        """
        name, seed = ("training", kept.seed) if kept is not None else ("forward", 0)
        problem, make = self._forward(steps, batch, kept)
        firsts = _firsts(ragged)
        values = (*x, *y, *initial, *final, packed.address, reserve, firsts, records.signed(seed))
        self._call(name, problem, make, values, ragged, team, packed.matrices)

    def _forward(self, steps: int, batch: int, kept: Kept | None) -> tuple[Problem, Maker]:
        def make(members: int, awake: bool = False) -> KernelArgs:
            training = kept is not None
            members = worth(self.spec, members, steps, batch, training)
            plan = make_forward_plan(self.spec, self.target, steps, batch, members, training=training, awake=awake)
            layout = None if kept is None else kept.layout
            return records.forward_args(self.spec, plan, self.weight_cache.layout.passes, layout)

        return (steps, batch, kept.keep if kept is not None else ""), make

    def differentiate(
        self,
        kept: Kept,
        reserve: int,
        weights: PackedWeights | WeightPointers,
        dy: Strided,
        dfinal: tuple[int, int],
        wanted: Wanted,
        team: ThreadTeam | None = None,
    ) -> None:
        """The gradients of a call of :meth:`run` with these weights whose reserve is at that address; 0 for zeros."""
        ragged = kept.ragged
        problem, make = self._backward(kept)
        values = (
            *dy, *wanted.x, *dfinal, *wanted.states, weights.address, reserve, _firsts(ragged),
            records.signed(kept.seed), wanted.add_x, wanted.add_params, wanted.add_states,
        )  # fmt: skip
        params = (*weights.matrices, *wanted.params)
        self._call("backward", problem, make, values, ragged, team, params, bool(wanted.x[0]))

    def _backward(self, kept: Kept) -> tuple[Problem, Maker]:
        layout = kept.layout

        def make(members: int, awake: bool = False) -> KernelArgs:
            again = kept.keep == "states"  # what was not kept, which takes room
            size = layout.steps, layout.batch
            members = worth(self.spec, members, *size, True)
            plan = make_backward_plan(self.spec, self.target, *size, members, recompute=again, awake=awake)
            return records.backward_args(self.spec, plan, self.weight_cache.layout.passes, layout)

        return (layout.steps, layout.batch, kept.keep), make

    def records(self, steps: int, batch: int, kept: Kept | None, threads: int, backward: bool = False) -> KernelArgs:
        """Those of a problem on so many threads, with those for threads that are awake."""
        problem, make = self._backward(kept) if backward and kept is not None else self._forward(steps, batch, kept)
        name = "backward" if backward else "forward" if kept is None else "training"
        made = self._planned(name, (*problem, threads), make)
        if made.num_threads < threads:
            made.awake = made.awake or make(threads, awake=True)
        if (made.awake or made).plan.forecast is not None:
            made.alone = made.alone or make(1)
        return made

    def is_short(self, steps: int, batch: int, training: bool) -> bool:
        """Whether a call shall have its weights as they lie."""
        return self._plain and _few(steps, batch, training)

    def _call(
        self,
        name: str,
        problem: Problem,
        make: Maker,
        values: tuple[int, ...],
        ragged: Ragged | None,
        team: ThreadTeam | None,
        params: Sequence[int] = (),
        parts: bool = False,
    ) -> None:
        """Run a job on several threads, or on this one alone if the others are taken or not worth their while."""
        job = self._jobs.get(name) or self.job(name)
        team = team or pool_team(get_num_threads())
        awake = team.note_call_start()
        planned = kernel_args = self._planned(name, (*problem, team.threads), make)
        if kernel_args.num_threads < team.threads and awake:
            planned.awake = kernel_args = planned.awake or make(team.threads, awake=True)
        began = time.perf_counter()
        thread_choice = self.thread_choices.of(name, kernel_args.plan.forecast) if kernel_args.num_threads > 1 else None
        forecast = kernel_args.plan.forecast
        if thread_choice is not None and not thread_choice.use_several(began):
            planned.alone = kernel_args = planned.alone or make(1)
        if not self._execute(job, kernel_args, team, values, ragged, params, parts):
            thread_choice = None
            planned.alone = kernel_args = planned.alone or make(1)
            self._execute(job, kernel_args, team, values, ragged, params, parts)
        now = time.perf_counter()
        team.note_call_end(kernel_args.num_threads)
        if thread_choice is not None and forecast is not None:
            thread_choice.note(kernel_args.num_threads > 1, now - began, now, forecast)
        if self._debug >= 2:
            logger.info(f"{name} {(now - began) * 1e6:.1f} us")

    def _execute(
        self,
        job: Job,
        made: KernelArgs,
        team: ThreadTeam,
        values: tuple[int, ...],
        ragged: Ragged | None,
        params: Sequence[int],
        parts: bool,
    ) -> bool:
        """Whether there were as many threads as planned."""
        tables = None if ragged is None else ragged.tables(made.plan.row_starts)
        scratch = self.workspaces.acquire(made.size)
        call = made.bind(scratch, (*values, 0 if tables is None else tables.ctypes.data, team.spins, *params), parts)
        ran = True
        if made.num_threads == 1:
            job(call, 0)
        else:
            ran = team.run(job, call, made.num_threads)
        self.workspaces.release(scratch)
        return ran

    def _planned(self, name: str, key: tuple[Any, ...], make: Maker) -> KernelArgs:
        """What is planned for a problem; the last one of its kind is kept, since shapes mostly repeat."""
        last = self._plans.get(name)
        if last is not None and last[0] == key:
            return last[1]
        made = make(key[-1])
        self._plans[name] = key, made
        self._debug = env.debug()
        if self._debug >= 1:
            more = "" if name == "forward" else f"; {derivative_of(self.spec.variant)}"
            logger.info(f"{self.spec} on {self.target.name}: {made.plan}{more}")
        return made


def _few(steps: int, batch: int, training: bool) -> bool:
    """Whether weights are read so rarely that to pack them, or to find out whether that is needed, costs more."""
    return steps * -(-batch // _ROWS_AT_ONCE) <= (_FEW_IN_TRAINING if training else _FEW)


def worth(spec: RNNSpec, members: int, steps: int, batch: int, training: bool) -> int:
    """How many may share a call: where this thread has just written the weights that are read once, only itself."""
    alone = training and is_plain(lowered_cell(spec.variant)) and _few(steps, batch, training)
    return 1 if alone else members


def _firsts(ragged: Ragged | None) -> int:
    return 0 if ragged is None or ragged.firsts is None else ragged.firsts.ctypes.data
