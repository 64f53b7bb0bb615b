"""``python -m benchmarks.jax``: the operator in JAX, compared with NumPy, a scan, and layers of flax.

All calls of a row take turns in one process. A call in JAX is one jitted function. Training is forward and the
gradients of the parameters and the input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

import fusedrnn
from benchmarks.timed_rows import TimedRow, result_difference, take_turns
from fusedrnn import RNNOp
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.peaks import RunPeak
from fusedrnn.bench.report import environment_report
from fusedrnn.bench.tables import duration, new_table
from fusedrnn.cli import options
from fusedrnn.cli.console import check_writable, fail, output, steps, write_json
from fusedrnn.cli.program import Program
from fusedrnn.jax import accelerate, rnn
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import CASES, Case

NUMPY, RNN, SCAN, FLAX, ACCELERATED = "RNNOp", "rnn", "scan", "flax", "accelerated"
PAIRS = (RNN, NUMPY), (SCAN, RNN), (FLAX, ACCELERATED)
"""The pairs of contenders whose times are compared."""
_ALL_CASES = ",".join(CASES)

app = Program()
Call = Callable[[], Any]


def operator_calls(spec: RNNSpec, x: Any, dy: Any, training: bool) -> dict[str, Call]:
    """The calls on the flat vector. Each returns the output, in training also dx and dparams."""
    rng = np.random.default_rng(1)
    params = rng.uniform(-1, 1, spec.layout.size).astype("f4") / np.float32(np.sqrt(spec.hidden_size))
    op = RNNOp.get(spec)

    def in_numpy() -> Any:
        y, _, reserve = op.forward(x, params, training=training)
        if reserve is None:
            return (y,)
        dx, dparams, _ = op.backward(dy, None, reserve)
        return y, dx, dparams

    in_jax, x_jax = jnp.asarray(params), jnp.asarray(x)
    forwards: dict[str, Callable[[Any, Any], Any]] = {RNN: lambda x, p: rnn(spec, p, x)[0], SCAN: partial(scan, spec)}
    calls = {name: _compiled(forward, dy, training) for name, forward in forwards.items()}
    return {NUMPY: in_numpy, **{name: partial(_run, call, x_jax, in_jax) for name, call in calls.items()}}


def scan(spec: RNNSpec, x: Any, params: Any) -> Any:
    """The network as users of JAX write it: one product for the inputs of all steps, one for the state of each step."""
    for layer in range(spec.num_layers):
        ways = [_scan_direction(spec, x, params, layer, way) for way in range(spec.num_directions)]
        x = jnp.concatenate(ways, axis=2)
    return x


def _scan_direction(spec: RNNSpec, x: Any, params: Any, layer: int, direction: int) -> Any:
    entries = (spec.layout.entry(layer, direction, kind) for kind in spec.layout.kinds)
    w_x, w_h, b_x, b_h = (params[e.offset : e.offset + e.size].reshape(e.shape) for e in entries)
    inputs = x @ w_x.T + (b_x if spec.mode == "gru" else b_x + b_h)

    def step(carry: Any, gates: Any) -> Any:
        h, c = carry
        sums = h @ w_h.T
        if spec.mode == "lstm":
            i, f, g, o = jnp.split(gates + sums, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        elif spec.mode == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(gates, 3, axis=1), jnp.split(sums + b_h, 3, axis=1)
            z = jax.nn.sigmoid(x_z + h_z)
            h = (1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * h
        else:
            h = (jax.nn.relu if spec.mode == "rnn_relu" else jnp.tanh)(gates + sums)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], spec.hidden_size), x.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs, reverse=bool(direction))[1]


def flax_calls(case: Case, mode: str, x: Any, dy: Any, training: bool) -> dict[str, Call]:
    """The calls of flax's layers, plain and accelerated. Each returns the output, in training also gradients."""
    from benchmarks import flax_layers

    model = flax_layers.Stack(case, mode)
    calls: dict[str, Call] = {}
    for name in (FLAX, ACCELERATED):
        if name == ACCELERATED and not accelerate(model):
            raise ValueError(f"flax's layers of {mode} cannot be accelerated")
        forward, params = flax_layers.split(model)
        calls[name] = partial(_run, _compiled(forward, dy, training), jnp.asarray(x), params)
    return calls


def _compiled(forward: Callable[[Any, Any], Any], dy: Any, training: bool) -> Callable[[Any, Any], Any]:
    def train(x: Any, params: Any) -> Any:
        y, vjp = jax.vjp(forward, x, params)
        return y, *vjp(jnp.asarray(dy))

    compiled: Callable[[Any, Any], Any] = jax.jit(train if training else lambda x, params: (forward(x, params),))
    return compiled


