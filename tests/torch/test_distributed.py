"""DistributedDataParallel: the example under torchrun, and what DDP does with the gradients of our layers."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

from examples import train_ddp
from forecasts import SIZES, bounds, exact
from fusedrnn import RNNSpec
from fusedrnn.testing.tolerance import difference, gradient_tolerance
from fusedrnn.torch import GRU, LSTM, accelerate

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_ddp.py"
LIMIT = 120  # seconds; a run takes a few
# Now and then a process ends so that has done its work: a thread of gloo's lives on, whoever's modules were trained.
ABORTED, TRIES = "terminate called without an active exception", 3


def run(arguments, processes=None):
    """The example's exit code and output; under torchrun if ``processes`` is not None.

    Every process writes to the one pipe, and it is read to its end: when this returns, none of them is left.
    """
    launcher = []
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = [sys.executable, *map(str, [*launcher, EXAMPLE, *arguments])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers before itself
            process.communicate(timeout=LIMIT)
    return process.returncode, output


@pytest.mark.parametrize(("processes", "dtype"), [(None, "float64"), (2, "float32")])
def test_two_processes_train_like_one_on_the_whole_batch(processes, dtype, tmp_path):
    """Both like torch.nn on the whole batch."""
    loss_bound, parameter_bound = bounds(dtype)
    losses, saved = tmp_path / "losses.json", tmp_path / "parameters.pt"
    for _ in range(TRIES):
        code, output = run([*SIZES, "--dtype", dtype, "--json", losses, "--save", saved], processes)
        if ABORTED not in output:
            break
    assert code == 0, output
    assert output.count("step    0") == 1, output  # one process speaks, however many there are
    written = json.loads(losses.read_text())
    assert written["processes"] == (processes or 1)
    actual = difference(np.array(written["losses"]), np.array(exact().losses), 0, loss_bound)
    assert actual is None, f"losses{actual}"
    # The parameters are plain tensors: whoever loads them needs nothing of ours.
    parameters = torch.load(saved, weights_only=True)
    assert parameters.keys() == exact().parameters.keys()
    for name, expected in exact().parameters.items():
        assert parameters[name].dtype == getattr(torch, dtype)
        actual = difference(parameters[name].numpy(), expected, 0, parameter_bound)
        assert actual is None, f"{name}{actual}"


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(train_ddp, "process_group", lambda: nullcontext((0, 2)))
    monkeypatch.setattr(sys, "argv", ["train_ddp", *map(str, SIZES), "--batch", "7"])
    with pytest.raises(SystemExit, match="--batch 7 cannot be divided evenly among 2 processes"):
        train_ddp.main()


# What follows runs in two processes that multiprocessing starts: they import this file and run one check after another.

T, N, I, H = 6, 4, 5, 9


class Net(nn.Module):
    """Two directions, two layers, a layer that may go unused, and a head."""

    def __init__(self, layer):
        super().__init__()
        self.rnn = layer(I, H, 2, bidirectional=True)
        self.spare = layer(I, H)
        self.head = nn.Linear(2 * H, 3)

    def forward(self, x, lengths=None, spare=False):
        data = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
        y = self.rnn(data)[0]
        score = self.head(y if lengths is None else y.data).square().sum()
        return score + self.spare(x)[0].square().sum() if spare else score


def joined_batch():
    """Sequences of all processes: the first half for the first one."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, 2 * N, I, generator=generator), torch.randint(1, T + 1, (2 * N,), generator=generator)


def make_net(layer):
    torch.manual_seed(2)
    return Net(layer)


