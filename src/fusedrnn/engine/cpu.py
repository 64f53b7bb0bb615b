"""The engine: one spec's kernels, packed weights and workspace, and the call that runs a sequence on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn import config
from fusedrnn.cells import CELLS
from fusedrnn.codegen.target import current
from fusedrnn.engine import machine
from fusedrnn.engine.forward import CALL, PASS
from fusedrnn.engine.locks import Lock
from fusedrnn.engine.pack import Packed, Packer
from fusedrnn.engine.plan import Geometry, Plan, make_plan
from fusedrnn.engine.threads import borrow_gang, get_num_threads
from fusedrnn.engine.workspace import Workspaces
from fusedrnn.spec import RNNSpec
from fusedrnn.symbolic import merge, trace

Array = NDArray[Any]


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
        geometry = Geometry.of(spec, self.target)
        self._packer = Packer(spec, geometry, merge(trace(CELLS[spec.mode])).merged)
        self._workspaces = Workspaces()
        self._lock = Lock()
        self._job: int | None = None
        self._plan: tuple[tuple[int, int, int], Plan] | None = None

    def compile(self) -> None:
        """Have the machine code at hand; the first call does it otherwise."""
        with self._lock:
            if self._job is None:
                machine.prepare()
                self._call = machine.forward(self.spec.mode, self.spec.dtype, self.target)
                self._job = machine.address(self._call)

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference on valid arguments.

        ``x`` (T, N, I) and ``y`` (T, N, D·H) with elements side by side in the last axis, ``states`` each contiguous
        (L·D, N, H), ``lengths`` (N,). Writes ``y``, but not its padding; returns the final states.
        """
        self.compile()
        assert self._job is not None
        began = time.perf_counter()
        packed = self._packer.packed(params)
        packed_at = time.perf_counter()
        steps, batch = x.shape[:2]
        final = tuple(np.empty(shape, x.dtype) for shape in self.spec.state_shape(batch))
        with borrow_gang(get_num_threads()) as gang:
            plan = self._planned(steps, batch, 1 if gang is None else gang.workers + 1)
            with self._workspaces.borrow(plan.size, plan.states_at) as base:
                spins = 0 if gang is None else gang.spins
                passes = self._passes(plan, base, x, packed, states, final, y)
                call, kept = self._record(plan, base, spins, passes, lengths)
                if gang is None or plan.members == 1:
                    self._call(call.ctypes.data, 0)
                else:
                    gang.run(self._job, call.ctypes.data, plan.members)
                del kept
        if config.debug() >= 2:
            took = packed_at - began, time.perf_counter() - packed_at
            config.report(f"weights {took[0] * 1e6:.1f} us, sequence {took[1] * 1e6:.1f} us")
        return final

    def _planned(self, steps: int, batch: int, threads: int) -> Plan:
        """The plan for a problem; the last one is kept, since shapes mostly repeat."""
        key, last = (steps, batch, threads), self._plan
        if last is not None and last[0] == key:
            return last[1]
        plan = make_plan(self.spec, self.target, *key)
        self._plan = key, plan
        if config.debug() >= 1:
            config.report(f"{self.spec} on {self.target.name}: {plan}")
        return plan

    def _passes(
        self,
        plan: Plan,
        base: int,
        x: Array,
        packed: Packed,
        states: Sequence[Array] | None,
        final: Sequence[Array],
        y: Array,
    ) -> Array:
        """The record of each layer and direction."""
        spec = self.spec
        width = spec.hidden_size * x.itemsize
        between_step = plan.between_row * plan.batch
        records = np.zeros((spec.num_layers * spec.num_directions, len(PASS.names)), np.int64)
        source = (x.ctypes.data, x.strides[0], x.strides[1], spec.input_size)
        for layer in range(spec.num_layers):
            if layer == spec.num_layers - 1:
                into = (y.ctypes.data, y.strides[0], y.strides[1])
            else:
                into = (base + plan.between_at[layer % 2], between_step, plan.between_row)
            for direction in range(spec.num_directions):
                index = layer * spec.num_directions + direction
                weights = packed.passes[index]
                offset = index * plan.batch * width
                after = [state.ctypes.data + offset for state in final]
                before = [0] * len(after) if states is None else [state.ctypes.data + offset for state in states]
                none = [0] * (2 - len(after))
                records[index] = (
                    *source, into[0] + direction * width, *into[1:], direction,
                    weights.x_weights, weights.h_weights, weights.x_bias, weights.h_bias,
                    *before, *none, *after, *none,
                )  # fmt: skip
            source = (*into, spec.output_size)
        return records

    def _record(
        self, plan: Plan, base: int, spins: int, passes: Array, lengths: Array | None
    ) -> tuple[Array, list[Array]]:
        """The call's record, and the arrays that it points to."""
        spec = self.spec
        rows, units = np.array(plan.row_starts, np.int64), np.array(plan.unit_starts, np.int64)
        kept, order, alive, sorted_lengths = [passes, rows, units], 0, 0, 0
        if lengths is not None:
            tables = _tables(plan, lengths)
            kept += tables
            order, alive, sorted_lengths = (table.ctypes.data for table in tables)
        fields = {
            "steps": plan.steps, "layers": spec.num_layers, "directions": spec.num_directions,
            "hidden": spec.hidden_size, "grid_directions": plan.grid[0], "grid_rows": plan.grid[1],
            "grid_units": plan.grid[2], "row_starts": rows.ctypes.data, "unit_starts": units.ctypes.data,
            "chunk": plan.chunk, "order": order, "alive": alive, "lengths": sorted_lengths,
            "passes": passes.ctypes.data, "barriers": base + plan.barriers_at, "spins": spins,
            "states": base + plan.states_at, "state_stride": plan.state_stride,
            "state_direction": plan.state_direction, "cell_at": plan.cell_at,
            "scratch": base + plan.scratch_at, "scratch_member": plan.scratch_member,
            "h_rows_at": plan.h_rows_at, "gates_at": plan.gates_at, "gates_stride": plan.gates_stride,
            "recurrent_at": plan.recurrent_at,
        }  # fmt: skip
        return np.array([fields[name] for name in CALL.names], np.int64), kept


def _tables(plan: Plan, lengths: Array) -> list[Array]:
    """Rows in the order of falling lengths, dealt to the row groups in turn; how many live at each time; lengths."""
    falling = np.argsort(-lengths, kind="stable")
    groups = plan.grid[1]
    sizes = np.diff(plan.row_starts)
    # The longest sequences are dealt like cards, so that every group has as much to do.
    dealt: list[list[int]] = [[] for _ in range(groups)]
    turn = 0
    for index in falling:
        while len(dealt[turn % groups]) >= sizes[turn % groups]:
            turn += 1
        dealt[turn % groups].append(int(index))
        turn += 1
    order = np.array([index for hand in dealt for index in hand], np.int64)
    times = np.arange(plan.steps)
    alive = [np.count_nonzero(lengths[hand][None, :] > times[:, None], axis=1) for hand in dealt]
    return [order, np.array(alive, np.int64), lengths[order].astype(np.int64)]
