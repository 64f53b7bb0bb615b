"""The time loop: one job that runs every layer and direction of a network over a whole sequence.

For a chunk of time steps at once a member multiplies the inputs with just the weights that it will itself consume.
Then, step by step: the recurrent GEMM, the cell's maths, h and c and y written, and a barrier if other members need
the new h. In training every state, and what else backward needs, also goes to the reserve, and a layer's input is read
from what the layer below has left there.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.codegen.build import Function, Module, Record, Value
from fusedrnn.codegen.dropout import Dropout
from fusedrnn.codegen.sync import flush_denormals
from fusedrnn.codegen.target import Target
from fusedrnn.codegen.tile import emit_gemm
from fusedrnn.codegen.unpacked import emit_unpacked_gemm
from fusedrnn.engine.sequence import MATRICES, SHARED, Pass, Program, each_pass, step_at
from fusedrnn.symbolic import Leaf, evaluate

CALL = Record(
    *SHARED,
    "states", "state_stride", "state_direction", "cell_at",
    "scratch", "scratch_member", "h_rows_at", "gates_at", "gates_stride", "recurrent_at", "masked_at", "masked_row",
    "biases_at", "biases_size",
)  # fmt: skip
PASS = Record(
    "x", "x_step", "x_row", "x_firsts", "k", "y", "y_step", "y_row", "y_firsts", "reverse",
    "x_weights", "h_weights", "x_bias", "h_bias", *MATRICES, "h0", "c0", "h_n", "c_n",
    "x_copy", "h_record", "c_record", "kept",
)  # fmt: skip


def build_forward(mode: str, dtype: str, target: Target, training: bool) -> Module:
    """The module whose ``forward(call, member)`` is a gang's job."""
    program = Program.of("training" if training else "forward", mode, dtype, target)
    sequence = (_Training if training else _Inference)(program).emit()
    f = Function(program.module, "forward", ["call", "member"], exported=True)
    call, member = f.arguments
    c = CALL.read(f, call)
    everyone = c.grid_passes * c.grid_rows * c.grid_units

    def run(layer: Value, direction: Value) -> None:
        f.call(sequence, call, member, layer, direction)

    def after(layer: Value) -> None:
        """The next layer reads what others have made, if they share rows."""
        with f.if_((c.grid_passes * c.grid_units > 1) & (layer < c.layers - 1)):
            f.call(program.barrier, c.barriers, everyone, c.spins)

    with f.if_(member < everyone), flush_denormals(f):
        each_pass(f, c, member, run, after)
    f.done()
    return program.module