def part(rank, count=2):
    """Which sequences are whose."""
    return slice(rank * 2 * N // count, (rank + 1) * 2 * N // count)


def assert_averaged(net, plain, **options):
    """The gradients are those of torch.nn, in float64, on the joined batch, shared out between two."""
    oracle = Net(plain).double()
    oracle.load_state_dict(net.state_dict())
    x, lengths = joined_batch()
    oracle(x.double(), **{"lengths": lengths, **options}).backward()
    spec = RNNSpec("gru" if plain is nn.GRU else "lstm", I, H, 2, bidirectional=True)
    expected = {name: p.grad / 2 for name, p in oracle.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, parameter in net.named_parameters():
        if name not in expected:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        limits = gradient_tolerance(np.float32, spec, T, 2 * N, scale)
        actual = difference(parameter.grad.numpy(), expected[name].numpy(), *limits)
        assert actual is None, f"{name}{actual}"


def gradients_go_through_the_buckets(rank):
    """Small buckets: each is reduced as soon as its gradients are there, and every parameter is in one of them."""
    x, lengths = joined_batch()
    for as_view in (False, True):
        net = make_net(LSTM)
        model = DistributedDataParallel(net, bucket_cap_mb=0.001, gradient_as_bucket_view=as_view)
        seen = []

        def hook(_, bucket, seen=seen):
            seen.append([id(p) for p in bucket.parameters()])
            return allreduce_hook(distributed.group.WORLD, bucket)

        model.register_comm_hook(None, hook)
        for step in range(3):
            model.zero_grad()
            seen.clear()
            model(x[:, part(rank)], lengths[part(rank)], spare=True).backward()
            assert len(seen) > 2 or step == 0  # DDP makes small buckets once it knows in which order gradients come
            assert sorted(chain(*seen)) == sorted(id(p) for p in net.parameters())
            assert_averaged(net, nn.LSTM, spare=True)


def some_parameters_go_unused(rank):
    """One process uses the spare layer, the other does not; then neither does."""
    x, lengths = joined_batch()
    net = make_net(GRU)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    model(x[:, part(rank)], lengths[part(rank)], spare=rank == 0).backward()
    assert net.spare.weight_hh_l0.grad.any()
    model.zero_grad()
    model(x[:, part(rank)], lengths[part(rank)]).backward()
    assert_averaged(net, nn.GRU)


def gradients_add_up_without_sync(rank):
    """Two small batches in each process, and the processes meet once."""
    x, lengths = joined_batch()
    net = make_net(LSTM)
    model = DistributedDataParallel(net)
    for _ in range(2):
        model.zero_grad()
        with model.no_sync():
            model(x[:, part(2 * rank, 4)], lengths[part(2 * rank, 4)], spare=True).backward()
        model(x[:, part(2 * rank + 1, 4)], lengths[part(2 * rank + 1, 4)], spare=True).backward()
        assert_averaged(net, nn.LSTM, spare=True)


def an_accelerated_model_is_wrapped(rank):
    """Layers that were torch.nn's own, before DDP saw them; unpacked, with a static graph."""
    x, _ = joined_batch()
    net = make_net(nn.GRU)
    accelerate(net)
    assert type(net.rnn) is not nn.GRU
    model = DistributedDataParallel(net, static_graph=True)
    for _ in range(2):
        model.zero_grad()
        model(x[:, part(rank)], spare=True).backward()
        assert_averaged(net, nn.GRU, lengths=None, spare=True)


CHECKS = [
    gradients_go_through_the_buckets,
    some_parameters_go_unused,
    gradients_add_up_without_sync,
    an_accelerated_model_is_wrapped,
]


def work(rank, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT)
    )
    try:
        for check in CHECKS:
            check(rank)
            distributed.barrier()
    finally:
        distributed.destroy_process_group()


def test_gradients(tmp_path):
    """All checks in one pair of processes: what takes time is to start them."""
    context = torch.multiprocessing.spawn(work, ((tmp_path / "meeting").as_uri(),), nprocs=2, join=False)
    try:
        # Either call raises what a process raised, with its traceback; the last waits for both.
        while not context.join(timeout=LIMIT):
            assert any(not process.is_alive() for process in context.processes), "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in context.processes] == [0, 0]
