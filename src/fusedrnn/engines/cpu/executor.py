"""Runs one spec's kernels on operands by address: plan the call, bind its arguments, run the job."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from fusedrnn import env
from fusedrnn.arrays import Array
from fusedrnn.engines.cpu import tuning as tunings
from fusedrnn.engines.cpu.jobs import Problem, load_for_calls
from fusedrnn.engines.cpu.kernels.lowered_cell import derivative_of, state_letters
from fusedrnn.engines.cpu.launch.kernel_args import Args, Bind, KernelArgs, PlannedJob, signed
from fusedrnn.engines.cpu.launch.struct_fields import lay_out_args
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.plan.sizes import Phase, reads_unpacked
from fusedrnn.engines.cpu.plan.thread_trials import ThreadChoices
from fusedrnn.engines.cpu.plan.weight_format import ANY_ROWS, max_narrow_rows, weight_target
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout, TrainingCall
from fusedrnn.engines.cpu.state_options import StateOptions
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.engines.cpu.tuning import Tuning
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.cpu.weights.cache import PackedWeights, WeightAddresses, WeightCache
from fusedrnn.engines.interface import GradAddresses, SavePolicy, StateAddresses, StridedAddress
from fusedrnn.frozen_array import is_frozen
from fusedrnn.jit.loader import Job
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock
from fusedrnn.runtime.buffers import BufferPool, Lease, Scratch, ScratchPool
from fusedrnn.runtime.thread_pool import ThreadTeam, get_num_threads, pool_team
from fusedrnn.spec import RNNSpec

logger = logging.getLogger(__name__)

Weights = PackedWeights | WeightAddresses


class PlannedCall(PlannedJob[KernelArgs]):
    """The kernel arguments for a problem, and the panels of the weights that it reads.

    With ``directions_apart`` the output of inference is (T, D, N, S), not (T, N, D·S).
    """

    def __init__(
        self, weights: WeightCache, tuning: Tuning, problem: Problem, job: Job, threads: int,
        directions_apart: bool = False,
    ) -> None:  # fmt: skip
        self.tiling, self.problem, self._directions_apart = weights.tiling, problem, directions_apart
        self._weights, self._tuning = weights.layout.layer_dirs, tuning
        super().__init__(problem.phase, job, threads)

    def _plan(self, threads: int, spinning: bool = False) -> KernelArgs:
        phase, steps, batch, layout, packed = self.problem
        spec = self.tiling.spec
        plan = make_plan(
            spec, self.tiling.target, steps, batch, threads, phase,
            recompute=layout is not None and layout.save == "states", spinning=spinning, packed=packed,
            tuning=self._tuning,
        )  # fmt: skip
        return lay_out_args(spec, plan, self._weights, layout, self._directions_apart)


class Executor:
    """Runs one spec, also for callers whose data is not in NumPy arrays. Any number of threads may call it at once.

    Nothing is checked: memory at an address must exist and be aligned to its elements. Address 0 of an operand that is
    read stands for zeros; a result whose address is 0 is not computed.
    """

    def __init__(self, spec: RNNSpec) -> None:
        self.spec, self.tuning = spec, tunings.current()
        self.scratch_pool, self._reserves = ScratchPool(), BufferPool(self.tuning.max_idle_reserves)
        idle = self.scratch_pool, self._reserves
        # For calls of one step, and for calls of several.
        self._max_narrow_rows = [max_narrow_rows(spec, steps, self.tuning) for steps in (1, 2)]
        # The target for calls of few rows, and that for calls of many rows; mostly they are the same.
        self.target, many = (weight_target(spec, rows <= self._max_narrow_rows[1]) for rows in (1, ANY_ROWS))
        self.tiling = Tiling(spec, self.target)
        self.weight_cache = self._many_rows = WeightCache(self.tiling, idle)
        if many != self.target:
            self._many_rows = WeightCache(Tiling(spec, many), idle)
        self.thread_choices = ThreadChoices()
        self._jobs: dict[tuple[str, bool], Job] = {}
        # The last planned call of each job: shapes mostly repeat.
        self._planned: dict[str, PlannedCall] = {}
        self._layout = (1, 1, "gates", False), ReserveLayout.of(self.tiling, 1, 1, "gates")
        self._num_letters = len(state_letters(len(spec.state_names)))
        self._no_options = StateOptions().values(self._num_letters)
        self._lock = Lock()
        self.debug = env.debug()  # read again for each new problem, not at each call

    def weight_cache_for(self, steps: int, batch: int) -> WeightCache:
        """The packed weights of calls of T steps of N sequences."""
        return self.weight_cache if batch <= self._max_narrow_rows[steps > 1] else self._many_rows

    def compile(self, training: bool = False) -> None:
        """Compile or load the kernels for inference, or for ``training``; else the first call does it."""
        for weight_cache in (self.weight_cache, self._many_rows):
            self._compile(training, weight_cache.tiling.target)

    def _compile(self, training: bool, target: Target) -> None:
        phases: tuple[Phase, ...] = ("training", "backward") if training else ("inference",)
        for phase in phases:
            self.job(phase, target)

    def job(self, phase: Phase, target: Target) -> Job:
        """The compiled job of a phase for one of the targets of this spec."""
        key = phase, target.narrow_weights  # its targets differ in this alone; it hashes faster than a target
        job = self._jobs.get(key)
        if job is None:
            with self._lock:
                job = self._jobs[key] = load_for_calls(phase, self.spec, target)
        return job

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy, resets: bool = False) -> int:
        """Bytes of the reserve of a training call with T steps of N sequences."""
        return ReserveLayout.of(self.tiling, steps, batch, save, resets).size

    def is_short(self, steps: int, batch: int, training: bool) -> bool:
        """Whether a call of this size uses unpacked weights."""
        return reads_unpacked(self.tiling, steps, batch, training, self.tuning)

    def problem(self, phase: Phase, steps: int, batch: int, layout: ReserveLayout | None) -> Problem:
        """What a job is planned for, on parameters that are not frozen."""
        return Problem(phase, steps, batch, layout, not self.is_short(steps, batch, phase != "inference"))

    def weights(
        self, steps: int, batch: int, addresses: tuple[int, ...], training: bool, team: ThreadTeam, owner: object
    ) -> Weights:
        """The parameters at these addresses, in ``by_layer_direction`` order, as a call takes them.

        Packed weights are a copy, packed again whenever the parameters have changed, and dropped when ``owner`` is
        garbage-collected. A short call uses the parameters unpacked, in place. The memory of the parameters must not
        change until the call has run; in training, until its last backward has run.
        """
        weight_cache = self.weight_cache_for(steps, batch)
        self._compile(training, weight_cache.tiling.target)
        if self.is_short(steps, batch, training):
            return WeightAddresses(addresses)
        return weight_cache.packed(addresses, training, team, owner)

    def weights_of(self, params: Any, steps: int, batch: int, save: SavePolicy | None) -> Weights:
        """The flat parameter vector or quantized parameters as a call takes them.

        ``save`` is what training saves, None in inference.
        """
        training = save is not None
        weight_cache = self.weight_cache_for(steps, batch)
        self._compile(training, weight_cache.tiling.target)
        began = perf_counter()
        weights: Weights
        if save == "states" or not self.is_short(steps, batch, training) or is_frozen(params):
            weights = weight_cache.packed_vector(params, training, pool_team(get_num_threads()))
        elif training:
            weights = self.weight_cache.copied_vector(params)
        else:
            weights = WeightAddresses(self.weight_cache.addresses(params.ctypes.data))
        if self.debug >= 2:
            logger.info(f"weights {(perf_counter() - began) * 1e6:.1f} us")
        return weights

    def weights_at(self, addresses: tuple[int, ...] = (), packed: int = 0) -> WeightAddresses:
        """The weights of an earlier call that were moved: unpacked, now at ``addresses``, or packed, now at ``packed``.

        Packed weights are the bytes in the ``lease`` of what :meth:`weights` returned, from its ``address`` on. If the
        weights are unpacked, this ``address`` is 0.
        """
        return WeightAddresses(addresses or self.weight_cache.nowhere, address=packed)

    def varlen(self, lengths: Array, steps: int) -> VarLen:
        """Sequences of different lengths, int64 (N,), each from 0 to T, in arrays (T, N, features)."""
        return VarLen.padded(lengths, steps)

    def varlen_packed(self, batch_sizes: Array) -> VarLen:
        """A packed sequence, sorted by falling length; ``batch_sizes``, int64 (T,): how many have each step."""
        return VarLen.packed(batch_sizes)

    def training_call(
        self, steps: int, batch: int, varlen: VarLen | None = None, save: SavePolicy = "gates", seed: int = 0,
        resets: Any = None,
    ) -> TrainingCall:  # fmt: skip
        """What backward needs to know of a training call; ``resets`` must not change until backward has run."""
        key, layout = self._layout
        if key != (steps, batch, save, resets is not None):
            key = steps, batch, save, resets is not None
            layout = ReserveLayout.of(self.tiling, *key)
            self._layout = key, layout
        return TrainingCall(layout, seed, varlen, resets)

    def lease_reserve(self, size: int) -> Lease:
        """Memory for a reserve of so many bytes."""
        return self._reserves.lease(size)

    def run(
        self, steps: int, batch: int, weights: Weights, x: StridedAddress, initial: StateAddresses, y: StridedAddress,
        final: StateAddresses, *, varlen: VarLen | None = None, call: TrainingCall | None = None, reserve: int = 0,
        team: ThreadTeam | None = None, options: StateOptions | None = None,
    ) -> None:  # fmt: skip
        """Run a forward call; with ``call`` that training call, which fills the reserve. Skips the padding of y."""
        layout, seed = (None, 0) if call is None else (call.layout, call.seed)
        phase: Phase = "inference" if layout is None else "training"
        values = (
            *x, *y, *initial, *final, weights.address, reserve,
            0 if varlen is None else varlen.row_offsets_address, signed(seed),
            *(self._no_options if options is None else options.values(self._num_letters)),
        )  # fmt: skip
        problem = Problem(phase, steps, batch, layout, bool(weights.address))
        self._run_job(problem, values, weights.matrices, varlen, team)

    def run_backward(
        self, call: TrainingCall, reserve: int, weights: Weights, dy: StridedAddress, dstates: StateAddresses,
        grads: GradAddresses, team: ThreadTeam | None = None, options: StateOptions | None = None,
    ) -> None:  # fmt: skip
        """Compute the gradients of a training call that used these weights; its reserve is at address ``reserve``."""
        layout, varlen = call.layout, call.varlen
        if options is None and call.resets is not None:
            options = StateOptions(call.resets)
        values = (
            *dy, *grads.x, *dstates, *grads.states, weights.address, reserve,
            0 if varlen is None else varlen.row_offsets_address, signed(call.seed),
            grads.add_x, grads.add_params, grads.add_states,
            *(self._no_options if options is None else options.values(self._num_letters)),
        )  # fmt: skip
        problem = Problem("backward", layout.steps, layout.batch, layout, bool(weights.address))
        self._run_job(problem, values, (*weights.matrices, *grads.params), varlen, team, bool(grads.x[0]))

    def _run_job(
        self, problem: Problem, values: tuple[int, ...], params: Sequence[int],
        varlen: VarLen | None, team: ThreadTeam | None, computes_dx: bool = False,
    ) -> None:  # fmt: skip
        team = team or pool_team(get_num_threads())

        def bind(args: KernelArgs, scratch: Scratch) -> int:
            tables = 0 if varlen is None else varlen.tables(args.plan.row_starts).ctypes.data
            return args.bind(scratch, (*values, tables, team.spins, *params), computes_dx)

        self.run_planned(self.planned(problem, team.threads), team, bind)

    def run_planned(self, planned: PlannedJob[Args], team: ThreadTeam, bind: Bind[Args]) -> None:
        """Run a job on several threads, or on this one alone if the others are busy or not worth their overhead."""
        name, job, began = planned.name, planned.job, perf_counter()
        args = planned.spinning_args if team.note_call_start(began) else planned.args
        forecast = args.forecast
        thread_choice = self.thread_choices.of(name, forecast) if args.num_threads > 1 else None
        if thread_choice is not None and not thread_choice.use_several(began):
            args = planned.single_args
        if not self._execute(job, args, team, bind):
            thread_choice, args = None, planned.single_args
            self._execute(job, args, team, bind)
        now = perf_counter()
        team.note_call_end(args.num_threads, now)
        if thread_choice is not None and forecast is not None:
            thread_choice.note(args.num_threads > 1, now - began, now, forecast)
        if self.debug >= 2:
            logger.info(f"{name} {(now - began) * 1e6:.1f} us")

    def planned(self, problem: Problem, threads: int) -> PlannedCall:
        """The planned call for a problem on so many threads; the last one of each phase is cached."""
        last = self._planned.get(problem.phase)
        if last is not None and last.threads == threads and last.problem == problem:
            return last
        planned = self.plan(problem, threads)
        self._planned[problem.phase] = planned
        self.debug = env.debug()
        if self.debug >= 1:
            derivative = "" if problem.phase == "inference" else f"; {derivative_of(self.spec.variant)}"
            logger.info(f"{self.spec} on {planned.tiling.target.name}: {planned.args.plan}{derivative}")
        return planned

    def plan(self, problem: Problem, threads: int, directions_apart: bool = False) -> PlannedCall:
        """A new planned call for a problem on at most so many threads."""
        weights = self.weight_cache_for(problem.steps, problem.batch)
        job = self.job(problem.phase, weights.tiling.target)
        return PlannedCall(weights, self.tuning, problem, job, threads, directions_apart)

    def _execute(self, job: Job, args: Args, team: ThreadTeam, bind: Bind[Args]) -> bool:
        """Bind the arguments and run the job; False if there are fewer threads now than planned."""
        scratch = self.scratch_pool.acquire(args.size)
        address = bind(args, scratch)
        ran = True
        if args.num_threads == 1:
            job(address, 0)
        else:
            ran = team.run(job, address, args.num_threads)
        self.scratch_pool.release(scratch)
        return ran
