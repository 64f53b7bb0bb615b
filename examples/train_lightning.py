"""Trains the forecaster of train_ddp.py with Lightning, in one process or more, on one machine or more.

    python -m examples.train_lightning --processes 2

The model is made of torch.nn's layers. One line replaces them by this package's layers: ``fusedrnn.torch.accelerate``.
"""

from __future__ import annotations

import argparse
import json

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedrnn.torch
from examples.train_ddp import Forecaster, parse, training_parser, waves


class Training(lightning.LightningModule):
    """The model, its data, its loss and its optimizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.network = Forecaster(args.hidden, nn.LSTM)
        print(fusedrnn.torch.accelerate(self.network))  # the line that differs
        self.args = args
        self.losses: list[float] = []

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """This process's part of each batch. The batches do not depend on the number of processes."""
        args, rank, processes = self.args, self.trainer.global_rank, self.trainer.world_size
        batches = [waves(args.batch, args.length, args.seed + step) for step in range(args.steps)]
        data = TensorDataset(torch.cat(batches))
        return DataLoader(data, args.batch // processes, sampler=range(rank, len(data), processes))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of this process's part of a batch; Lightning averages the gradients."""
        (data,) = batch
        loss = nn.functional.mse_loss(self.network(data[:, :-1]), data[:, 1:])
        self.losses.append(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of train_ddp.py."""
        return torch.optim.SGD(self.parameters(), lr=self.args.lr, momentum=0.9)


def main() -> None:
    """Train, and print the losses."""
    parser = training_parser("Trains a forecaster with Lightning.")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="on each host")
    args = parse(parser)
    if args.batch % (args.hosts * args.processes):
        parser.error(f"--batch {args.batch} cannot be divided evenly among {args.hosts * args.processes} processes")
    lightning.seed_everything(args.seed, verbose=False)
    strategy = "ddp" if args.hosts * args.processes > 1 else "auto"
    trainer = lightning.Trainer(
        accelerator="cpu", num_nodes=args.hosts, devices=args.processes, strategy=strategy, max_epochs=1,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    training = Training(args)
    trainer.fit(training)
    if trainer.is_global_zero:
        print(json.dumps({"processes": trainer.world_size, "losses": training.losses}))
    if distributed.is_initialized():  # Lightning leaves gloo's threads running, which may abort the exit
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
