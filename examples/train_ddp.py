"""Trains a forecaster in several processes, on one machine or more, with DistributedDataParallel over gloo.

    python examples/train_ddp.py                          # one process with the whole batch
    torchrun --nproc-per-node 2 examples/train_ddp.py     # two processes, each with half of the batch

On each of two hosts, with an address of the first host that both can reach:

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id forecaster \
        --max-restarts 3 examples/train_ddp.py --checkpoint forecaster.pt

All of these print the same losses except for rounding. If a process is killed, torchrun starts all of them again, and
they continue from the last checkpoint. The results have the bits of a training without interruption.

The task is to predict the next value of a sum of two sine waves. Their frequencies and phases differ between sequences,
so the network must infer them from earlier values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fusedrnn.torch import LSTM


class Forecaster(nn.Module):
    """Predicts the next value at each step of each sequence.

    Args:
        hidden: Hidden units of each layer.
        layer: The class of the recurrent layers, this package's or torch.nn's.
    """

    def __init__(self, hidden: int, layer: type[nn.LSTM] = LSTM) -> None:
        super().__init__()
        self.rnn = layer(1, hidden, num_layers=2, batch_first=True)
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
    """The loss on the whole batch: the mean over the processes, which have equal numbers of sequences."""
    loss = loss.detach().clone()
    if processes > 1:
        distributed.all_reduce(loss)
    return loss.item() / processes


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings on which the losses depend. Those of a checkpoint must be equal."""
    return {name: getattr(args, name) for name in ("batch", "length", "hidden", "lr", "seed", "dtype")}


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write the file as a whole or not at all, even if a process is killed meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a file that :func:`write_checkpoint` wrote; the process ends if it is another file."""
    try:
        checkpoint = torch.load(path, weights_only=True)
    except Exception as error:  # bytes of other files lead to errors of many kinds
        raise SystemExit(f"{path} is not a checkpoint: {type(error).__name__} {error}".rstrip()) from None
    if not isinstance(checkpoint, dict):
        raise SystemExit(f"{path} is not a checkpoint; it has a {type(checkpoint).__name__}")
    return checkpoint


def read_checkpoint(path: Path | None, processes: int) -> dict[str, Any] | None:
    """The newest checkpoint that any of the processes finds, in all of them; None if there is none.

    Rank 0 writes checkpoints. After a restart it may be on another host, without the disk of the first host.
    """
    checkpoint = load_checkpoint(path) if path and path.exists() else None
    if processes == 1:
        return checkpoint
    steps: list[int] = [0] * processes
    distributed.all_gather_object(steps, len(checkpoint["losses"]) if checkpoint else 0)
    if not any(steps):
        return None
    checkpoints = [checkpoint]
    distributed.broadcast_object_list(checkpoints, src=steps.index(max(steps)))
    return checkpoints[0]


def train(args: argparse.Namespace, rank: int, processes: int) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the final parameters."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)  # the same initial weights in all processes
    network = Forecaster(args.hidden).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9)
    losses: list[float] = []
    if checkpoint := read_checkpoint(args.checkpoint, processes):
        if (other := checkpoint.get("settings")) != settings(args):
            raise SystemExit(f"{args.checkpoint} is of another training: {other or 'it has no settings'}")
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        losses = checkpoint["losses"]
        if rank == 0:
            print(f"continues after {len(losses)} steps", flush=True)
    model = DistributedDataParallel(network) if processes > 1 else network
    for step in range(len(losses), args.steps):
        # The batch depends on the step alone. Each process generates the whole batch and takes its part.
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
        if rank == 0 and args.checkpoint and ((step + 1) % args.checkpoint_every == 0 or step == args.steps - 1):
            states = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(args.checkpoint, {"settings": settings(args), "losses": losses, **states})
    return losses, network.state_dict()


def training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every training of the forecaster has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step, over all processes")
    parser.add_argument("--length", type=int, default=64, help="time steps of a sequence")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training. The process ends with an error of the parser if a number is out of range."""
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1 and name != "seed":
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0 and finite; got {args.lr}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}; got {args.seed}")
    return args


def check_files(args: argparse.Namespace) -> None:
    """End the process before the training if one of its files cannot be written after it."""
    for name in ("checkpoint", "json", "save"):
        path: Path | None = getattr(args, name)
        if path and not path.absolute().parent.is_dir():
            raise SystemExit(f"--{name} {path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise SystemExit(f"--{name} {path}: it is a folder; expected the path of a file")


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = training_parser("Trains a forecaster in one process, or in several under torchrun.")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads-per-process", type=int, help="default: a host's processors divided by its processes")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="continue from this file, and keep it current")
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--report", type=int, default=20, metavar="STEPS", help="how often to print the loss")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained parameters here")
    return parse(parser)


def threads_per_process() -> int:
    """This host's processors divided by its processes, since more threads in total would wait for each other."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def main() -> None:
    """Train, and write the requested files."""
    args = options()
    with process_group() as (rank, processes):
        if args.batch % processes:
            raise SystemExit(f"--batch {args.batch} cannot be divided evenly among {processes} processes")
        if rank == 0:  # which writes them
            check_files(args)
        threads = args.threads_per_process or threads_per_process()
        torch.set_num_threads(threads)  # torchrun sets one
        place = f"rank {rank} of {processes} is process {os.getpid()} on {socket.gethostname()}"
        print(f"{place}: {threads} thread(s), {args.batch // processes} sequences of a batch", flush=True)
        losses, parameters = train(args, rank, processes)
        if rank == 0 and args.json:
            args.json.write_text(json.dumps({"processes": processes, "threads": threads, "losses": losses}))
        if rank == 0 and args.save:
            torch.save(parameters, args.save)


if __name__ == "__main__":
    main()
