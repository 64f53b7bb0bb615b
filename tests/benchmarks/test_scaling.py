"""Weak scaling: what is measured in which processes, and the arithmetic of networks."""

import multiprocessing

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import scaling
from benchmarks.scaling import Run, Setup
from fusedrnn.testing.cases import CASES

ONE, TWO, THREADS = Setup(1, 1, 1), Setup(2, 1, 1), Setup(1, 2, 2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_command():
    """With a second process, which has ended afterwards."""
    threads = torch.get_num_threads()
    options = ["--case", "tiny", "--mode", "gru", "--rounds", "2", "--seconds", "0.001"]
    result = CliRunner().invoke(scaling.app, options)
    assert result.exit_code == 0, result.output
    for phase in scaling.PHASES:
        for setup in "1 process, 1 thread", "2 processes, 1 thread each", "1 process, 2 threads":
            assert f" {phase} " in result.output and setup in result.output
    parameters = CASES["tiny"].spec("gru").layout.size
    assert f"{4 * parameters / 1e6:.2f} MB of gradients" in result.output
    assert torch.get_num_threads() == threads
    assert not multiprocessing.active_children()


def test_wrong_options_are_named():
    result = CliRunner().invoke(scaling.app, ["--case", "huge"])
    assert result.exit_code == 2
    assert "--case is one of ds2, " in result.output and "got huge and lstm" in result.output


def test_ratios_are_medians_over_rounds():
    run = Run(CASES["tiny"], "lstm", 2, 3, 1.0)
    assert run.setups == [ONE, TWO, THREADS]
    rates = {("training", ONE): [10.0, 20.0, 40.0], ("training", TWO): [15.0, 38.0, 84.0]}
    columns = [list(column.cells) for column in scaling.rates_table(run, rates).columns]
    assert columns[2:] == [["20", "38"], ["10 to 40", "15 to 84"], ["1.00", "1.90"]]


def test_a_ring_sends_each_part_twice():
    """Step by step: a host sends the n-th part of the bytes 2 (n - 1) times."""
    for hosts in 2, 3, 10:
        seconds = sum(12e6 / hosts / (10e9 / 8) for _ in range(2 * (hosts - 1)))
        assert scaling.all_reduce_seconds(12_000_000, hosts, 10) == pytest.approx(seconds)
    rows = [list(column.cells) for column in scaling.network_table(12_500_000, 0.1).columns]
    assert rows[0] == ["1 Gbit/s", "10 Gbit/s", "25 Gbit/s"]
    assert rows[1] == ["100.00 ms, 100%", "10.00 ms, 10%", "4.00 ms, 4%"]
