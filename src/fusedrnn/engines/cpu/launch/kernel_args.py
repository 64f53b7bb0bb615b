"""The arguments of kernels: structs that are laid out once for a plan, and bound at each call.

A field is either a constant of the plan or a relocation: the value of a symbol plus an addend. Each call gives the
values of the symbols. The symbols are:

- ``x``, ``y``, ``dy``, ``dx``, each with ``_step`` and ``_row`` for its strides; ``row_offsets`` of packed sequences;
- ``h0``, ``c0``, ``h_n``, ``c_n``, ``dh_n``, ``dc_n``, ``dh0``, ``dc0``, and likewise of further states;
- ``add_x``, ``add_params``, ``add_states``: whether gradients are added to what their buffers hold;
- ``weights``, the packed weights, 0 for unpacked ones; ``unpacked NAME``, a parameter; ``NAME``, its gradient;
- ``h_reset``, ``c_reset``, ``dh_reset``, ``dc_reset``, ``all_h``, ``all_c``, ``dall_h``, ``dall_c``, and likewise of
  further states; ``resets``;
- ``reserve``; ``seed``; ``tables``, those of :mod:`fusedrnn.engines.cpu.varlen`; ``spins``;
- ``workspace``; ``args``, the structs themselves; ``dx_partials``: the workspace if dx is computed, else 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.launch.call_kernel import CONSTANT, load_bind
from fusedrnn.engines.cpu.plan.plans import Plan
from fusedrnn.engines.cpu.plan.thread_trials import Forecast
from fusedrnn.jit.loader import Job
from fusedrnn.jit.struct import Struct
from fusedrnn.lazy import cached_property
from fusedrnn.runtime.buffers import Scratch, round_up_to_cache_line

_RESOURCES = "weights", "reserve", "row_offsets", "seed"
SPARE = "params", "dparams", "nothing"
"""Symbols without fields: the bases of unpacked parameters and of their gradients, and one to be ignored."""
MAX_ARRAYS = 16
"""Arrays that a call may have: four (input, parameters, output, resets), and two for each state."""


Args = TypeVar("Args", bound="JobArgs")
Bind = Callable[[Args, Scratch], int]
"""Writes the arguments of a job into scratch, and returns their address."""


class Relocation(NamedTuple):
    """A field that depends on the call: the value of a symbol plus an addend; 0 if the value is 0."""

    symbol: str
    addend: int = 0


Fields = dict[str, int | Relocation]


def array_fields(name: str, begin: int | Relocation, step: int, row: int) -> Fields:
    """The fields of an array (T, N, features) in the workspace or the reserve."""
    return {name: begin, f"{name}_step": step, f"{name}_row": row, f"{name}_row_offsets": 0}


def caller_array_fields(name: str, offset: int = 0) -> Fields:
    """The fields of an array that the caller passes, from this byte offset on."""
    strides: Fields = {stride: Relocation(stride) for stride in (f"{name}_step", f"{name}_row")}
    return {name: Relocation(name, offset), **strides, f"{name}_row_offsets": Relocation("row_offsets")}


def state_symbols(letters: str, *forms: str) -> list[str]:
    """The names of arrays of states with these letters, form by form: h0, c0, then h_n, c_n."""
    return [form.format(letter) for form in forms for letter in letters]


def forward_symbols(letters: str) -> list[str]:
    """Symbols of a forward call, in the order in which it gives their values; unpacked parameters follow."""
    arrays = "x", "x_step", "x_row", "y", "y_step", "y_row"
    options = *state_symbols(letters, "{}_reset"), *state_symbols(letters, "all_{}"), "resets"
    return [*arrays, *state_symbols(letters, "{}0", "{}_n"), *_RESOURCES, *options, "tables", "spins"]


def backward_symbols(letters: str) -> list[str]:
    """Symbols of a backward call, likewise; unpacked parameters follow, then their gradients."""
    arrays = "dy", "dy_step", "dy_row", "dx", "dx_step", "dx_row"
    adds = "add_x", "add_params", "add_states"
    options = *state_symbols(letters, "d{}_reset"), *state_symbols(letters, "dall_{}"), "resets"
    return [*arrays, *state_symbols(letters, "d{}_n", "d{}0"), *_RESOURCES, *adds, *options, "tables", "spins"]


class JobArgs:
    """The arguments of a job: fields that are bound at each call, and zeros after them, in a call's scratch.

    Args:
        symbols: The symbols whose values a call gives; ``workspace`` and ``args`` are among them.
        num_arrays: Arrays that a call may have, also an attribute.
        num_fields: Fields.
        zeroed: Bytes at the start of the workspace that must be zero when a call begins.
        workspace: Bytes of the workspace.

    Attributes:
        symbol_index: The number of each symbol.
        extents_offset: Where scratch has room for the first and last bytes of a call's arrays.
        args_offset: Where it has room for the fields.
        workspace_offset: Where the workspace begins in it.
        relocs: The address of the relocations of all fields, :data:`fusedrnn.engines.cpu.launch.call_kernel.RELOC`.
        num_fields: Fields that binding writes, including the zeros after them.
        size: Bytes of scratch.
        num_threads: Threads in use.
        forecast: Predicted times; None if there are none to compare.
    """

    num_threads: int
    forecast: Forecast | None

    def __init__(self, symbols: Sequence[str], num_arrays: int, num_fields: int, zeroed: int, workspace: int) -> None:
        self.num_arrays = num_arrays
        self.symbol_index = {symbol: index for index, symbol in enumerate(symbols)}
        self.extents_offset = 8 * len(symbols)
        self.args_offset = round_up_to_cache_line(self.extents_offset + 16 * num_arrays)
        args_end = self.args_offset + 8 * num_fields
        self.workspace_offset = round_up_to_cache_line(args_end)
        self.num_fields = num_fields + (self.workspace_offset - args_end + zeroed) // 8
        self.size = self.workspace_offset + workspace
        self.table: Array = np.zeros((self.num_fields, 2), np.int64)
        self.table[:, 0] = CONSTANT
        self.relocs, self._bind = self.table.ctypes.data, load_bind()

    def bind_symbols(self, scratch: Scratch) -> int:
        """Write the fields of a call into scratch, which begins with the symbols' values; return their address."""
        args = scratch.address + self.args_offset
        self._bind(self.relocs, self.num_fields, scratch.address, args)
        return args


