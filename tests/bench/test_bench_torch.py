"""Benchmarks of PyTorch's modules: ours is torch.nn's accelerated; both are run alike and checked, packed and not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import fusedrnn.torch
from bench_rows import SMALL, small_config
from fusedrnn.bench import checks, runner, torch_contenders
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED, lengths, workload
from fusedrnn.spec import MODES
from fusedrnn.torch import eager as call

MODULES = (TORCH, IN_TORCH)
BOTH = (NON_FUSED, FUSED, *MODULES)
PACKED = (*MODULES, UNPACKED)

pytestmark = pytest.mark.usefixtures("known_peak")


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", MODES)
def test_modules_compute_what_the_reference_does(mode, phase, packed):
    work = workload(SMALL, mode, "float64", packed=packed)
    makers = PHASES[phase].makers
    contenders = {contender: makers[contender](work) for contender in (TORCH, IN_TORCH)}
    assert checks.check(work, PHASES[phase], contenders) is None


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("mode", MODES)
def test_only_the_accelerated_module_runs_on_the_operator(monkeypatch, mode, phase, packed):
    runs, real = Counter(), call.run

    def counted(spec, *operands, **kind):
        runs[spec.mode, kind.get("batch_sizes") is not None] += 1
        return real(spec, *operands, **kind)

    monkeypatch.setattr(call, "run", counted)
    work = workload(SMALL, mode, "float32", packed=packed)
    for contender, expected in ((TORCH, {}), (IN_TORCH, {(mode, packed): 1})):
        PHASES[phase].makers[contender](work)(work.batch(SMALL.T))
        assert runs == expected


def test_a_module_that_cannot_be_accelerated_is_an_error(monkeypatch):
    monkeypatch.setattr(fusedrnn.torch, "accelerate", lambda module: fusedrnn.torch.Report())
    with pytest.raises(RuntimeError, match="nothing was accelerated: the model has no"):
        torch_contenders.torch_nn(workload(SMALL, "gru", "float32"), accelerated=True)


@pytest.mark.parametrize("contender", [TORCH, IN_TORCH])
def test_every_parameter_changes_between_training_calls(monkeypatch, contender):
    seen, real = [], torch_contenders._module

    def watched(work, accelerated):
        module = real(work, accelerated)
        parameters = list(module.parameters())
        module.register_forward_pre_hook(
            lambda *_: seen.append([(each.detach().clone().numpy(), each._version) for each in parameters])
        )
        return module

    monkeypatch.setattr(torch_contenders, "_module", watched)
    work = workload(SMALL, "lstm", "float32")
    batch, run = work.batch(SMALL.T), PHASES["training"].makers[contender](work)
    for _ in range(3):
        run(batch)
    assert len(seen) == 3 and len(seen[0]) == 16
    for before, after in pairwise(seen):
        for (old_values, old_version), (values, version) in zip(before, after, strict=True):
            assert version > old_version and np.flatnonzero(values != old_values).tolist() == [0]
            np.testing.assert_array_max_ulp(values, old_values, maxulp=1)
    assert all(np.array_equal(first, third) for (first, _), (third, _) in zip(seen[0], seen[2], strict=True))


def test_a_new_batch_replaces_the_cached_tensors():
    work = workload(SMALL, "gru", "float32", packed=True)
    batch, run = work.batch(SMALL.T), torch_contenders.torch_nn(work, accelerated=True)
    first = run(batch)()["y"]
    assert not np.array_equal(run(replace(batch, x=-batch.x))()["y"], first)
    assert np.array_equal(run(batch)()["y"], first)


def test_lengths_are_uniform_between_half_and_all_steps():
    valid = lengths(10, 1000)
    assert valid.dtype == np.int64 and set(valid) == set(range(5, 11))
    assert np.array_equal(valid, lengths(10, 1000))
    assert (np.diff(valid) > 0).any() and (np.diff(valid) < 0).any()
    assert set(lengths(7, 100)) == {4, 5, 6, 7} and set(lengths(1, 9)) == {1}


def test_lengths_are_scaled_with_the_steps():
    work = workload(replace(SMALL, T=100, N=20), "gru", "float32", packed=True)
    for steps in (2, 10, 100):
        valid = work.batch(steps).lengths
        assert len(set(valid)) > 1 and valid.min() >= steps / 2 and valid.max() <= steps
    assert np.array_equal(work.batch(100).lengths, work.lengths)
    assert work.unpacked().batch(10).lengths is None


def test_padding_is_no_useful_work():
    work = workload(SMALL, "gru", "float32", packed=True)
    each = work.spec.flops(1, 1)
    assert work.flops(training=False) == each * work.lengths.sum() < each * SMALL.T * SMALL.N
    assert work.flops(training=True) == 3 * work.flops(training=False)
    assert work.unpacked().flops(training=False) == each * SMALL.T * SMALL.N


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("contenders", [BOTH, MODULES, PACKED], ids=["torch", "only-torch", "packed"])
def test_a_right_row_has_all_contenders(contenders, phase):
    before = torch.get_num_threads()
    [row] = runner.run(small_config(phase=phase, threads=before + 1, contenders=contenders))
    assert row.wrong is None and set(row.timings) == set(contenders)
    assert row.ours == (FUSED if FUSED in contenders else IN_TORCH)
    assert torch.get_num_threads() == before
    seconds = row.timings[IN_TORCH].median
    assert row.ratio(TORCH, IN_TORCH) == pytest.approx(row.timings[TORCH].median / seconds)
    assert row.share(IN_TORCH) == pytest.approx(row.flops / seconds / 1e9 / row.peak)
    if UNPACKED in contenders:
        useful = row.flops / (SMALL.spec("lstm").flops(SMALL.T, SMALL.N, training=phase == "training"))
        assert row.packed_over_unpacked() == pytest.approx(useful * row.timings[UNPACKED].median / seconds)


def test_modules_run_on_the_configured_threads(monkeypatch):
    seen, real = [], torch_contenders._module
    monkeypatch.setattr(
        torch_contenders, "_module", lambda *arguments: seen.append(torch.get_num_threads()) or real(*arguments)
    )
    list(runner.run(small_config(threads=3, contenders=MODULES)))
    assert seen == [3, 3]


@pytest.mark.parametrize(
    ("contender", "phase", "name", "contenders"),
    [
        (IN_TORCH, "inference", "y", BOTH),
        (IN_TORCH, "training", "dx", MODULES),
        (TORCH, "training", "dparams", MODULES),
        (IN_TORCH, "inference", "h_n", PACKED),
        (IN_TORCH, "training", "dparams", PACKED),
        (UNPACKED, "training", "dc0", PACKED),
    ],
)
@pytest.mark.parametrize("calls_before", [0, 3])
def test_a_wrong_module_has_no_times(monkeypatch, contender, phase, name, contenders, calls_before):
    makers = PHASES[phase].makers
    right_maker = makers[contender]

    def wrong_maker(work):
        run, calls = right_maker(work), iter(range(10**9))

        def wrong(batch):
            results = {part: array.copy() for part, array in run(batch)().items()}
            if next(calls) >= calls_before:
                results[name].flat[-1] = 0.9
            return lambda: results

        return wrong

    monkeypatch.setitem(makers, contender, wrong_maker)
    if not calls_before:
        monkeypatch.setattr(runner, "alternate", lambda *_, **__: pytest.fail("a wrong result was timed"))
    [row] = runner.run(small_config(phase=phase, contenders=contenders))
    # Where torch.nn's results as timed are what others are compared with, it is another that is called wrong.
    blamed = IN_TORCH if contender == TORCH and calls_before else contender
    assert row.wrong is not None and row.wrong.startswith(f"{blamed}: {name}")
    assert ("as timed" in row.wrong) == (calls_before > 0)
    assert not row.timings and row.share() is None


def test_a_nonzero_gradient_in_padding_is_wrong(monkeypatch):
    makers, real = PHASES["training"].makers, PHASES["training"].makers[IN_TORCH]
    valid = workload(SMALL, "lstm", "float32", packed=True).lengths
    short = int(valid.argmin())
    assert valid[short] < SMALL.T

    def wrong_maker(work):
        def run(batch):
            results = real(work)(batch)()
            results["dx"][-1, short, 0] = 0.5
            return lambda: results

        return run

    monkeypatch.setitem(makers, IN_TORCH, wrong_maker)
    [row] = runner.run(small_config(phase="training", contenders=PACKED))
    assert row.wrong is not None and row.wrong.startswith(f"{IN_TORCH}: dx[5, {short}, 0] is 0.5 instead of 0")