class _Inference(Pass):
    """A member's part of one pass, nothing kept."""

    def __init__(self, program: Program) -> None:
        self.gemm = emit_gemm(program.module, program.target, program.dtype)
        gates = len(program.cell.gates)
        self.unpacked = emit_unpacked_gemm(program.module, program.target, program.dtype, gates)
        super().__init__(program, "sequence", (CALL, PASS))
        self.first_column = self.first_unit * self.blocking.gates
        self._place()

    def emit(self) -> Function:
        """Emit the function."""
        f, c = self.f, self.c
        self._enter()
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
        self._exit()
        f.done()
        return f

    def _place(self) -> None:
        """Where this member's scratch and this direction's states lie."""
        c = self.c
        self.scratch = scratch = c.scratch + self.member * c.scratch_member
        self.x_rows, self.h_rows = scratch, scratch + c.h_rows_at
        self.gates, self.recurrent = scratch + c.gates_at, scratch + c.recurrent_at
        self.states = c.states + self.slot * c.state_direction + self.first_row * c.state_stride
        # h lies twice, for even and odd steps: a step reads one while it writes the other.
        self.h_size = c.cell_at / 2
        self.biases = scratch + c.biases_at

    def _state_fields(self) -> list[tuple[str, Value, Value]]:
        """For each state: its name, and where the caller's initial and final values go (0 for nowhere)."""
        p = self.p
        ends = {"h": (p.h0, p.h_n), "c": (p.c0, p.c_n)}
        return [(name, *ends[name]) for name in self.cell.states]

    def _state_rows(self, name: str, row: Value) -> Value:
        """This member's row of a state buffer; the even one for h."""
        at = self.states + row * self.c.state_stride
        return at if name == "h" else at + self.c.cell_at

    def _enter(self) -> None:
        """Initial states into the state buffers, and the addresses of h's rows, even steps then odd."""
        f = self.f
        with f.loop(0, self.rows) as row:
            index = self.index(row)
            f.store(self._state_rows("h", row), self.h_rows + row * 8)
            f.store(self._state_rows("h", row) + self.h_size, self.h_rows + (self.rows + row) * 8)
            for name, initial, _ in self._state_fields():
                into = self._state_rows(name, row) + self.own
                with f.if_else(initial.equals(0)) as (absent, given):
                    with absent:
                        f.fill_zero(into, self.own_bytes)
                    with given:
                        f.copy(into, self.row_of_state(initial, index), self.own_bytes)
                if name == "h":
                    f.copy(into + self.h_size, into, self.own_bytes)
                self._record_initial(name, row, index, into)
        with f.if_(self.is_unpacked):
            self._place_biases()
        self.meet()

    def _place_biases(self) -> None:
        """Biases that come as they are, in the order in which GEMMs start from them: the input's, then the state's."""
        f, c, p, v = self.f, self.c, self.p, self.v
        with f.loop(self.first_unit, self.last_unit) as unit:
            left = (c.hidden - unit * v.lanes).at_most(v.lanes)
            for gate in range(self.blocking.gates):
                column = (unit - self.first_unit) * self.blocking.gates + gate
                offset = (c.hidden * gate + unit * v.lanes) * v.item
                of_input, of_state = (self._bias(base, offset, left) for base in (p.x_vector, p.h_vector))
                into = self.biases + column * v.bytes
                v.store(of_input + of_state if self.cell.merged else of_input, into)
                v.store(of_state, into + c.biases_size)

    def _bias(self, base: Value, offset: Value, left: Value) -> Value:
        """A vector of biases, zeros if there are none."""
        f, v = self.f, self.v
        bias = f.var(v.const(0.0))
        with f.if_(base.compare("!=", 0)):
            bias.set(v.load_first(base + offset, left))
        return bias.get()

    def _multiply(
        self, of_state: bool, column: Value, vectors: Value, count: Value, rows: Value, at: Value, stride: Value,
        fresh: bool, onward: Value,
    ) -> None:  # fmt: skip
        """Columns of an input GEMM, or of a recurrent one, added to what is there or, fresh, to the bias.

        The panel needed next is so many further ``onward``.
        """
        f, c, p, v = self.f, self.c, self.p, self.v
        k = c.hidden if of_state else p.k
        weights, matrix, bias = (p.h_weights, p.h_matrix, p.h_bias) if of_state else (p.x_weights, p.x_matrix, p.x_bias)
        placed = self.biases + (column - self.first_column) * v.bytes + (c.biases_size if of_state else 0)
        start_stride = f.constant(0) if fresh else stride
        with f.if_else(self.is_unpacked) as (loose, packed):
            with loose:
                start = placed if fresh else at
                places = start, start_stride, at, stride
                f.call(self.unpacked, count, vectors, rows, matrix, k, *places, column, c.hidden)
            with packed:
                start = bias + column * v.bytes if fresh else at
                b = self.weights_at(weights, column, k)
                ahead = b + onward * k * self.panel_bytes
                f.call(self.gemm, count, vectors, rows, b, k, start, start_stride, at, stride, ahead)

    def _record_initial(self, name: str, row: Value, index: Value, source: Value) -> None:
        """What training does with an initial state."""

    def _exit(self) -> None:
        """Final states to the caller: h from where each row's last step left it."""
        f, c, p = self.f, self.c, self.p
        with f.loop(0, self.rows) as row:
            index = self.index(row)
            steps = p.reverse.equals(0).select(self.length(row), c.steps)
            for name, _, final in self._state_fields():
                source = self._state_rows(name, row) + self.own
                if name == "h":
                    source = source + (steps & 1) * self.h_size
                f.copy(self.row_of_state(final, index), source, self.own_bytes)

    def _inputs(self, first: Value, last: Value) -> None:
        """The input GEMM of a chunk: every live row of its steps against this member's columns."""
        f, p, gates = self.f, self.p, self.blocking.gates
        count = f.var(0)
        with f.loop(first, last) as step:
            time = self.time(step)
            at = step_at(f, p.x, p.x_step, p.x_row, p.x_firsts, time)
            with f.loop(0, self.alive(time)) as row:
                index = self.index(row)
                f.store(self._input_row(at + index * p.x_row, time, index, count.get()), self.x_rows + count.get() * 8)
                count.set(count.get() + 1)
        with f.if_(count.get() > 0), self.panels(self.first_column, self.last_unit * gates) as (column, vectors):
            into = self.gates + (column - self.first_column) * self.v.bytes
            places = into, self.c.gates_stride
            self._multiply(False, column, vectors, count.get(), self.x_rows, *places, True, f.constant(1))

    def _input_row(self, source: Value, time: Value, index: Value, place: Value) -> Value:
        """Where the input GEMM shall read a row that lies at ``source``."""
        return source

    def _step(self, step: Value, time: Value, alive: Value, done: Value) -> None:
        """One step: block by block of units, the recurrent GEMM and then the cell's maths on what it gave."""
        f, c, p, v = self.f, self.c, self.p, self.v
        parity = step & 1
        h_rows = self.h_rows + parity * self.rows * 8
        gates = self.gates + done * c.gates_stride
        backwards = self.backwards(step)
        back = 1 - 2 * self.blocking.block_panels
        with self.blocks(backwards) as (unit, end):
            first, past = unit * self.blocking.gates, end * self.blocking.gates
            with self.panels(first, past) as (column, vectors):
                onward = (backwards & (column + vectors).equals(past)).select(f.constant(back), 1)
                if self.cell.merged:
                    at = gates + (column - self.first_column) * v.bytes
                    self._multiply(True, column, vectors, alive, h_rows, at, c.gates_stride, False, onward)
                else:
                    at = self.recurrent + (column - first) * v.bytes
                    stride = f.constant(self.blocking.block_columns * v.bytes)
                    self._multiply(True, column, vectors, alive, h_rows, at, stride, True, onward)
            y = step_at(f, p.y, p.y_step, p.y_row, p.y_firsts, time)
            with f.loop(0, alive) as row:
                rows = self._output_rows(y, time, self.index(row))
                with f.loop(unit, end) as at:
                    self._cell(row, at, at - unit, parity, gates, rows)

    def _output_rows(self, y: Value, time: Value, index: Value) -> list[Value]:
        """Where the results of a row go at that time, whose rows of output begin at ``y``."""
        return [y + index * self.p.y_row]

    def _cell(self, row: Value, unit: Value, within: Value, parity: Value, gates: Value, rows: list[Value]) -> None:
        """The cell's maths on one vector of units of one row."""
        c, v, cell = self.c, self.v, self.cell
        offset = unit * v.bytes
        count = self.blocking.gates
        from_input = gates + row * c.gates_stride + (unit - self.first_unit) * (count * v.bytes)
        from_state = self.recurrent + (row * self.blocking.block_columns + within * count) * v.bytes
        state = {name: self._state_rows(name, row) + offset for name in cell.states}
        before, after = state["h"] + parity * self.h_size, state["h"] + (1 - parity) * self.h_size

        def leaf(which: Leaf) -> Value:
            kind, name = which
            if kind == "state":
                return v.load(before if name == "h" else state[name])
            source = from_state if kind == "h" else from_input
            return v.load(source + cell.gates.index(name) * v.bytes)

        values = self._evaluate(leaf)
        for name, value in zip(cell.states, values, strict=False):
            v.store(value, after if name == "h" else state[name])
        self._output(values, unit, rows)

    def _evaluate(self, leaf: Callable[[Leaf], Value]) -> list[Value]:
        """The new states, the output first, and what else the outputs need."""
        return list(evaluate(self.cell.outputs, leaf, self.v))

    def _output(self, values: list[Value], unit: Value, rows: list[Value]) -> None:
        """A vector of a row's results."""
        self.store_real(values[0], unit, rows[0] + unit * self.v.bytes)