class KernelArgs(JobArgs):
    """The arguments of a plan's kernel.

    Args:
        plan: The plan.
        symbols: The symbols whose values :meth:`bind` takes, in this order.
        structs: The structs, one after the other, and their fields.
        num_fields: Fields of all structs.
        constants: Arrays that the fields point to.

    Attributes:
        plan: The plan.
        num_struct_fields: Fields of all structs.
        field_numbers: The number of each field of the first struct.
    """

    def __init__(
        self,
        plan: Plan,
        symbols: Sequence[str],
        structs: Iterable[tuple[Struct, Fields]],
        num_fields: int,
        constants: Sequence[Array],
    ) -> None:
        values = (*symbols, "workspace", "args", "dx_partials")
        # The workspace begins with barriers, which are zero at the start of each call.
        super().__init__((*values, *SPARE), MAX_ARRAYS, num_fields, plan.workspace.zeroed, plan.workspace.size)
        self.plan, self.num_threads, self.forecast = plan, plan.num_threads, plan.forecast
        self.num_struct_fields, self._constants = num_fields, constants
        self.field_numbers: dict[str, int] = {}
        self._values = struct.Struct(f"{len(values)}q")
        self._relocate(structs)

    def _relocate(self, structs: Iterable[tuple[Struct, Fields]]) -> None:
        number = 0
        for layout, fields in structs:
            self.field_numbers = self.field_numbers or layout.index
            for name in layout.names:
                field = fields[name]
                if isinstance(field, Relocation):
                    self.table[number] = self.symbol_index[field.symbol], field.addend
                else:
                    self.table[number, 1] = field
                number += 1

    def bind(self, scratch: Scratch, values: Sequence[int], computes_dx: bool = False) -> int:
        """Write the structs of a call into its scratch; return their address."""
        args, workspace = scratch.address + self.args_offset, scratch.address + self.workspace_offset
        self._values.pack_into(scratch.buffer.data, 0, *values, workspace, args, workspace if computes_dx else 0)
        return self.bind_symbols(scratch)


class PlannedJob(Generic[Args]):
    """A job and its arguments on at most so many threads, laid out when they are first needed.

    Attributes:
        name: What it computes.
        job: The machine code.
        threads: The most threads.
        args: The arguments for threads that sleep until the call.
    """

    def __init__(self, name: str, job: Job, threads: int) -> None:
        self.name, self.job, self.threads = name, job, threads
        self.args = self._plan(threads)

    @cached_property
    def spinning_args(self) -> Args:
        """The arguments for threads that spin, which are worth using even for less work."""
        return self.args if self.args.num_threads == self.threads else self._plan(self.threads, spinning=True)

    @cached_property
    def is_single(self) -> bool:
        """Whether it runs on one thread in any case."""
        return self.spinning_args.num_threads == 1

    @cached_property
    def single_args(self) -> Args:
        """The arguments for one thread."""
        return self._plan(1)

    def _plan(self, threads: int, spinning: bool = False) -> Args:
        raise NotImplementedError


def signed(seed: int) -> int:
    """An unsigned integer of 64 bits as a signed one."""
    return seed if seed < 1 << 63 else seed - (1 << 64)
