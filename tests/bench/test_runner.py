"""Rows: checked before timing and as timed, with every figure if they are right."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

import fusedrnn
from bench_rows import SMALL, set_element, small_config, spoiled
from fusedrnn import cells
from fusedrnn.bench import checks, contenders, runner
from fusedrnn.bench.contenders import FUSED, NON_FUSED, PHASES, TORCH
from fusedrnn.bench.data import Batch, Workload, workload
from fusedrnn.cell import cell
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.testing.cases import Case

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


@pytest.mark.parametrize("mode", ["lstm", "rnn_relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_row_has_every_figure(known_peak, mode, dtype):
    [row] = runner.run(small_config((mode,), dtype=dtype, threads=2))
    assert row.wrong is None
    assert row.peak == 200.0
    assert set(row.timings) == {NON_FUSED, FUSED}
    assert row.rate(FUSED) == pytest.approx(SMALL.N / row.timings[FUSED].median)
    assert row.share() == pytest.approx(row.gflops() / 200.0)
    assert row.ratio(NON_FUSED) == pytest.approx(row.rate(FUSED) / row.rate(NON_FUSED))


@pytest.mark.parametrize(("name", "value"), [("y", 0.9), ("y", np.nan), ("h_n", 0.9), ("c_n", 5.0)])
def test_a_wrong_result_is_not_timed(monkeypatch, name, value):
    spoiled(monkeypatch, set_element(name, value))
    monkeypatch.setattr(runner, "alternate", lambda *_, **__: pytest.fail("a wrong result was timed"))
    [row] = runner.run(small_config())
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}[")
    assert not row.timings and row.share() is None


def test_gradient_of_a_scalar_may_cancel():
    """Its error is compared with the scale of all gradients: here 1e-4 of itself and 1e-6 of the largest."""
    work = workload(SMALL, cells.co_rnn, "float32")
    expected = np.full(work.spec.layout.size, 10.0, np.float32)
    work.spec.layout.unpack(expected)["l0_dt"][:] = 0.1
    for error, is_right in ((1e-5, True), (1e-2, False)):
        actual = expected.copy()
        work.spec.layout.unpack(actual)["l0_dt"][:] += error
        text = checks.compare(work, SMALL.T, {"dparams": actual}, {"dparams": expected}, num_rounded=1)
        assert (text is None) == is_right, text


def test_a_reference_that_is_not_finite():
    """No result could be compared with it."""
    unstable = cell(gates="a", name="unstable")(lambda x, recurrent, s: (x.a + recurrent(s.h).a) * math.nan)
    [row] = runner.run(small_config((unstable,)))
    assert row.wrong is not None
    assert "y of the reference is not finite: the network is unstable on this input" in row.wrong


def test_timed_results_are_checked(monkeypatch, known_peak):
    spoiled(monkeypatch, set_element("y", 0.9), calls_before=3)
    [row] = runner.run(small_config())
    assert row.wrong is not None and "as timed" in row.wrong
    assert not row.timings


def test_an_expensive_case_is_checked_on_its_first_steps(monkeypatch, known_peak):
    flops = SMALL.spec("lstm").flops(SMALL.T, SMALL.N)
    monkeypatch.setattr(checks, "CHECKED_FLOPS", flops / 3)
    spoiled(monkeypatch, set_element("y", 0.9))
    [row] = runner.run(small_config())
    assert row.wrong is not None and "2 of 6 steps" in row.wrong


def test_at_least_two_steps_are_checked():
    assert checks.checked_steps(300, 1e15) == 2
    assert checks.checked_steps(300, 2 * checks.CHECKED_FLOPS) == 150
    assert checks.checked_steps(300, 1.0) == 300
    assert checks.checked_steps(1, 1e15) == 1


@needs_torch
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", MODES)
def test_torch_computes_the_same(mode, phase):
    work = workload(SMALL, mode, "float64")
    assert checks.check(work, PHASES[phase], {TORCH: PHASES[phase].makers[TORCH](work)}) is None


class TorchOp:
    """An operator whose backward is torch's: what the fused contender asks of one, and a record of it."""

    instances: ClassVar[list[TorchOp]] = []

    def __init__(self, spec, backend) -> None:
        assert backend is None
        self.spec, self.params, self.out = spec, [], []
        TorchOp.instances.append(self)

    def compile(self, training):
        return self

    def forward(self, x, params, states, *, training, seed):
        assert training and seed is None  # nothing is dropped
        self.params.append(params.copy())
        case = replace(SMALL, T=len(x))
        work = Workload(case, self.spec, x, params)
        y, *final = reference.forward(self.spec, x, params, states)
        return y, final[0], (work, states)

    def backward(self, dy, dstates, reserve, *, out):
        work, states = reserve
        results = contenders.train_torch_nn(work)(Batch(work.x, states, dy, dstates))()
        dx, dparams, dinitial = out
        for into, name in [(dx, "dx"), (dparams, "dparams"), *zip(dinitial, ("dh0", "dc0"), strict=False)]:
            into[...] = results[name]
        self.out.append(out)
        return out


