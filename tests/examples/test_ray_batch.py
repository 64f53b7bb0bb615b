"""Batch inference with Ray Data: no row is lost or repeated when a worker or the whole job is killed."""

from __future__ import annotations

import os
import re
import signal
import tempfile

import numpy as np
import pytest

from process_trees import running

pytest.importorskip("ray", reason="needs Ray")
pa, pq = (pytest.importorskip(name, reason="needs pyarrow") for name in ("pyarrow", "pyarrow.parquet"))
ray_batch = pytest.importorskip("examples.ray_batch")

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


def assert_encoded_once(folder):
    """Each id once, with the bits that this process computes of all sequences together."""
    inputs = pq.read_table(folder / "input", columns=["id", "values"]).to_pydict()
    outputs = pq.read_table(folder / "output").to_pydict()
    assert sorted(outputs["id"]) == sorted(inputs["id"]) == list(range(SHARDS * ROWS))
    encoder = ray_batch.Encoder.load(folder / "encoder.npz")
    sequences = [np.array(values, np.float32).reshape(-1, 3) for values in inputs["values"]]
    expected = dict(zip(inputs["id"], encoder.encode(sequences, len(sequences)), strict=True))
    assert len({len(sequence) for sequence in sequences}) > 10
    actual = np.array(outputs["encoding"], np.float32)
    assert actual.any(axis=1).sum() > 100  # a sequence without steps has zeros
    assert actual.tobytes() == np.array([expected[name] for name in outputs["id"]]).tobytes()


def test_killed_jobs_and_workers(data, ray_folder, monkeypatch, capsys):
    """The whole job is killed and started again; then a worker is killed. Threads and batches differ."""
    environment = {"RAY_TMPDIR": ray_folder, "HOME": ray_folder}
    line = r"(\d+) of 24 shards .* process (\d+)$"
    with running(SCRIPT, "run", data, "--workers", 1, "--batch", 4, **environment) as job:
        job.wait_for(line)
        job.wait_for(line)
        job.kill()
    before = {path: path.stat().st_mtime_ns for path in data.glob("output/[!.]*")}
    assert 2 <= len(before) < SHARDS
    (data / "output" / ".part-00003-0005.parquet.0").write_bytes(b"what a killed worker may leave")
    with running(SCRIPT, "run", data, "--workers", 1, "--threads", 2, "--batch", 5, **environment) as job:
        assert int(job.wait_for(r"24 shards, (\d+) of them finished before")[1]) == len(before)
        worker = int(job.wait_for(line)[2])
        os.kill(worker, signal.SIGKILL)
        output = job.finish()
    workers = [int(process) for _, process in re.findall(line, output, re.MULTILINE)]
    # The worker may be killed between writing a shard and saying so.
    assert SHARDS - len(before) - len(workers) in (0, 1)
    assert workers[0] == worker != workers[-1]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_encoded_once(data)
    call(monkeypatch, "verify", data)
    assert "144 ids, each once, with the bits of one process" in capsys.readouterr().out


def encode_all(folder):
    """What the workers do, in this process."""
    (folder / "output").mkdir()
    encoder = ray_batch.Encoder.load(folder / "encoder.npz")
    for shard in ray_batch.shards(folder):
        ids, sequences = shard.read(3)
        shard.write(ids, encoder.encode(sequences, 3))


def finished(folder):
    return [shard.is_finished() for shard in ray_batch.shards(folder)]


def test_what_counts_as_finished(data, monkeypatch):
    """Other threads and batches do not matter; another encoder does, and so does other input."""
    assert not any(finished(data))
    encode_all(data)
    assert all(finished(data))
    assert_encoded_once(data)
    first = next(data.glob("input/*-00001.parquet"))
    table = pq.read_table(first)
    values = table["values"].to_pylist()
    values[7][0] += 100  # in the second row group
    changed = table.set_column(1, "values", pa.array(values, table["values"].type))
    pq.write_table(changed, first, row_group_size=ROWS)
    assert finished(data)[:6] == [True] * 6 and finished(data)[7] is False
    call(monkeypatch, "make-data", data, "--features=3", "--hidden=17", "--files=1", "--rows=1", "--compute=int8")
    assert not any(finished(data))


def test_an_interrupted_write_leaves_nothing(data, monkeypatch):
    encode_all(data)
    before = {path: path.read_bytes() for path in data.glob("output/*")}

    def write_a_part(table, file):
        file.write(b"PAR1")
        raise OSError("no space left on device")

    shard = next(ray_batch.shards(data))
    ids, sequences = shard.read(3)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(pq, "write_table", write_a_part)
        shard.write(ids, np.zeros((len(sequences), 34), np.float32))
    assert {path: path.read_bytes() for path in data.glob("output/*")} == before


def test_verify_finds_what_is_wrong(data, monkeypatch):
    encode_all(data)
    path = data / "output" / "part-00002-0001.parquet"
    good = path.read_bytes()
    table = pq.read_table(path)
    encodings = np.array(table["encoding"].to_pylist(), np.float32)
    encodings[3, 5] = np.nextafter(encodings[3, 5], np.float32(2))
    column = pa.FixedSizeListArray.from_arrays(pa.array(encodings.ravel()), 34)
    pq.write_table(table.set_column(1, "encoding", column), path)
    with pytest.raises(SystemExit, match=r"part-00002-0001.parquet is not what one process computes"):
        call(monkeypatch, "verify", data)
    path.unlink()
    with pytest.raises(SystemExit, match=r"part-00002-0001.parquet is missing"):
        call(monkeypatch, "verify", data)
    path.write_bytes(good)
    path.with_name("part-00009-0000.parquet").write_bytes(good)
    with pytest.raises(SystemExit, match=r"no shard has the output .*part-00009-0000.parquet"):
        call(monkeypatch, "verify", data)


def test_a_row_that_is_no_sequence_is_named(data):
    shard = next(ray_batch.shards(data))
    with pytest.raises(ValueError, match=r"the values of id [0-5] are not a whole number of steps of 61"):
        shard.read(61)


def test_folders_without_data(data, monkeypatch, capsys):
    """Before Ray starts."""
    missing = data / "missing"
    (data / "encoder.npz").rename(data / "encoder")
    for command, folder in (("run", missing), ("verify", missing), ("verify", data), ("run", data / "encoder")):
        with pytest.raises(SystemExit):
            call(monkeypatch, command, folder)
        message = f"{folder} must have encoder.npz and input/*.parquet, which make-data writes"
        assert message in capsys.readouterr().err
    (data / "encoder").rename(data / "encoder.npz")
    for file in (data / "input").iterdir():
        file.unlink()
    with pytest.raises(SystemExit):
        call(monkeypatch, "verify", data)
    assert "must have encoder.npz and input/*.parquet" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "least"), [("--seed", 0), ("--rows", 1)])
def test_numbers_out_of_range(option, least, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "make-data", tmp_path, option, least - 1)
    assert f"{option} must be at least {least}" in capsys.readouterr().err
