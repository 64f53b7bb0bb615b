"""The gradients of weights and biases: GEMMs that sum over all rows of a block of steps.

A is the upright gate gradients, B the layer's inputs or its previous h, packed by panels. Each member makes the rows of
the units that are its share, whoever computed their gate gradients, and adds block to block in scratch: every element
is one chain of multiply-adds over all steps from the last to the first, whatever the blocks, whatever the threads.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.backward_emitter import BackwardEmitter
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL
from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN
from fusedrnn.engines.cpu.kernels.loop import Program, looked_up
from fusedrnn.engines.cpu.kernels.stages import StageKernel
from fusedrnn.jit.builder import Declared, Function, Value
from fusedrnn.jit.sync import BARRIER_BYTES


class WeightGradients(BackwardEmitter):
    """Emits a function of (a pass's arguments, first step, last step, rows in them, whether it is the first block).

    With the last block, the sums go to where the caller wants them.
    """

    def __init__(self, program: Program, deliver: Function) -> None:
        super().__init__(program, "weights", ("first", "last", "rows_in_block", "fresh"))
        self.gemm, self.drop_panel = (Declared(program.module, one) for one in (GEMM_TN, DROP_PANEL))
        self.deliver = deliver
        f, c, v = self.f, self.c, self.v
        self.first, self.last, self.count, self.fresh = f.arguments[4:]
        share = self.row_group * c.grid_units + self.unit_group
        self.own = self._own(c.weight_starts, share)
        self.own_out = self._own(c.out_weight_starts, share) if self.cell.projects else self.own
        self.places = self.scratch + c.places_offset
        self.packed = self.scratch + c.packed_offset
        self.panel_features = self.panel_bytes // v.item
        self.x_panels = (self.p.k + (self.panel_features - 1)) // self.panel_features

    def _own(self, starts: Value, share: Value) -> tuple[Value, Value]:
        """The first vector of units that is this member's share, and the one past the last."""
        f = self.f
        return f.load(starts + share * 8), f.load(starts + share * 8 + 8)

    def _own_of(self, stage: StageKernel) -> tuple[Value, Value]:
        return self.own_out if stage.projects else self.own

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        # What is complete after this block, and not added to anything, goes straight to where it is wanted.
        only_block = self.fresh.is_set & self.last.equals(c.steps)
        self.straight = only_block & (self.count > 0) & c.add_params.is_zero
        self._meet_team()
        self._find_places()
        with f.if_(self.fresh.is_set):
            self._clear_sums()
        with f.if_((self.count.is_zero) & (self.fresh.is_set)):
            for stage in self.stages:
                first, last = self._own_of(stage)
                size = (last - first) * (stage.num_gates * self.v.lanes) * c.weights_stride
                f.fill_zero(self._weight_rows(stage, first, 0), size)
        for stage in self.gate_stages:
            self._sum(stage)
        with f.loop(0, self.count, c.inner) as begin:
            end = (begin + c.inner).at_most(self.count)
            start = (begin + (1 - self.fresh)).is_set
            for stage in self.stages:
                for of_state in (False, True):
                    if of_state or not stage.projects:
                        with f.if_(self.wanted(self._destination(stage, of_state)[0])):
                            self._multiply(stage, begin, end, start, of_state)
        with f.if_(self.last.equals(c.steps)):
            self._hand_over()
        self._meet_team()
        f.ret()
        return f

    def _meet_team(self) -> None:
        """The weights' gradients are shared out otherwise than steps are: all rows must be there, and be done with."""
        f, c = self.f, self.c
        with f.if_(c.grid_rows * c.grid_units > 1):
            meeting = c.barriers + (1 + c.grid_layer_dirs * c.grid_rows + self.turn) * BARRIER_BYTES
            f.call(self.barrier, meeting, c.grid_rows * c.grid_units, c.spins)

    def _find_places(self) -> None:
        """The time and the sequence of each row in the block, in the order in which they lie upright."""
        f, c = self.f, self.c
        place = f.var(self.places)
        with f.loop(self.first, self.last) as step:
            time = self.time_back(step)
            with f.loop(0, self.alive_in_batch(time)) as rank:
                f.store(time, place.get())
                f.store(looked_up(f, c.sorted_indices, rank, rank), place.get() + 8)
                place.set(place.get() + 16)

    def _sums(self, stage: StageKernel, unit: Value) -> Value:
        return self.team + self.c.sums_offset + self.slot_at(stage, unit, 0) * self.v.bytes

    def _clear_sums(self) -> None:
        for stage in self.gate_stages:
            first, last = (self._sums(stage, unit) for unit in self.own)
            self.f.fill_zero(first, last - first)

    def _sum(self, stage: StageKernel) -> None:
        """The biases' gradients: upright gradients added up, all slots of a unit side by side."""
        f, c, v = self.f, self.c, self.v
        with f.loop(*self.own) as unit:
            at = self._sums(stage, unit)
            totals = [f.var(v.load(at + slot * v.bytes)) for slot in range(stage.num_grads)]
            source = self.upright + self.slot_at(stage, unit, 0) * c.transposed_stride
            with f.loop(0, self.count) as row:
                for slot, total in enumerate(totals):
                    total.set(total.get() + v.load(source + c.transposed_stride * slot + row * v.bytes))
            for slot, total in enumerate(totals):
                v.store(total.get(), at + slot * v.bytes)

    def _multiply(self, stage: StageKernel, begin: Value, end: Value, start: Value, of_state: bool) -> None:
        """Rows ``begin`` to ``end`` of the block into a stage's gradients of the input weights, or of its own."""
        f, c = self.f, self.c
        columns = self._destination(stage, of_state)[1]
        panels = (columns + (self.panel_features - 1)) // self.panel_features
        k = end - begin
        size = k * self.panel_bytes
        with f.loop(0, panels, c.packed_panels) as first:
            last = (first + c.packed_panels).at_most(panels)
            with f.loop(first, last) as panel:
                self._pack(stage, begin, end, panel, self.packed + (panel - first) * size, of_state)
            with f.loop(*self._own_of(stage)) as unit:
                slots = stage.derivative.h_grads if of_state else stage.derivative.x_grads
                for gate, slot in enumerate(slots):
                    self._one_gate(stage, unit, gate, slot, begin, k, first, last, start, of_state)

    def _one_gate(
        self, stage: StageKernel, unit: Value, gate: int, slot: int, begin: Value, k: Value, first: Value, last: Value,
        start: Value, of_state: bool,
    ) -> None:  # fmt: skip
        """A vector of units of one gate against the packed panels."""
        f, c, v = self.f, self.c, self.v
        size = self.units_of(stage).size
        count = (size - unit * v.lanes).at_most(v.lanes)
        a = self.upright + self.slot_at(stage, unit, slot) * c.transposed_stride + begin * v.bytes
        # The first panel's tiles ask for the gradients that come next; B is near.
        ahead = a + c.transposed_stride
        into, columns, first_panel = self._destination(stage, of_state)
        at = self._weight_rows(stage, unit, gate) + first_panel * self.panel_bytes
        row = into + (size * (stage.first_gate + gate if not stage.projects else 0) + unit * v.lanes) * columns * v.item
        whole = self.straight.select(columns // self.panel_features, 0)
        with f.loop(first, last) as panel:
            offset = panel * self.panel_bytes
            direct = panel < whole
            target, stride = direct.select(row, at) + offset, direct.select(columns * v.item, c.weights_stride)
            origin, origin_stride = start.select(target, self.zeros), start.select(stride, 0)
            packed = self.packed + (panel - first) * k * self.panel_bytes
            near = panel.equals(first).select(ahead, a)
            vectors = self._vectors_of(panel, columns)
            f.call(self.gemm, count, vectors, a, packed, k, origin, origin_stride, target, stride, near)

    def _vectors_of(self, panel: Value, columns: Value) -> Value:
        """How many vectors of a panel hold any of a matrix's columns."""
        vectors = (columns + (self.v.lanes - 1)) // self.v.lanes
        return (vectors - panel * self.panel_vectors).at_most(self.panel_vectors)

    def _destination(self, stage: StageKernel, of_state: bool) -> tuple[Value, Value, Value]:
        """Where the gradient of a stage's matrix is wanted, its columns, and the first of its panels among the sums."""
        p = self.p
        if stage.projects:
            return p.d_projection, self.operand_size(stage), self.f.constant(0)
        if of_state:
            return p.d_h_weights, self.operand_size(stage), self.x_panels
        return p.d_x_weights, p.k, self.f.constant(0)

    def _weight_rows(self, stage: StageKernel, unit: Value, gate: int) -> Value:
        """Where the sums for a vector of units of a gate are: a row for each unit, input columns then recurrent."""
        c, v = self.c, self.v
        place = self.unit_vectors * stage.first_gate + unit * stage.num_gates + gate
        return self.team + c.weights_offset + place * (v.lanes * c.weights_stride)

    def _pack(self, stage: StageKernel, begin: Value, end: Value, panel: Value, into: Value, of_state: bool) -> None:
        """A panel of B: some features of what the layer read, or of what a stage multiplied, for each row."""
        f, c, p, v = self.f, self.c, self.p, self.v
        feature = panel * self.panel_features
        with f.loop(begin, end) as place:
            time, index = (f.load(self.places + place * 16 + 8 * word) for word in (0, 1))
            if of_state and stage.index:
                row = self.record(p.saved_operand, time, index)
            elif of_state:
                row = self.record(p.saved_h, self.time_before(time), index)
            else:
                row = p.x + time * p.x_step + index * p.x_row
            at = into + (place - begin) * self.panel_bytes
            for number in range(self.panel_vectors):
                v.store(v.load(row + feature * v.item + number * v.bytes, v.item), at + number * v.bytes)
            if not of_state:
                with f.if_((self.layer > 0) & (c.threshold > 0)):
                    f.call(self.drop_panel, at, feature, *self.draw(index, time))

    def _hand_over(self) -> None:
        """The sums to where the caller wants them."""
        f, c, p, v = self.f, self.c, self.p, self.v
        for stage in self.stages:
            derivative, size = stage.derivative, self.units_of(stage).size
            # Where each sum of a vector of units goes: the array, the number of its part of so many units, the slot.
            sums = [(p.d_x_bias, stage.first_gate + gate, slot) for gate, slot in enumerate(derivative.x_grads)]
            if not stage.projects:
                sums += [(p.d_h_bias, stage.first_gate + gate, slot) for gate, slot in enumerate(derivative.h_grads)]
            own = [gate for gate in self.cell.peepholes if gate in stage.gate_names]
            places = (self.cell.peepholes.index(gate) for gate in own)
            sums += [(p.d_peepholes, *pair) for pair in zip(places, derivative.peephole_grads, strict=True)]
            with f.loop(*self._own_of(stage)) as unit:
                count = (size - unit * v.lanes).at_most(v.lanes)
                for gate in range(stage.num_gates):
                    first = (size * (stage.first_gate + gate) if not stage.projects else 0) + unit * v.lanes
                    for of_state in (False, True):
                        if of_state or not stage.projects:
                            self._deliver_rows(stage, unit, gate, first, count, of_state)
                for into, place, slot in sums:
                    with f.if_(self.wanted(into)):
                        source = self._sums(stage, unit) + slot * v.bytes
                        at = into + (size * place + unit * v.lanes) * v.item
                        f.call(self.deliver, source, at, count, c.add_params)

    def _deliver_rows(
        self, stage: StageKernel, unit: Value, gate: int, first: Value, count: Value, of_state: bool
    ) -> None:
        """Rows of the sums, from the ``first`` of the matrix, as far as they are not where they are wanted yet."""
        f, c, v = self.f, self.c, self.v
        into, columns, first_panel = self._destination(stage, of_state)
        panels = self.straight.select(columns // self.panel_features, 0)
        left = columns - panels * self.panel_features
        with f.if_(self.wanted(into) & (left > 0)), f.loop(0, count) as lane:
            rows = self._weight_rows(stage, unit, gate)
            source = rows + lane * c.weights_stride + (first_panel + panels) * self.panel_bytes
            at = into + (first + lane) * columns * v.item + panels * self.panel_bytes
            f.call(self.deliver, source, at, left, c.add_params)
