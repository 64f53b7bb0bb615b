"""Trains a forecaster in several processes on one machine, with DistributedDataParallel over gloo.

    torchrun --nproc-per-node 2 examples/train_ddp.py     # two processes, each with half of the batch
    python examples/train_ddp.py                          # one process with the whole batch

Both print the same losses except for rounding. The task is to predict the next value of a sum of two sine waves. Their
frequencies and phases differ between sequences, so that the network must infer them from earlier values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fusedrnn.torch import LSTM


class Forecaster(nn.Module):
    """Predicts the next value at each step of each sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = LSTM(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts (N, T) of the value after each value of x (N, T)."""
        y, _ = self.rnn(x.unsqueeze(-1))
        # The network predicts the change of the value.
        change: Tensor = self.head(y).squeeze(-1)
        return x + change


def waves(batch: int, length: int, seed: int) -> Tensor:
    """Sums of two sine waves, float32 (batch, length + 1); the same seed gives the same waves in every process."""
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
        distributed.barrier()  # gloo's threads must release every tensor before Python exits
    finally:
        distributed.destroy_process_group()


def total_loss(loss: Tensor, processes: int) -> float:
    """The loss on the whole batch: the mean over the processes, which have equally many sequences."""
    loss = loss.detach().clone()
    if processes > 1:
        distributed.all_reduce(loss)
    return loss.item() / processes


def train(args: argparse.Namespace, rank: int, processes: int) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the final parameters."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)  # the same initial weights in all processes
    network = Forecaster(args.hidden).to(dtype)
    model = DistributedDataParallel(network) if processes > 1 else network
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    losses = []
    for step in range(args.steps):
        # Each process generates the whole batch and takes its part.
        batch = waves(args.batch, args.length, args.seed + step).to(dtype)
        data = batch[rank::processes]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data[:, :-1]), data[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]  # DDP averages the gradients here
        optimizer.step()
        losses.append(total_loss(loss, processes))
        if rank == 0 and (step % args.report == 0 or step == args.steps - 1):
            still = nn.functional.mse_loss(batch[:, :-1], batch[:, 1:]).item()
            print(f"step {step:4}  loss {losses[-1]:.6f}  (a forecast of no change: {still:.6f})", flush=True)
    return losses, network.state_dict()


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Trains a forecaster in one process, or in several under torchrun.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step, over all processes")
    parser.add_argument("--length", type=int, default=64, help="time steps of a sequence")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads-per-process", type=int, help="default: the processors divided by the processes")
    parser.add_argument("--report", type=int, default=20, metavar="STEPS", help="how often to print the loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained parameters here")
    args = parser.parse_args()
    for name in ("steps", "batch", "length", "hidden", "report"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main() -> None:
    """Train, and write the requested files."""
    args = options()
    with process_group() as (rank, processes):
        if args.batch % processes:
            raise SystemExit(f"--batch {args.batch} cannot be divided evenly among {processes} processes")
        # torchrun sets one thread a process; more threads than processors in total would wait for each other.
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
