"""The time loop: one job that runs every layer and direction of a network over a whole sequence.

For a chunk of time steps at once a member multiplies the inputs with just the weights that it will itself consume.
Then, step by step: the recurrent GEMM, the cell's maths, h and c and y written, and a barrier if other members need
the new h. In training every state, and what else backward needs, also goes to the reserve, and a layer's input is read
from what the layer below has left there.
"""

from __future__ import annotations

from fusedrnn.cell.cells import Variant
from fusedrnn.cell.expr import Leaf, evaluate
from fusedrnn.cell.leaves import NewState, Peephole, PreH, PreSum, PreX, Projected, Saved, StageOperand, State
from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NT
from fusedrnn.engines.cpu.kernels.loop import SHARED, UNPACKED_PARAMS, Program, each_pass, step_at
from fusedrnn.engines.cpu.kernels.scratch import FORWARD
from fusedrnn.engines.cpu.kernels.stages import Result, StageKernel
from fusedrnn.engines.cpu.kernels.states import StateEmitter
from fusedrnn.jit.builder import Declared, Function, Module, Value
from fusedrnn.jit.struct import Struct
from fusedrnn.jit.sync import flush_denormals
from fusedrnn.jit.target import Target

CALL = Struct(*SHARED, *FORWARD.fields)
LAYER_DIR = Struct(
    "x", "x_step", "x_row", "x_row_offsets", "k", "y", "y_step", "y_row", "y_row_offsets", "reverse",
    "x_weights", "h_weights", "projection", "peepholes", "x_bias", "h_bias", *UNPACKED_PARAMS,
    "h0", "c0", "h_n", "c_n", "x_copy", "saved_h", "saved_c", "saved_operand", "saved_values",
)  # fmt: skip

Rows = dict[Result | str, Value]
"""Where the results of a row go: by result for the reserve; "y", the output; "kept", the reserve's saved values."""


def build_forward(variant: Variant, dtype: str, target: Target) -> Module:
    """The module whose ``forward(call, member)`` is a pool's job."""
    program = Program.of("forward", variant, dtype, target)
    return _build(program, _Inference(program).emit())


def build_training(variant: Variant, dtype: str, target: Target) -> Module:
    """The same in training."""
    program = Program.of("training", variant, dtype, target)
    return _build(program, _Training(program).emit())


def _build(program: Program, sequence: Function) -> Module:
    f = Function(program.module, "forward", ["call", "member"], exported=True)
    call, member = f.arguments
    c = CALL.read(f, call)
    everyone = c.grid_layer_dirs * c.grid_rows * c.grid_units

    def run(layer: Value, direction: Value) -> None:
        f.call(sequence, call, member, layer, direction)

    def after(layer: Value) -> None:
        """The next layer reads what others have made, if they share rows."""
        with f.if_((c.grid_layer_dirs * c.grid_units > 1) & (layer < c.layers - 1)):
            f.call(program.barrier, c.barriers, everyone, c.spins)

    with f.if_(member < everyone), flush_denormals(f):
        each_pass(f, c, member, run, after)
    f.ret()
    return program.module


