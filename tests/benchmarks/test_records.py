"""Reading a benchmark: who is ours, who is the best of the others, and files that are something else."""

import json
from dataclasses import replace

import pytest

from benchmarks.records import load
from drawn_rows import benchmark_of, measured
from fusedrnn.bench.data import FUSED, IN_TORCH, NON_FUSED, TORCH, UNPACKED
from fusedrnn.bench.report import least_bytes
from fusedrnn.testing.cases import CASES, Case


def record(gflops, revisions=(), **fields):
    [only] = benchmark_of([measured(CASES["tiny"], "lstm", gflops, **fields)], revisions).records
    return only


def test_ours_are_compared_with_the_best_of_the_others():
    speeds = {NON_FUSED: 10.0, "v1.2": 50.0, "jax": 40.0, FUSED: 100.0, IN_TORCH: 25.0}
    row = record(speeds)
    assert row.best_other == "v1.2"
    assert row.over_best(FUSED) == pytest.approx(2.0) and row.over_best(IN_TORCH) == pytest.approx(0.5)
    assert row.over_best(UNPACKED) is None and row.over_best("jax") is None
    assert record(speeds, revisions=["v1.2"]).best_other == "jax"
    only_revision = record({"v1.2": 50.0, FUSED: 100.0}, revisions=["v1.2"])
    assert only_revision.over_best(FUSED) == pytest.approx(2.0)
    alone = record({FUSED: 100.0})
    assert alone.best_other is None and alone.over_best(FUSED) is None


@pytest.mark.parametrize(
    ("speeds", "ours"),
    [
        ({NON_FUSED: 1.0, FUSED: 2.0, IN_TORCH: 3.0}, FUSED),
        ({TORCH: 1.0, IN_TORCH: 2.0}, IN_TORCH),
        ({"cpu": 1.0}, "cpu"),
    ],
)
def test_ours_is_the_operator_or_the_modules_or_the_first_engine(speeds, ours):
    backends = ("cpu",) if "cpu" in speeds else ()
    assert record(speeds, backends=backends).ours == ours


def test_the_least_traffic_of_a_small_network_counted_by_hand():
    case = Case("t", T=5, N=3, I=7, H=11)
    row = measured(case, "rnn_tanh", {FUSED: 1.0})
    recurrent, rest = 11 * 11, 11 * 7 + 2 * 11
    data = 5 * 3 * (7 + 11) + 2 * 3 * 11  # inputs, outputs, states before and after
    assert least_bytes(row) == 4 * (5 * recurrent + rest + data)
    training = measured(case, "rnn_tanh", {FUSED: 1.0}, "training")
    assert least_bytes(training) == 2 * least_bytes(row) + 4 * (recurrent + rest + data)
    assert least_bytes(replace(row, dtype="float64")) == 2 * least_bytes(row)
    [drawn] = benchmark_of([row]).records
    assert drawn.intensity == row.flops / least_bytes(row)


def test_padding_moves_no_bytes():
    case = Case("t", T=5, N=3, I=7, H=11)
    row = measured(case, "lstm", {FUSED: 1.0})
    assert least_bytes(replace(row, lengths=(5, 5, 5))) == least_bytes(row)
    shorter = replace(row, lengths=(4, 2, 1))
    assert least_bytes(row) - least_bytes(shorter) == 4 * ((15 - 7) * (7 + 11) + 4 * 11 * 11)


def test_more_sequences_share_the_weights():
    rows = [measured(replace(CASES["seq1"], N=N), "lstm", {FUSED: 1.0}) for N in (1, 64)]
    one, many = benchmark_of(rows).records
    assert one.intensity < 2 and many.intensity > 30


def test_a_file_may_hold_names_and_medians_alone(tmp_path):
    path = tmp_path / "rows.json"
    row = {"case": "tiny", "mode": "gru", "phase": "inference", "seconds": {"fused": 1.0, "JAX": 3.0}}
    path.write_text(json.dumps({"machine": "a machine", "rows": [row]}))
    [only] = load(path).records
    assert only.over_best(FUSED) == 3.0 and only.peak is None and not only.packed


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1]}', '{"rows": [{"case": "tiny"}]}'])
def test_other_files_are_rejected(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json is not a file of `fusedrnn bench --json`"):
        load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "nowhere.json")
