"""Batch inference with Ray Data: no row is lost or repeated when a worker or the whole job is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="needs Ray")
pa = pytest.importorskip("pyarrow", reason="needs pyarrow")

import pyarrow.parquet as pq

from examples import ray_batch
from process_trees import running

SCRIPT = ray_batch.__file__
SHARDS, ROWS = 24, 6


@pytest.fixture
def ray_folder():
    """Ray's files: sockets' paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["ray_batch.py", *map(str, arguments)])
    options = ray_batch.options()
    options.function(options)


@pytest.fixture
def data(tmp_path, monkeypatch):
    sizes = {"files": 4, "rows": SHARDS * ROWS // 4, "row-group": ROWS, "length": 20, "features": 3, "hidden": 17}
    call(monkeypatch, "make-data", tmp_path, *(f"--{name}={value}" for name, value in sizes.items()))
    return tmp_path
