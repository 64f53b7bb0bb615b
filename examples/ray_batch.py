"""Encodes sequences in Parquet files with Ray Data, on one machine or on all machines of a cluster.

    python examples/ray_batch.py make-data DATA          # DATA/input/*.parquet and DATA/encoder.npz
    python examples/ray_batch.py run DATA --workers 2    # DATA/output/*.parquet
    python examples/ray_batch.py verify DATA

The unit of work is a shard, one row group of one input file. A worker reads it, encodes its sequences, and writes one
output file, which has a name derived from the shard's, and appears by an atomic rename. So nothing is lost or repeated:

- If a worker is killed, Ray starts another and gives it the shard again. It writes the same file.
- If the whole job is killed, start it again. Shards whose output exists are skipped, unless the encoder or the input
  has changed.

A sequence's encoding has the same bits for any batch, padding and number of threads, so these may change between runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import fusedrnn

Floats = NDArray[np.float32]

_KEY = b"fusedrnn.shard_key"


@dataclass(frozen=True)
class Encoder:
    """Encodes a sequence as the final hidden states of the last layer, with both directions concatenated.

    Attributes:
        op: The operator.
        params: Its parameters, frozen or quantized, so that no call checks them for changes.
    """

    op: fusedrnn.RNNOp
    params: Any

    @classmethod
    def load(cls, path: Path) -> Encoder:
        """The encoder in a file that ``make-data`` wrote."""
        with np.load(path) as file:
            (features, hidden), compute, params = file["sizes"].tolist(), str(file["compute"]), file["params"]
        op = fusedrnn.RNNOp(fusedrnn.RNNSpec("gru", features, hidden, bidirectional=True, compute=compute or None))
        return cls(op, op.quantize(params) if compute.startswith("int8") else fusedrnn.frozen(params))

    def encode(self, sequences: Sequence[Floats], batch: int) -> Floats:
        """The encodings (N, 2·H) of N sequences (steps, I), computed in batches of sequences of similar length."""
        spec = self.op.spec
        lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        encodings = np.empty((len(sequences), 2 * spec.hidden_size), np.float32)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            x = np.zeros((max(1, lengths[chosen].max()), len(chosen), spec.input_size), np.float32)  # (T, N, I)
            for column, index in enumerate(chosen):
                x[: lengths[index], column] = sequences[index]
            _, states, _ = self.op.forward(x, self.params, lengths=lengths[chosen])
            encodings[chosen] = np.concatenate(list(states[0][-2:]), axis=1)
        return encodings


@dataclass(frozen=True)
class Shard:
    """One row group of an input file.

    Attributes:
        path: The file. Ray Data stores all fields in columns.
        row_group: The number of the row group.
        rows: The number of sequences in it.
        key: A hash that changes whenever the encoder or the row group changes. It is written into the output.
    """

    path: str
    row_group: int
    rows: int
    key: str

    @property
    def output(self) -> Path:
        """The output file, in the folder ``output`` next to ``input``."""
        path = Path(self.path)
        return path.parents[1] / "output" / f"{path.stem}-{self.row_group:04}.parquet"

    def is_finished(self) -> bool:
        """Whether the output exists, with all rows, from this encoder and this input."""
        try:
            metadata = pq.read_metadata(self.output)
        except FileNotFoundError:
            return False
        return metadata.num_rows == self.rows and (metadata.metadata or {}).get(_KEY) == self.key.encode()

    def read(self, features: int) -> tuple[pa.Array, list[Floats]]:
        """The ids, and the sequences (steps, features), which are stored as flat lists. An error names a bad row."""
        with pq.ParquetFile(self.path) as file:
            table = file.read_row_group(self.row_group, columns=["id", "values"]).combine_chunks()
        ids, lists = table["id"].combine_chunks(), table["values"].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
        is_wrong = np.diff(offsets) % features != 0
        if lists.null_count or is_wrong.any():
            row = np.argmax(is_wrong | lists.is_null().to_numpy(zero_copy_only=False))
            raise ValueError(f"{self.path}: the values of id {ids[row]} are not a whole number of steps of {features}")
        return ids, [values[start:stop].reshape(-1, features) for start, stop in pairwise(offsets)]

    def write(self, ids: pa.Array, encodings: Floats) -> None:
        """Write the output under its name, as a whole or not at all, even if the machine loses power."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(encodings.ravel()), encodings.shape[1])
        table = pa.table({"id": ids, "encoding": column}).replace_schema_metadata({_KEY: self.key.encode()})
        # A worker that Ray assumes to be dead may still write, so each attempt has its own file.
        temporary = self.output.with_name(f".{self.output.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.output)
        finally:
            temporary.unlink(missing_ok=True)


def shards(folder: Path) -> Iterator[Shard]:
    """The shards of all input files, in order. This reads only the files' footers."""
    encoder = hashlib.sha256((folder / "encoder.npz").read_bytes()).hexdigest()
    for path in sorted((folder / "input").glob("*.parquet")):
        metadata = pq.read_metadata(path)
        for row_group in range(metadata.num_row_groups):
            content = metadata.row_group(row_group)
            # The hash is of sizes, offsets, and the smallest and largest value of each column.
            key = hashlib.sha256(f"{encoder} {content.to_dict()}".encode()).hexdigest()
            yield Shard(str(path), row_group, content.num_rows, key)


class Worker:
    """The actor that Ray Data starts. It holds the operator, and encodes one shard after another."""

    def __init__(self, folder: str, batch: int) -> None:
        import ray  # imported here, after start_ray has set variables

        # One thread for each processor that Ray has reserved for this actor.
        fusedrnn.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.encoder, self.batch = Encoder.load(Path(folder) / "encoder.npz"), batch
        self.name = f"{socket.gethostname()} process {os.getpid()}"

    def __call__(self, columns: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Encode the shards whose fields are in the columns. Returns what the progress shows of them."""
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        batch = [Shard(**dict(zip(columns, row, strict=True))) for row in rows]
        for shard in batch:
            ids, sequences = shard.read(self.encoder.op.spec.input_size)
            shard.write(ids, self.encoder.encode(sequences, self.batch))
        return {"output": [s.output.name for s in batch], "rows": columns["rows"], "worker": [self.name] * len(batch)}


def start_ray(args: argparse.Namespace) -> Any:
    """Join the cluster at ``--address``, or start Ray on this machine, only on the loopback interface."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not args.address:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # without clusters Ray listens on 127.0.0.1 only
    import ray

    if args.address:
        ray.init(address=args.address)
    else:
        processors = max(os.cpu_count() or 1, args.workers * args.threads)
        # Only names and counts go through Ray's object store, so the smallest store is enough.
        ray.init("local", num_cpus=processors, include_dashboard=False, object_store_memory=80 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def run(args: argparse.Namespace) -> None:
    """Encode every shard that is not finished."""
    everything = list(shards(args.folder))
    waiting = [shard for shard in everything if not shard.is_finished()]
    print(f"{len(everything)} shards, {len(everything) - len(waiting)} of them finished before", flush=True)
    (args.folder / "output").mkdir(exist_ok=True)
    if waiting:
        encode_shards(args, waiting, len(everything))
    for leftover in (args.folder / "output").glob(".*.parquet.*"):  # files of workers that were killed
        leftover.unlink(missing_ok=True)


def encode_shards(args: argparse.Namespace, waiting: list[Shard], total: int) -> None:
    """Encode the shards, and show the progress."""
    ray = start_ray(args)
    try:
        # Ray Data restarts actors and repeats their tasks without a limit: max_restarts=-1, max_task_retries=-1.
        results = ray.data.from_items([*map(asdict, waiting)], override_num_blocks=len(waiting)).map_batches(
            Worker, fn_constructor_args=(str(args.folder), args.batch), batch_size=1,
            num_cpus=args.threads, compute=ray.data.ActorPoolStrategy(size=args.workers),
        )  # fmt: skip
        done, rows, start = total - len(waiting), 0, time.perf_counter()
        for result in results.iter_rows():
            done, rows = done + 1, rows + result["rows"]
            progress = f"{done:4} of {total} shards  {rows / (time.perf_counter() - start):8.0f} sequences/s"
            print(f"{progress}  {result['output']} by {result['worker']}", flush=True)
    finally:
        ray.shutdown()


def verify(args: argparse.Namespace) -> None:
    """Check that each id has one encoding, with the bits that one thread computes from the sequence alone."""
    encoder = Encoder.load(args.folder / "encoder.npz")
    expected, seen = set(), []
    for shard in shards(args.folder):
        if not shard.is_finished():
            raise SystemExit(f"error: {shard.output} is missing, or of another encoder or input")
        ids, sequences = shard.read(encoder.op.spec.input_size)
        table = pq.read_table(shard.output).combine_chunks()
        actual = table["encoding"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
        with fusedrnn.thread_limits(1):
            alone = encoder.encode(sequences, batch=1)
        if not table["id"].combine_chunks().equals(ids) or actual.tobytes() != alone.tobytes():
            raise SystemExit(f"error: {shard.output} is not what one process computes")
        expected.add(shard.output)
        seen += ids.to_pylist()
    if len(seen) != len(set(seen)):
        raise SystemExit("error: an id occurs more than once")
    if strays := {*(args.folder / "output").iterdir()} - expected:
        raise SystemExit(f"error: no shard has the output {min(strays)}")
    print(f"{len(seen)} ids, each once, with the bits of one process")


def make_data(args: argparse.Namespace) -> None:
    """Write random sequences of different lengths, and an encoder. The same seed gives the same files."""
    (args.folder / "input").mkdir(parents=True, exist_ok=True)
    spec = fusedrnn.RNNSpec("gru", args.features, args.hidden, bidirectional=True)
    sizes, rng = [args.features, args.hidden], np.random.default_rng(args.seed)
    np.savez(args.folder / "encoder.npz", sizes=sizes, compute=args.compute, params=fusedrnn.init_params(spec, rng))
    for number in range(args.files):
        lengths = rng.integers(0, args.length + 1, args.rows)
        values = rng.standard_normal((lengths.sum(), args.features), np.float32)
        offsets = np.concatenate([[0], lengths.cumsum() * args.features]).astype(np.int32)
        ids = np.arange(args.rows) + number * args.rows
        table = pa.table({"id": ids, "values": pa.ListArray.from_arrays(offsets, values.ravel())})
        pq.write_table(table, args.folder / "input" / f"part-{number:05}.parquet", row_group_size=args.row_group)


_NUMBERS: dict[str, dict[str, tuple[int, str]]] = {
    "make-data": {
        "files": (8, "input files"),
        "rows": (1000, "sequences in a file"),
        "row-group": (250, "sequences in a row group"),
        "length": (100, "the longest sequence, in steps"),
        "features": (16, "features of a step"),
        "hidden": (64, "hidden units in each direction"),
        "seed": (0, "of the sequences and the parameters"),
    },
    "run": {
        "workers": (2, "actors, on all machines together"),
        "threads": (1, "processors and threads of an actor"),
        "batch": (64, "sequences in a call of the operator"),
    },
}


def options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Encodes sequences in Parquet files with Ray Data.")
    commands = parser.add_subparsers(required=True)
    for function, name in (make_data, "make-data"), (run, "run"), (verify, "verify"):
        command = commands.add_parser(name, description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("folder", type=Path, help="on several machines: a folder that all of them share")
        for option, (default, explanation) in _NUMBERS.get(name, {}).items():
            command.add_argument(f"--{option}", type=int, default=default, help=f"{explanation} [default: {default}]")
        if name == "make-data":
            command.add_argument("--compute", choices=("", "bfloat16", "int8", "int8_weights"), default="")
        if name == "run":
            command.add_argument("--address", help="of a Ray cluster, HOST:PORT or auto; default: this machine alone")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int) and value < (least := int(name != "seed")):
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    args.folder = args.folder.absolute()  # workers run in other folders
    needed = ("encoder.npz", "input/*.parquet") if args.function is not make_data else ()
    if not all(any(args.folder.glob(pattern)) for pattern in needed):
        parser.error(f"{args.folder} must have encoder.npz and input/*.parquet, which make-data writes")
    return args


if __name__ == "__main__":
    arguments = options()
    arguments.function(arguments)