class _Training(_Inference):
    """A member's part of one pass, the reserve filled."""

    def __init__(self, program: Program) -> None:
        self.dropout = Dropout(program.module, program.target, program.dtype)
        super().__init__(program)
        self.kept = self.derivative.kept

    def _records(self) -> list[Value]:
        """Where the reserve has the states of this pass."""
        return [self.p.h_record, self.p.c_record][: len(self.cell.states)]

    def _record_initial(self, name: str, row: Value, index: Value, source: Value) -> None:
        """An initial state goes where the one of a step before the row's first would."""
        first = self.p.reverse.equals(0).select(self.f.constant(-1), self.length(row))
        base = self._records()[self.cell.states.index(name)]
        self.f.copy(self.record(base, first, index) + self.own, source, self.own_bytes)

    def _input_row(self, source: Value, time: Value, index: Value, place: Value) -> Value:
        """Keep a copy of the network's input, and drop elements of what a layer reads from the one below."""
        f, c, p = self.f, self.c, self.p
        with f.if_(p.x_copy.compare("!=", 0)):
            begin, end = (p.k * group // c.grid_units * self.v.item for group in (self.unit_group, self.unit_group + 1))
            copy = p.x_copy + (time * c.batch + index) * p.k * self.v.item
            f.copy(copy + begin, source + begin, end - begin)
        return self.gathered(self.dropout.row, source, self.scratch + c.masked_at + place * c.masked_row, index, time)

    def _output_rows(self, y: Value, time: Value, index: Value) -> list[Value]:
        kept = self.p.kept + time * self.c.kept_step + index * self.c.kept_row
        records = [self.record(base, time, index) for base in self._records()]
        return [*super()._output_rows(y, time, index), kept, *records]

    def _evaluate(self, leaf: Callable[[Leaf], Value]) -> list[Value]:
        return list(evaluate((*self.cell.outputs, *self.kept), leaf, self.v))

    def _output(self, values: list[Value], unit: Value, rows: list[Value]) -> None:
        f, v = self.f, self.v
        y, kept, *records = rows
        for value, record in zip(values, records, strict=False):
            self.store_real(value, unit, record + unit * v.bytes)
        with f.if_(self.p.y.compare("!=", 0)):
            self.store_real(values[0], unit, y + unit * v.bytes)
        if self.kept:
            with f.if_(self.p.kept.compare("!=", 0)):
                for place, value in enumerate(values[len(records) :]):
                    v.store(value, kept + (unit * len(self.kept) + place) * v.bytes)
