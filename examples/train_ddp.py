"""Trains a forecaster in several processes on one machine, with DistributedDataParallel over gloo.

    torchrun --nproc-per-node 2 examples/train_ddp.py     # two processes, half of each batch in either
    python examples/train_ddp.py                          # one process, the whole batch

Both print the same losses, but for rounding. The task: the next value of a sum of two sine waves, whose frequencies
and phases differ from sequence to sequence, so that they must be found out from what came before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from torch.nn.parallel import DistributedDataParallel

import torch
from fusedrnn.torch import LSTM
from torch import Tensor, distributed, nn


class Forecaster(nn.Module):
    """Says what comes next, at each step of each sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = LSTM(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts (N, T) of what follows each value of x (N, T)."""
        y, _ = self.rnn(x.unsqueeze(-1))
        # The wave goes on from where it is: the network says by how much it changes.
        change: Tensor = self.head(y).squeeze(-1)
        return x + change


def waves(batch: int, length: int, seed: int) -> Tensor:
    """Sums of two sine waves, float32 (batch, length + 1); the same for the same seed in whatever process."""
    generator = torch.Generator().manual_seed(seed)
    pace, phase, height = torch.rand(3, batch, 2, 1, generator=generator, dtype=torch.float64)
    angles = (0.2 + 0.6 * pace) * torch.arange(length + 1) + 2 * math.pi * phase
    sums: Tensor = ((0.5 + 0.5 * height) * angles.sin()).sum(1)
    return sums.float()


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """This process's rank and the number of processes; 0 and 1 if torchrun did not start it."""
    if not distributed.is_torchelastic_launched():
        yield 0, 1
        return
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
        distributed.barrier()  # gloo's threads have let go of every tensor before Python may end
    finally:
        distributed.destroy_process_group()


def total_loss(loss: Tensor, processes: int) -> float:
    """The loss on the joined batch: the mean over the processes, which all have equally many sequences."""
    loss = loss.detach().clone()
    if processes > 1:
        distributed.all_reduce(loss)
    return loss.item() / processes


def train(args: argparse.Namespace, rank: int, processes: int) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the parameters after the last."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)  # the same first weights in all processes, as DDP would see to itself
    network = Forecaster(args.hidden).to(dtype)
    model = DistributedDataParallel(network) if processes > 1 else network
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    losses = []
    for step in range(args.steps):
        # Each process makes the joined batch and takes its part of it.
        joined = waves(args.batch, args.length, args.seed + step).to(dtype)
        data = joined[rank::processes]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data[:, :-1]), data[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]  # DDP averages the gradients meanwhile
        optimizer.step()
        losses.append(total_loss(loss, processes))
        if rank == 0 and (step % args.report == 0 or step == args.steps - 1):
            still = nn.functional.mse_loss(joined[:, :-1], joined[:, 1:]).item()
            print(f"step {step:4}  loss {losses[-1]:.6f}  (a forecast of no change: {still:.6f})", flush=True)
    return losses, network.state_dict()


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Trains a forecaster in one process, or in several under torchrun.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step, of all processes together")
    parser.add_argument("--length", type=int, default=64, help="time steps of a sequence")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads-per-process", type=int, help="default: the processors, shared out")
    parser.add_argument("--report", type=int, default=20, metavar="STEPS", help="how often to print the loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained parameters here")
    args = parser.parse_args()
    for name in ("steps", "batch", "length", "hidden", "report"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main() -> None:
    """Train, and write down what is asked for."""
    args = options()
    with process_group() as (rank, processes):
        if args.batch % processes:
            raise SystemExit(f"--batch {args.batch} cannot be shared out evenly among {processes} processes")
        # torchrun starts every process with one thread; more of them than processors would wait for each other.
        threads = args.threads_per_process or max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)
        if rank == 0:
            print(f"{processes} process(es), {threads} thread(s) each, {args.batch // processes} sequences each")
        losses, parameters = train(args, rank, processes)
        if rank == 0 and args.json:
            args.json.write_text(json.dumps({"processes": processes, "threads": threads, "losses": losses}))
        if rank == 0 and args.save:
            torch.save(parameters, args.save)


if __name__ == "__main__":
    main()