@pytest.fixture
def training_by_torch(monkeypatch, known_peak):
    """Every contender's gradients come from torch: what is tested here is the benchmark, not the operator."""
    TorchOp.instances.clear()
    monkeypatch.setattr(fusedrnn, "RNNOp", TorchOp)
    monkeypatch.setitem(PHASES["training"].makers, NON_FUSED, contenders.train_torch_nn)


@pytest.mark.parametrize("mode", MODES)
def test_a_right_training_row_has_every_figure(known_peak, mode):
    [row] = runner.run(small_config((mode,), "training"))
    assert row.wrong is None and set(row.timings) == {NON_FUSED, FUSED}
    assert row.flops == 3 * SMALL.spec(mode).flops(SMALL.T, SMALL.N)


@needs_torch
def test_parameters_change_at_every_call_and_gradients_reuse_their_arrays(training_by_torch):
    list(runner.run(small_config(phase="training")))
    [op] = TorchOp.instances
    assert len(op.params) >= 3
    for before, after in pairwise(op.params):
        changed = np.flatnonzero(before != after)
        assert {entry.offset for entry in op.spec.layout} == set(changed)
        np.testing.assert_array_max_ulp(before, after, maxulp=1)
    assert np.array_equal(op.params[0], op.params[2])
    assert len({id(out[1]) for out in op.out}) == 1
    assert len({id(out[0]) for out in op.out if len(out[0]) == SMALL.T}) == 1


@needs_torch
@pytest.mark.parametrize("name", ["y", "h_n", "c_n", "dx", "dparams", "dh0", "dc0"])
@pytest.mark.parametrize("calls_before", [0, 3])
def test_every_output_and_gradient_is_checked(monkeypatch, training_by_torch, name, calls_before):
    spoiled(monkeypatch, set_element(name, 0.9), calls_before, "training", contenders.train_torch_nn)
    [row] = runner.run(small_config(phase="training"))
    assert row.wrong is not None and row.wrong.startswith(f"{FUSED}: {name}")
    assert ("as timed" in row.wrong) == (calls_before > 0)
    assert not row.timings


@needs_torch
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", ["product", "step", "bias"])
def test_gradients_without_a_product_step_or_bias_are_wrong(training_by_torch, mode, lost):
    case = Case("t", 63, 3, 129, 100, 2, True)
    work = workload(case, mode, "float32")
    batch = work.batch(case.T)
    run = contenders.train_torch_nn(work)
    params = work.params.copy()
    if lost == "product":
        work.spec.layout.view(params, 1, 1, "h2h_weight")[:, 5] = 0
    elif lost == "bias":
        work.spec.layout.view(params, 0, 0, "h2h_bias")[:] = 0
    dy = batch.dy.copy()
    if lost == "step":
        dy[30] = 0
    faulty = contenders.train_torch_nn(replace(work, params=params))

    def call(batch):
        results = run(batch)()
        wrong = faulty(replace(batch, dy=dy))()
        return lambda: results | {"dparams": wrong["dparams"]}

    phase = PHASES["training"]
    assert checks.check(work, phase, {FUSED: run}) is None
    assert "dparams" in (checks.check(work, phase, {FUSED: call}) or "")
