"""The arguments of a chain of jobs: those of each job, whose symbols are expressed by the symbols of the chain.

The jobs run one after the other, so they share one workspace. Only the memory that must be zero at the start of a job
is not shared: each job has its own, at the head of the workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.launch.call_kernel import CONSTANT
from fusedrnn.engines.cpu.launch.kernel_args import JobArgs, KernelArgs, Relocation
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.jit.loader import Job, address
from fusedrnn.jit.sync import BARRIER_BYTES
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.runtime.job_chain import CHAIN, CHAINED_JOB

Link = int | Relocation
"""What the value of a job's symbol is: a constant, or the value of a symbol of the chain plus an addend."""


class ChainedJob(NamedTuple):
    """A job of a chain, its layer, its arguments, and a function that gives the link of each of their symbols."""

    layer: int
    job: Job
    args: KernelArgs
    link: Callable[[str], Link]


class ChainArgs(JobArgs):
    """The arguments of a chain.

    Links may also name the symbol ``between``: memory after the shared part, for what one job passes to the next.

    Args:
        jobs: Its jobs, in order.
        symbols: The symbols of the chain; ``workspace``, ``args`` and ``spins`` are among them.
        num_arrays: Arrays that a call may have.
        between: Bytes of the memory between jobs.

    Attributes:
        jobs: Its jobs, in order.
    """

    def __init__(self, jobs: Sequence[ChainedJob], symbols: Sequence[str], num_arrays: int, between: int) -> None:
        self.jobs = jobs
        zeroed = [BARRIER_BYTES, *(job.args.plan.workspace.zeroed for job in jobs)]
        structs = [len(CHAIN) + len(jobs) * len(CHAINED_JOB), *(job.args.num_struct_fields for job in jobs)]
        shared = max(job.args.plan.workspace.size - job.args.plan.workspace.zeroed for job in jobs)
        self._shared_offset, self._between_offset = sum(zeroed), sum(zeroed) + shared
        super().__init__(symbols, num_arrays, sum(structs), sum(zeroed), self._between_offset + between)
        self.num_threads = max(job.args.num_threads for job in jobs)
        forecasts = [job.args.forecast for job in jobs if job.args.forecast is not None]
        # The sums over the jobs that divide their work; the other jobs take the same time in both cases.
        self.forecast = Forecast(*map(sum, zip(*forecasts, strict=True))) if forecasts else None
        index = self.symbol_index
        header = [(CONSTANT, len(jobs)), (CONSTANT, self.num_threads), (index["workspace"], 0), (index["spins"], 0)]
        for job, field, zeros in zip(jobs, np.cumsum(structs).tolist(), np.cumsum(zeroed).tolist(), strict=False):
            header += [(CONSTANT, address(job.job)), (index["args"], 8 * field)]
            self.table[field : field + job.args.num_struct_fields] = self._linked(job, 8 * field, zeros)
        self.table[: len(header)] = header

    def _linked(self, job: ChainedJob, structs: int, zeros: int) -> Array:
        """The relocations of a job's fields, by the symbols of the chain.

        ``structs`` is where its structs are in the arguments, ``zeros`` where its zeros are in the workspace.
        """
        symbols, addends = job.args.table[: job.args.num_struct_fields].T
        links = np.array([self._link(job.link(symbol)) for symbol in job.args.symbol_index])
        is_constant = symbols == CONSTANT
        linked = np.where(is_constant[:, None], (CONSTANT, 0), links[symbols])
        # A symbol of value 0 is a null pointer, whatever the addend.
        is_null = ~is_constant & (linked == (CONSTANT, 0)).all(axis=1)
        linked[:, 1] += np.where(is_null, 0, addends)
        is_args, is_memory = (
            np.isin(symbols, [job.args.symbol_index[name] for name in names])
            for names in (("args",), ("workspace", "dx_partials"))
        )
        linked[is_args, 1] += structs
        own_zeros = job.args.plan.workspace.zeroed
        moved = np.where(addends < own_zeros, zeros, self._shared_offset - own_zeros)
        linked[is_memory, 1] += moved[is_memory]
        return linked

    def _link(self, link: Link) -> tuple[int, int]:
        """The relocation of a link."""
        if not isinstance(link, Relocation):
            return CONSTANT, link
        if link.symbol == "between":
            return self.symbol_index["workspace"], self._between_offset + link.addend
        return self.symbol_index[link.symbol], link.addend

    def bind(self, scratch: Scratch, values: Mapping[str, int]) -> int:
        """Write the fields of a call into its scratch; return their address. Symbols without a value are 0."""
        args, workspace = scratch.address + self.args_offset, scratch.address + self.workspace_offset
        known = {"workspace": workspace, "args": args, **values}
        numbers = [known.get(symbol, 0) for symbol in self.symbol_index]
        scratch.buffer[: 8 * len(numbers)].view(np.int64)[:] = numbers
        return self.bind_symbols(scratch)