def _run(call: Callable[[Any, Any], Any], x: Any, params: Any) -> Any:
    return jax.block_until_ready(call(x, params))


def check(spec: RNNSpec, case: Case, expected: Any, actual: Any) -> None:
    """Compare the results of two calls.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    for index, (array, other) in enumerate(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)):
        if message := result_difference(spec, case, array, other, is_gradient=index > 0):
            raise RuntimeError(f"{case.name}, {spec.mode_name}: results differ{message}")


def run_row(case: Case, mode: str, phase: str, peak: RunPeak, seconds: float) -> TimedRow:
    """Check and time the calls of one workload.

    Raises:
        RuntimeError: If results differ.
    """
    spec, training = case.spec(mode), phase == "training"
    rng = np.random.default_rng(0)
    x = rng.standard_normal((case.T, case.N, case.I), np.float32)
    dy = rng.standard_normal((case.T, case.N, spec.output_size), np.float32)
    calls = {**operator_calls(spec, x, dy, training), **flax_calls(case, mode, x, dy, training)}
    _check_all(spec, case, calls)
    # The gradients of ds2-5bi take 300 MB for each contender: none is kept while another one runs.
    dropped: dict[str, Call] = {name: partial(_run_and_drop, call) for name, call in calls.items()}
    return TimedRow(case, mode, phase, take_turns(dropped, seconds, peak))


def _check_all(spec: RNNSpec, case: Case, calls: dict[str, Call]) -> None:
    expected = calls[NUMPY]()
    for name in (RNN, SCAN):
        check(spec, case, expected, calls[name]())
    del expected
    check(spec, case, calls[FLAX](), calls[ACCELERATED]())


def _run_and_drop(call: Call) -> None:
    call()


def table(rows: list[TimedRow]) -> Table:
    """Our medians, the time that JAX adds to the call in NumPy, and how many times as fast our calls are."""
    headings = ("", "RNNOp", "rnn", "rnn / RNNOp", "scan / rnn", "flax", "accelerated", "flax / accelerated")
    result = new_table("Medians, and ratios of them", headings)
    for row in rows:
        times = {name: duration(timing.median) for name, timing in row.timings.items()}
        ratios = [f"{row.ratio(*pair):.2f}" for pair in PAIRS]
        result.add_row(row.name, times[NUMPY], times[RNN], *ratios[:2], times[FLAX], times[ACCELERATED], ratios[2])
    return result


def report(rows: list[TimedRow], threads: int) -> dict[str, Any]:
    """All rows as data for JSON, with the machine and the versions."""
    environment = environment_report()
    environment["versions"] |= {"jax": jax.__version__}
    return {"environment": environment, "threads": threads, "rows": [row_report(row) for row in rows]}


def row_report(row: TimedRow) -> dict[str, Any]:
    """A row as data for JSON."""
    return {"case": row.case.name, "mode": row.mode, "phase": row.phase, **row.seconds_report()}


def workloads(cases: list[Case], modes: list[str], phases: list[str]) -> Iterator[tuple[Case, str, str]]:
    """Every combination, in the order of the table."""
    yield from ((case, mode, phase) for phase in phases for case in cases for mode in modes)


@app.command()
def main(
    cases: options.Cases = _ALL_CASES,
    modes: options.Modes = "lstm,gru,rnn_tanh",
    phases: options.Phases = options.ALL_PHASES,
    threads: Annotated[int, typer.Option(min=1, help="Threads of fusedrnn, and processors for XLA.")] = 2,
    seconds: options.Seconds = 3.0,
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Call fusedrnn.keep_freed_memory before anything else.")
    ] = False,
    json: options.Json = None,
) -> None:
    """Time RNNOp on NumPy arrays, rnn and a scan under jit, and flax's layers, plain and accelerated."""
    try:
        check_writable("--json", json)
        chosen = list(workloads(
            options.parse_cases(cases), options.parse_modes(modes), options.parse_names(phases, "phase", PHASES)
        ))  # fmt: skip
    except ValueError as error:
        fail(str(error))
    if keep_memory:
        fusedrnn.keep_freed_memory()
    if hasattr(os, "sched_setaffinity"):  # XLA starts a thread for each processor on which it may run
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    fusedrnn.set_num_threads(threads)
    rows, peak = list[TimedRow](), RunPeak("float32", threads)
    with steps(len(chosen)) as progress:
        for case, mode, phase in chosen:
            progress.say(f"{case.name}, {mode}, {phase}")
            row = run_row(case, mode, phase, peak, seconds)
            rows.append(row)
            ratios = {f"{slower} / {faster}": row.ratio(slower, faster) for slower, faster in PAIRS}
            progress.done(f"{row.name}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
            if json:  # after each row, since all rows together take long
                write_json(json, report(rows, threads))
    output().print(table(rows))


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.jax")
