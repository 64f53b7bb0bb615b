"""The training in several processes: on two hosts, which are two torchrun here, and after a process was killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys

import numpy as np
import pytest
import torch

from examples import train_ddp
from process_trees import running

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
SIZES = ["--batch", 4, "--length", 9, "--hidden", 17, "--lr", 0.05, "--seed", 3, "--threads-per-process", 1]
STEPS = 400
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def two_hosts(folder, *arguments):
    """Two torchrun of one process each, which share no files."""
    endpoint = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    command = [*TORCHRUN, "--nnodes", 2, *endpoint, "--max-restarts", 2, train_ddp.__file__, *SIZES, "--steps", STEPS]
    with contextlib.ExitStack() as stack:
        hosts = []
        for name in ("first", "second"):
            (folder / name).mkdir()
            files = ["--json", folder / name / "losses.json", "--checkpoint", folder / name / "training.pt"]
            hosts.append(stack.enter_context(running(*command, *arguments, *files, **LOOPBACK)))
        yield hosts


def uninterrupted(processes):
    """The losses of so many processes, whose gradients this one computes in turn and averages."""
    torch.manual_seed(3)
    model = train_ddp.Forecaster(17)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch = train_ddp.waves(4, 9, 3 + step)
        optimizer.zero_grad()
        parts = []
        for rank in range(processes):
            data = batch[rank::processes]
            loss = torch.nn.functional.mse_loss(model(data[:, :-1]), data[:, 1:])
            (loss / processes).backward()  # a power of two: as exact as to divide the gradients
            parts.append(loss.item())
        optimizer.step()
        losses.append(np.add(*np.float32(parts)).item() / processes)
    return losses


def test_a_killed_process_changes_no_bit(tmp_path):
    """That of rank 0, which writes the checkpoints; the two hosts have none in common."""
    with two_hosts(tmp_path, "--checkpoint-every", 7, "--report", 5) as hosts:
        places = [host.wait_for(r"rank (\d) of 2 is process (\d+) .*: 1 thread\(s\), 2 sequences") for host in hosts]
        first = [place[1] for place in places].index("0")
        hosts[first].wait_for(r"step   20 ")
        os.kill(int(places[first][2]), signal.SIGKILL)
        output = "".join(host.finish() for host in hosts)
    (continued,) = re.findall(r"continues after (\d+) steps", output)
    assert 14 <= int(continued) < STEPS
    (written,) = tmp_path.glob("*/losses.json")  # by rank 0, wherever it was in the end
    assert json.loads(written.read_text())["losses"] == uninterrupted(2)


def train(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_ddp.py", *map(str, [*SIZES, *arguments])])
    return train_ddp.train(train_ddp.options(), 0, 1)


def test_training_continues_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    file = tmp_path / "training.pt"
    expected, parameters = train(monkeypatch, "--steps", 12)
    first, _ = train(monkeypatch, "--steps", 5, "--checkpoint", file)
    assert first == expected[:5]
    actual, continued = train(monkeypatch, "--steps", 12, "--checkpoint", file)
    assert "continues after 5 steps" in capsys.readouterr().out
    assert actual == expected
    assert all(torch.equal(continued[name], parameters[name]) for name in parameters)
    with pytest.raises(SystemExit, match="is of another training"):
        train(monkeypatch, "--steps", 12, "--lr", 0.04, "--checkpoint", file)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK", "a list", "other keys"])
def test_a_file_that_is_no_checkpoint(content, tmp_path, monkeypatch):
    file = tmp_path / "training.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save([1.0] if content == "a list" else {"weight": 1.0}, file)
    message = "is of another training: it has no settings" if content == "other keys" else "is not a checkpoint"
    with pytest.raises(SystemExit, match=rf"training.pt {message}"):
        train(monkeypatch, "--steps", 1, "--checkpoint", file)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", 0, "--steps must be at least 1; got 0"),
        ("--threads-per-process", 0, "--threads-per-process must be at least 1; got 0"),
        ("--checkpoint-every", -3, "--checkpoint-every must be at least 1; got -3"),
        ("--lr", "nan", "--lr must be above 0 and finite; got nan"),
        ("--lr", 0, "--lr must be above 0 and finite; got 0.0"),
        ("--seed", -1, "--seed must be from 0 to 4294967295; got -1"),
        ("--seed", 2**32, "--seed must be from 0 to 4294967295; got 4294967296"),
    ],
)
def test_numbers_out_of_range(option, value, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train(monkeypatch, option, value)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--checkpoint", "--json", "--save"])
def test_files_that_cannot_be_written(option, tmp_path, monkeypatch):
    """The training does not begin."""
    monkeypatch.setattr(train_ddp, "train", None)
    for file, message in (
        (tmp_path / "missing" / "file", r"missing/file: there is no folder .*missing"),
        (tmp_path, r": it is a folder; expected the path of a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", option, str(file)])
        with pytest.raises(SystemExit, match=option + ".*" + message):
            train_ddp.main()


def test_an_interrupted_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "training.pt"
    train_ddp.write_checkpoint(file, {"losses": [1.0]})

    def save_a_part(checkpoint, file):
        file.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", save_a_part)
    with pytest.raises(OSError, match="no space"):
        train_ddp.write_checkpoint(file, {"losses": [1.0, 0.5]})
    assert train_ddp.read_checkpoint(file, 1) == {"losses": [1.0]}
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(("local", "threads"), [("1", 6), ("2", 3), ("4", 1), ("8", 1)])
def test_processes_share_the_processors_of_their_host(local, threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert train_ddp.threads_per_process() == threads
