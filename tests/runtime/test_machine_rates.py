"""The measured rates of the machine: kept on disk, measured again if a file is missing or damaged, never absurd."""

from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import RNNSpec
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.engines.cpu.tuning import MachineModel, Tuning
from fusedrnn.jit.host import available_targets, emulated
from fusedrnn.runtime import bandwidth, machine_rates
from fusedrnn.runtime.machine_rates import MachineRates, keep_rates, kept_rates

TARGET = available_targets()[-1]
RATES = MachineRates(fma=51.25, l2=90.5, l3=40.0, memory=8.125)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder without a file, and a process that has read none."""
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSEDRNN_TARGET", TARGET.name)
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch):
    """What another process would know."""
    monkeypatch.setattr(machine_rates, "_of_this_process", {})


def test_another_process_reads_what_one_has_kept(folder, monkeypatch):
    assert kept_rates(TARGET) is None
    keep_rates(TARGET, RATES)
    assert kept_rates(TARGET) == RATES
    forget(monkeypatch)
    assert kept_rates(TARGET) == RATES
    [file] = folder.iterdir()
    file.unlink()
    assert kept_rates(TARGET) == RATES  # read once in a process


@pytest.mark.parametrize("damage", [b"", b"damaged", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_is_no_file(folder, monkeypatch, damage):
    keep_rates(TARGET, RATES)
    [file] = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    forget(monkeypatch)
    assert kept_rates(TARGET) is None
    keep_rates(TARGET, RATES)
    forget(monkeypatch)
    assert kept_rates(TARGET) == RATES


@pytest.mark.parametrize("rates", [replace(RATES, l2=np.nan), replace(RATES, fma=-1.0), replace(RATES, memory="x y")])
def test_impossible_rates_are_not_read(monkeypatch, rates):
    keep_rates(TARGET, rates)
    forget(monkeypatch)
    assert kept_rates(TARGET) is None


def test_a_folder_that_cannot_be_written_keeps_them_in_the_process(folder, monkeypatch):
    folder.write_text("a file")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        keep_rates(TARGET, RATES)
    assert kept_rates(TARGET) == RATES
    forget(monkeypatch)
    assert kept_rates(TARGET) is None


def test_without_a_folder_they_are_kept_in_the_process(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", "")
    keep_rates(TARGET, RATES)
    assert kept_rates(TARGET) == RATES


def test_targets_and_machines_have_rates_of_their_own(monkeypatch):
    keep_rates(TARGET, RATES)
    assert kept_rates(replace(TARGET, name="other")) is None
    assert kept_rates(replace(TARGET, name=f"{TARGET.name}-more", base=TARGET)) == RATES
    machine_rates._file.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(machine_rates, "processor_name", lambda: "another processor")
        assert kept_rates(TARGET) is None
        machine_rates._file.cache_clear()
    assert kept_rates(TARGET) == RATES


def test_emulated_targets_have_none():
    keep_rates(emulated(TARGET), RATES)
    assert kept_rates(emulated(TARGET)) is None and kept_rates(TARGET) is None


def test_rates_are_measured_once_or_anew(monkeypatch):
    measured = []

    def measure(threads, **options):
        measured.append(threads)
        return {"L2": 90.5, "memory": 8.125 * len(measured)}

    monkeypatch.setattr(bandwidth, "measure_bandwidth", measure)
    monkeypatch.setattr(bandwidth, "measure_peak", lambda dtype, threads: 51.25)
    first = bandwidth.measured_rates()
    assert first == replace(RATES, l3=0.0) == bandwidth.measured_rates() and measured == [1]
    assert bandwidth.measured_rates(anew=True) == replace(first, memory=16.25) == kept_rates(TARGET)


def test_the_cost_model_takes_what_was_measured_within_limits():
    assumed = MachineModel.of(TARGET)
    assert Tuning().machine_of(TARGET) == assumed
    keep_rates(TARGET, RATES)
    model = Tuning().machine_of(TARGET)
    assert (model.l2_bandwidth, model.l3_bandwidth, model.memory_bandwidth) == (90.5e9, 40e9, 8.125e9)
    assert model.fma_rate * 2 * TARGET.lanes("float32") == pytest.approx(51.25e9)
    assert replace(model, fma_rate=0, l2_bandwidth=0, l3_bandwidth=0, memory_bandwidth=0) == replace(
        assumed, fma_rate=0, l2_bandwidth=0, l3_bandwidth=0, memory_bandwidth=0
    )
    assert Tuning(machine=assumed).machine_of(TARGET) == assumed
    slow, fast = (assumed.with_rates(MachineRates(*[rate] * 4), TARGET) for rate in (1e-6, 1e9))
    for name in ("fma_rate", "l2_bandwidth", "l3_bandwidth", "memory_bandwidth"):
        assert getattr(assumed, name) / 10 < getattr(slow, name) < getattr(fast, name) < getattr(assumed, name) * 10
    unknown = assumed.with_rates(MachineRates(51.25, 50.0, 0.0, 0.0), TARGET)
    assert unknown.l3_bandwidth == unknown.l2_bandwidth == 50e9  # no level is faster than the one before
    assert unknown.memory_bandwidth == assumed.memory_bandwidth


def test_a_plan_does_not_measure(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("measured")

    for name in ("measure_bandwidth", "measure_peak"):
        monkeypatch.setattr(bandwidth, name, fail)
    make_plan(RNNSpec("gru", 8, 64), TARGET, 20, 8, threads=2)
    assert machine_rates._of_this_process == {machine_rates._file(TARGET): None}
