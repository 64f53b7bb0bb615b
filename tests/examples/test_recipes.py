"""Lightning and Hugging Face Accelerate train in two processes as torch.nn does in one, to within rounding."""

from __future__ import annotations

import importlib
import json
import re

import numpy as np
import pytest
import torch

from forecasts import SIZES, bounds, exact
from fusedrnn.testing.tolerance import difference
from process_trees import running

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", 2]
COMMANDS = {
    "lightning": ["-m", "examples.train_lightning", "--processes", 2],
    "accelerate": [*TORCHRUN, "-m", "examples.train_accelerate"],
}


@pytest.mark.parametrize("library", COMMANDS)
def test_two_processes_train_like_one(library):
    pytest.importorskip(library, reason=f"needs {library}")
    with running(*COMMANDS[library], *SIZES, **LOOPBACK) as command:
        output = command.finish()
    assert output.count("1 replaced, 0 unchanged") == 2  # in each process
    written = json.loads(re.search(r"^{.*}$", output, re.MULTILINE)[0])
    assert written["processes"] == 2
    actual = difference(np.array(written["losses"]), np.array(exact().losses), 0, bounds("float32")[0])
    assert actual is None, f"losses{actual}"


@pytest.mark.parametrize("library", COMMANDS)
def test_numbers_out_of_range(library, monkeypatch, capsys):
    pytest.importorskip(library, reason=f"needs {library}")
    main = importlib.import_module(f"examples.train_{library}").main
    cases = {"--steps 0": "--steps must be at least 1; got 0", "--lr inf": "--lr must be above 0 and finite; got inf"}
    if library == "lightning":
        cases["--hosts -1"] = "--hosts must be at least 1; got -1"
        cases["--batch 3 --processes 2"] = "--batch 3 cannot be divided evenly among 2 processes"
    for arguments, message in cases.items():
        monkeypatch.setattr("sys.argv", [library, *arguments.split()])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
