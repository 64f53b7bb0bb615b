"""A layer's inference as one job on ONNX Runtime's memory. The kernel writes Y with its directions apart."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import PlannedCall, Weights
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.launch.kernel_args import KernelArgs
from fusedrnn.jit.loader import address
from fusedrnn.onnx.ort.op_kernel import MAX_INPUTS, MAX_OUTPUTS, OPERATOR
from fusedrnn.op.rnn_op import RNNOp
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.runtime.thread_pool import pool_team

_SYMBOLS = {
    "X": "x", "sequence_lens": "nothing", "initial_h": "h0", "initial_c": "c0", "Y": "y", "Y_h": "h_n", "Y_c": "c_n",
}  # fmt: skip
"""The symbols of kernel arguments whose values are the addresses of inputs and outputs."""
# Calls of one thread are planned for at least this many steps, so that the plan fits almost all calls.
_LONG = 256
_ANY_STEPS = 1 << 62
_ITEM = np.dtype(np.float32).itemsize


class LayerJob:
    """A layer that runs on arrays by address. Any number of threads may call it at once.

    Args:
        op: The operator, on the engine ``cpu``.
        params: Its parameters, which cannot change.
        num_threads: The most threads of a call.
    """

    def __init__(self, op: RNNOp, params: Any, num_threads: int) -> None:
        self._executor, self._params, self._team = op.by_address(), params, pool_team(num_threads)
        self._directions, self._row = op.spec.num_directions, op.spec.hidden_size * _ITEM
        self._input_row = op.spec.input_size * _ITEM
        self._planned: PlannedCall | None = None

    def plan(self, steps: int, batch: int) -> PlannedCall:
        """The planned call of T steps of N sequences; the most recent one is kept."""
        problem = _problem(steps, batch)
        planned = self._planned
        if planned is None or planned.problem != problem:
            planned = self._executor.plan(problem, self._team.threads, directions_apart=True)
            self._planned = planned
        return planned

    def run(self, steps: int, batch: int, addresses: Mapping[str, int], lengths: Array | None) -> None:
        """Run a call on inputs and outputs at these addresses; Y's padding must be zero."""
        varlen = None if lengths is None else self._executor.varlen(lengths, steps)
        weights = self._weights(steps, batch)  # they must live until the job has run

        def bind(args: KernelArgs, scratch: Scratch) -> int:
            tables = 0 if varlen is None else varlen.tables(args.plan.row_starts).ctypes.data
            self._write_values(args, scratch, batch, {**addresses, "weights": weights.address, "tables": tables})
            return args.bind_symbols(scratch)

        self._executor.run_planned(self.plan(steps, batch), self._team, bind)

    def fill_slot(self, operator: Array, steps: int, batch: int, names: Sequence[Sequence[str]]) -> list[object] | None:
        """Prepare an operator's slot for calls of N sequences, with T steps and as many other step counts as possible.

        ``names`` are the names of the inputs, and those of the outputs. Returns the objects that the slot refers to;
        None if such calls use several threads.
        """
        is_single = self._team.threads == 1
        if not is_single and not self.plan(steps, batch).is_single:
            return None
        # A plan is for one T. With one thread, T only affects the size of a chunk of steps, and the weights if T is 1.
        longest = max(steps, _LONG) if is_single and steps > 1 else steps
        planned = self._executor.plan(_problem(longest, batch), 1, directions_apart=True)
        args = planned.args
        if is_single and args.plan.share.chunk < longest:
            longest = _ANY_STEPS
        scratch = Scratch(args.size)
        weights = self._weights(steps, batch)
        self._write_values(args, scratch, batch, {"weights": weights.address})
        symbols = args.symbol_index
        steps_row: Array = args.table[args.field_numbers["steps"]]
        fields = {
            "min_steps": min(2, steps), "max_steps": longest, "steps_at": steps_row[1:].ctypes.data,
            "scratch": scratch.address, "relocs": args.relocs, "num_fields": args.num_fields,
            "args": scratch.address + args.args_offset, "job": address(planned.job),
        }  # fmt: skip
        for kind, most, names_of_kind in zip(("input", "output"), (MAX_INPUTS, MAX_OUTPUTS), names, strict=True):
            numbers = [symbols[_SYMBOLS[name]] for name in names_of_kind]
            numbers += [symbols["nothing"]] * (most - len(numbers))
            fields |= {f"{kind}_symbol{index}": number for index, number in enumerate(numbers)}
        for name, value in fields.items():
            operator[OPERATOR.index[name]] = value
        return [planned, scratch, weights]

    def _weights(self, steps: int, batch: int) -> Weights:
        return self._executor.weights_of(self._params, steps, batch, None)  # packed, since they are frozen

    def _write_values(self, args: KernelArgs, scratch: Scratch, batch: int, addresses: Mapping[str, int]) -> None:
        """Write the values of the symbols of kernel arguments into scratch."""
        values = {
            "x_step": batch * self._input_row, "x_row": self._input_row,
            "y_step": self._directions * batch * self._row, "y_row": self._row, "spins": self._team.spins,
            "workspace": scratch.address + args.workspace_offset, "args": scratch.address + args.args_offset,
            **{_SYMBOLS.get(name, name): value for name, value in addresses.items()},
        }  # fmt: skip
        count = len(args.symbol_index)
        into = (ctypes.c_int64 * count).from_address(scratch.address)
        ctypes.memset(into, 0, 8 * count)
        for symbol, value in values.items():
            into[args.symbol_index[symbol]] = value


def _problem(steps: int, batch: int) -> Problem:
    """An inference call; frozen parameters are always packed."""
    return Problem("inference", steps, batch, None, packed=True)
