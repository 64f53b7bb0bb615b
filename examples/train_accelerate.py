"""Trains the forecaster of train_ddp.py with Hugging Face Accelerate, in one process or more, on one machine or more.

    python -m examples.train_accelerate
    torchrun --nproc-per-node 2 -m examples.train_accelerate

The model is made of torch.nn's layers. One line replaces them by this package's layers: ``fusedrnn.torch.accelerate``.
That function and Hugging Face's library only have the name in common.
"""

from __future__ import annotations

import json

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedrnn.torch
from examples.train_ddp import Forecaster, parse, threads_per_process, training_parser, waves


def main() -> None:
    """Train, and print the losses."""
    args = parse(training_parser("Trains a forecaster with Hugging Face Accelerate."))
    torch.set_num_threads(threads_per_process())
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    set_seed(args.seed)
    network = Forecaster(args.hidden, nn.LSTM)
    print(fusedrnn.torch.accelerate(network))  # the line that differs; it must precede prepare, which wraps the model
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9)
    data = torch.cat([waves(args.batch, args.length, args.seed + step) for step in range(args.steps)])
    loader = DataLoader(TensorDataset(data), batch_size=args.batch)  # each process gets its part of a batch
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    losses = []
    for (part,) in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(part[:, :-1]), part[:, 1:])
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, "losses": losses}))
    # Gloo's threads must release every tensor, and the model its process group, before Python exits.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