class _Inference(StateEmitter):
    """A member's part of one pass, nothing kept."""

    _result_kinds: tuple[type[Result], ...] = (NewState, StageOperand)

    def __init__(self, program: Program) -> None:
        self.gemm = Declared(program.module, GEMM)
        if program.is_plain:
            self.unpacked = Declared(program.module, UNPACKED_GEMM_NT)
        super().__init__(program, "sequence", (CALL, LAYER_DIR))
        scratch, c = self.scratch, self.c
        self.x_rows, self.gate_row = scratch, scratch + c.gates_offset
        self.recurrent, self.biases = scratch + c.recurrent_offset, scratch + c.biases_offset

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        self.enter()
        self._place_starts()
        self.meet()
        with f.loop(0, c.steps, c.chunk) as first:
            last = (first + c.chunk).at_most(c.steps)
            self.await_layer(self.layer - 1, last)
            self._inputs(first, last)
            done = f.var(0)
            with f.loop(first, last) as step:
                time = self.time(step)
                alive = self.alive(time)
                with f.if_(alive > 0):
                    self._step(step, time, alive, done.get())
                    done.set(done.get() + alive)
                    # After the last step of all nobody reads what others have made.
                    with f.if_((step < c.steps - 1) | (self.layer < c.layers - 1)):
                        self.meet()
            self.tell_layers(last)
        self.exit()
        f.ret()
        return f

    def _place_starts(self) -> None:
        """What GEMMs begin with and packed weights do not bring along."""
        f = self.f
        if self.is_plain:
            with f.if_(self.is_unpacked):
                self._place_biases()
        if self.cell.projects:
            # What a projection begins with instead of a bias.
            f.fill_zero(self.biases, f.constant(self.panel_bytes))

    def _place_biases(self) -> None:
        """Biases that come as they are, in the order in which GEMMs start from them: the input's, then the state's."""
        f, c, p, v = self.f, self.c, self.p, self.v
        with f.loop(self.hidden.first, self.hidden.last) as unit:
            left = (c.hidden - unit * v.lanes).at_most(v.lanes)
            for gate in range(self.gates):
                column = (unit - self.hidden.first) * self.gates + gate
                offset = (c.hidden * gate + unit * v.lanes) * v.item
                of_input, of_state = (self._bias(base, offset, left) for base in (p.unpacked_x_bias, p.unpacked_h_bias))
                into = self.biases + column * v.bytes
                v.store(of_input + of_state if self.cell.accumulates_in_place else of_input, into)
                v.store(of_state, into + c.biases_size)

    def _bias(self, base: Value, offset: Value, left: Value) -> Value:
        """A vector of biases, zeros if there are none."""
        f, v = self.f, self.v
        bias = f.var(v.const(0.0))
        with f.if_(base.is_set):
            bias.set(v.load_masked(base + offset, left))
        return bias.get()

    def _multiply(
        self, stage: StageKernel, of_state: bool, column: Value, vectors: Value, count: Value, rows: Value, at: Value,
        stride: Value, fresh: bool, onward: Value,
    ) -> None:  # fmt: skip
        """Columns of an input GEMM, or of a recurrent one, added to what is there or, fresh, to the bias.

        The panel needed next is so many further ``onward``.
        """
        f, c, p, v = self.f, self.c, self.p, self.v
        k = self.operand_size(stage) if of_state else p.k
        start_stride = f.constant(0) if fresh else stride

        def packed() -> None:
            if stage.projects:
                b, start = self.weights_at(p.projection, column, k), self.biases
            else:
                weights, bias = (p.h_weights, p.h_bias) if of_state else (p.x_weights, p.x_bias)
                place = self.base_column(stage) + column
                b, start = self.weights_at(weights, place, k), bias + place * v.bytes
            begin = start if fresh else at
            ahead = b + onward * k * self.panel_bytes
            f.call(self.gemm, count, vectors, rows, b, k, begin, start_stride, at, stride, ahead)

        if not self.is_plain:
            packed()
            return
        matrix = p.unpacked_h_weights if of_state else p.unpacked_x_weights
        placed = self.biases + (column - self.hidden.first * self.gates) * v.bytes
        placed = placed + (c.biases_size if of_state else 0)
        with f.if_else(self.is_unpacked) as (loose, fast):
            with loose:
                places = placed if fresh else at, start_stride, at, stride
                f.call(self.unpacked, count, vectors, rows, matrix, k, *places, column, c.hidden, self.gates)
            with fast:
                packed()

    def _inputs(self, first: Value, last: Value) -> None:
        """The input GEMM of a chunk: every live row of its steps against this member's columns."""
        f, p = self.f, self.p
        count = f.var(0)
        with f.loop(first, last) as step:
            time = self.time(step)
            at = step_at(f, p.x, p.x_step, p.x_row, p.x_row_offsets, time)
            with f.loop(0, self.alive(time)) as row:
                index = self.index(row)
                f.store(self._input_row(at + index * p.x_row, time, index, count.get()), self.x_rows + count.get() * 8)
                count.set(count.get() + 1)
        with f.if_(count.get() > 0):
            for stage in self.gate_stages:
                first = self.hidden.first * stage.num_gates
                with self.panels(first, self.hidden.last * stage.num_gates) as (column, vectors):
                    into = self.gate_row + self.region(stage) + (column - first) * self.v.bytes
                    places = into, self.c.gates_stride
                    onward = f.constant(1)
                    self._multiply(stage, False, column, vectors, count.get(), self.x_rows, *places, True, onward)

    def _input_row(self, source: Value, time: Value, index: Value, place: Value) -> Value:
        """Where the input GEMM shall read a row that lies at ``source``."""
        return source

    def _step(self, step: Value, time: Value, alive: Value, done: Value) -> None:
        """One step, stage by stage: a stage behind the first multiplies what all members have made."""
        f, c, p = self.f, self.c, self.p
        gates = self.gate_row + done * c.gates_stride
        y = step_at(f, p.y, p.y_step, p.y_row, p.y_row_offsets, time)
        for stage in self.stages:
            if stage.index:
                self.meet()
            self._stage(stage, step, time, alive, gates, y)

    def _stage(self, stage: StageKernel, step: Value, time: Value, alive: Value, gates: Value, y: Value) -> None:
        """Block by block of units, the GEMM of a stage and then the cell's maths on what it gave."""
        f, c, v, blocking = self.f, self.c, self.v, self.blocking(stage)
        parity = step & 1
        rows = self.row_table(stage, parity)
        backwards = self.backwards(step)
        back = 1 - 2 * blocking.block_panels
        begin = self.hidden.first * stage.num_gates
        with self.blocks(stage, backwards) as (unit, end):
            first, past = unit * stage.num_gates, end * stage.num_gates
            with self.panels(first, past) as (column, vectors):
                onward = (backwards & (column + vectors).equals(past)).select(f.constant(back), 1)
                if stage.accumulates_in_place:
                    at = gates + self.region(stage) + (column - begin) * v.bytes
                    self._multiply(stage, True, column, vectors, alive, rows, at, c.gates_stride, False, onward)
                else:
                    at = self.recurrent + (column - first) * v.bytes
                    stride = f.constant(blocking.block_col_vecs * v.bytes)
                    self._multiply(stage, True, column, vectors, alive, rows, at, stride, True, onward)
            with f.loop(0, alive) as row:
                places = self._output_rows(y, time, self.index(row))
                with f.loop(unit, end) as at:
                    self._cell(stage, row, at, at - unit, parity, gates, places)

    def _output_rows(self, y: Value, time: Value, index: Value) -> Rows:
        """Where the results of a row go at that time, whose rows of output begin at ``y``."""
        return {"y": y + index * self.p.y_row}

    def _cell(
        self, stage: StageKernel, row: Value, unit: Value, within: Value, parity: Value, gates: Value, rows: Rows
    ) -> None:
        """The cell's maths on one vector of units of one row."""
        c, v, cell = self.c, self.v, self.cell
        offset, count = unit * v.bytes, stage.num_gates
        gate_row = gates + row * c.gates_stride
        from_state = self.recurrent + (row * self.blocking(stage).block_col_vecs + within * count) * v.bytes
        state = {name: self.state_rows(name, row) + offset for name in cell.states}
        before, after = state["h"] + parity * self.h_size, state["h"] + (1 - parity) * self.h_size

        def load(leaf: Leaf) -> Value:
            match leaf:
                case State(name):
                    return v.load(before if name == "h" else state[name])
                case Peephole(gate):
                    return self.peephole(gate, unit)
                case Projected():
                    return v.load(from_state)
                case PreH(gate):
                    return v.load(from_state + stage.gate_names.index(gate) * v.bytes)
                case PreX(gate) | PreSum(gate):
                    return v.load(self.from_input(gate_row, gate, unit))
            raise AssertionError(leaf)

        results = stage.results_of(*self._result_kinds)
        for result, value in zip(results, evaluate(list(results.values()), load, v), strict=True):
            match result:
                case NewState(name):
                    v.store(value, after if name == "h" else state[name])
                case StageOperand(number):
                    v.store(value, self.operand_row(self.stages[number], row) + offset)
            self._result(stage, result, value, unit, rows)

    def _result(self, stage: StageKernel, result: Result, value: Value, unit: Value, rows: Rows) -> None:
        """A vector of what a row's step gave, to where it is wanted beside the state buffers."""
        if result == NewState("h"):
            self.store_real(value, unit, rows["y"] + unit * self.v.bytes, self.c.out)


class _Training(_Inference):
    """A member's part of one pass, the reserve filled."""

    _result_kinds = (NewState, StageOperand, Saved)

    def _records(self) -> Rows:
        """Where the reserve has the states of this pass, and what a second stage multiplies."""
        p = self.p
        records: Rows = dict(zip(map(NewState, self.cell.states), (p.saved_h, p.saved_c), strict=False))
        return records | {StageOperand(1): p.saved_operand} if len(self.stages) > 1 else records

    def record_initial(self, name: str, row: Value, index: Value, source: Value) -> None:
        """An initial state goes where the one of a step before the row's first would."""
        first = self.p.reverse.is_zero.select(self.f.constant(-1), self.length(row))
        units = self.units_of_state(name)
        self.f.copy(self.record(self._records()[NewState(name)], first, index) + units.own, source, units.own_bytes)

    def _input_row(self, source: Value, time: Value, index: Value, place: Value) -> Value:
        """Keep a copy of the network's input, and drop elements of what a layer reads from the one below."""
        f, c, p = self.f, self.c, self.p
        with f.if_(p.x_copy.is_set):
            begin, end = (p.k * group // c.grid_units * self.v.item for group in (self.unit_group, self.unit_group + 1))
            copy = p.x_copy + (time * c.batch + index) * p.k * self.v.item
            f.copy(copy + begin, source + begin, end - begin)
        return self.gathered(source, self.scratch + c.masked_offset + place * c.masked_row, index, time)

    def _output_rows(self, y: Value, time: Value, index: Value) -> Rows:
        records = {result: self.record(base, time, index) for result, base in self._records().items()}
        kept = self.p.saved_values + time * self.c.saved_values_step + index * self.c.saved_values_row
        return {**super()._output_rows(y, time, index), "kept": kept, **records}

    def _result(self, stage: StageKernel, result: Result, value: Value, unit: Value, rows: Rows) -> None:
        f, v, kept = self.f, self.v, len(self.derivative.saved)
        if isinstance(result, Saved):
            with f.if_(self.p.saved_values.is_set):
                v.store(value, rows["kept"] + (unit * kept + result.index) * v.bytes)
            return
        size = self.units_of(stage).size
        self.store_real(value, unit, rows[result] + unit * v.bytes, size)
        if result == NewState("h"):
            with f.if_(self.p.y.is_set):
                self.store_real(value, unit, rows["y"] + unit * v.bytes, size)
