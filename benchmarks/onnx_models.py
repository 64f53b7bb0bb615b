"""``python -m benchmarks.onnx_models``: whole ONNX models, in ONNX Runtime alone and after ``accelerate``.

Models are files, folders with models, or installed packages that ship models. Both sessions run in turns on the same
inputs and with equal threads, and their outputs must agree within the tolerances of :mod:`fusedrnn.testing.tolerance`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import typer
from rich.table import Table

from fusedrnn.arrays import Array
from fusedrnn.cli.console import check_writable, fail, finite, output, write_json
from fusedrnn.cli.program import Program
from fusedrnn.onnx import AcceleratedSession, accelerate
from fusedrnn.onnx.ort.calibration import compare
from fusedrnn.onnx.ort.feeds import example_feeds
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.tolerance import longest_sum, tolerance

_SILENT = 4
"""ONNX Runtime's log level above that of errors, because some models warn at every call."""

INPUTS: tuple[tuple[str, dict[str, tuple[int, ...] | int]], ...] = (
    ("silero_vad_16k_sequence", {"input": (300, 576), "h": (1, 1, 128), "c": (1, 1, 128)}),
    ("silero_vad", {"input": (1, 576), "state": (2, 1, 128), "sr": 16000}),
    ("aecmos_models/Run_1668423760", {"input": (1, 3, 600, 160), "h0": (4, 1, 96)}),
    ("aecmos", {"input": (1, 3, 600, 160), "h0": (4, 1, 64)}),
    ("plcmos", {"degraded_audio": (1, 1, 600, 257), "rater_embed": (1, 64)}),
    ("tashkeel", {"char_inputs": (1, 100), "diac_inputs": (1, 100), "input_lengths": 100}),
    ("ddddocr", {"input1": (1, 1, 64, 200)}),
)
"""Inputs for models whose paths contain a text: shapes, or the value of all elements."""

app = Program()


@dataclass(frozen=True)
class Row:
    """The figures of a model; times are medians of a run in milliseconds.

    Attributes:
        model: Its file, and how many other models have the same operators and sizes.
        nodes: The number of its recurrent nodes.
        replaced: How many of them run on the fused operator.
        share: The recurrent nodes' share of the time in ONNX Runtime alone.
        onnxruntime: The time in ONNX Runtime alone.
        fused: The time after ``accelerate``.
        ratio: The median of the ratio of both times in the same round.
        noise: The same ratio for a second session of ONNX Runtime alone, minus one.
        error: The largest difference of an output, relative to its tolerance. None for quantized models, since ONNX
            Runtime quantizes activations in another way.
    """

    model: str
    nodes: int
    replaced: int
    share: float | None
    onnxruntime: float
    fused: float
    ratio: float
    noise: float
    error: float | None


def model_files(paths: Sequence[Path], packages: Sequence[str]) -> list[Path]:
    """The files of models in these files, folders and installed packages.

    Raises:
        ValueError: If there are none.
    """
    files = []
    for path in paths:
        files += sorted(path.rglob("*.onnx")) if path.is_dir() else [path]
    for package in packages:
        try:
            listed = metadata.files(package) or ()
        except metadata.PackageNotFoundError as error:
            raise ValueError(f"package {package} must be installed") from error
        files += [Path(str(file.locate())) for file in listed if file.suffix == ".onnx"]
    if not files:
        raise ValueError("there must be a model: name files, folders with *.onnx, or --package")
    return files


def distinct(files: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """For each group of models with the same operators and sizes, the first model and the size of the group."""
    groups: dict[object, list[Path]] = {}
    for file in files:
        model = onnx.load(file)
        sizes = sorted((tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer)
        groups.setdefault((tuple(node.op_type for node in model.graph.node), tuple(sizes)), []).append(file)
    yield from ((group[0], len(group)) for group in groups.values())


def feeds_of(file: Path, session: Any, specs: Sequence[RNNSpec], steps: int) -> dict[str, Array]:
    """Inputs for a model.

    Raises:
        ValueError: If the model does not run on any inputs that could be made.
    """
    rng = np.random.default_rng(0)
    options = onnxruntime.RunOptions()
    options.log_severity_level = _SILENT
    known_inputs = next((inputs for text, inputs in INPUTS if re.search(text, str(file))), {})
    for feeds in example_feeds(session.get_inputs(), [spec.input_size for spec in specs], (steps,)):
        for name, shape in known_inputs.items():
            if name in feeds:
                kind = feeds[name].dtype
                value = rng.standard_normal(shape) if isinstance(shape, tuple) else np.full(feeds[name].shape, shape)
                feeds[name] = (np.ones(shape) if kind == np.int64 and isinstance(shape, tuple) else value).astype(kind)
        try:
            session.run(None, feeds, options)
        except Exception:  # of many types
            continue
        return feeds
    raise ValueError(f"{file} does not run on examples of its inputs")


def error_of(session: AcceleratedSession, expected: Sequence[Array], actual: Sequence[Array]) -> float | None:
    """The largest difference relative to the sum of both tolerances; None for quantized models."""
    if any("Quantize" in node.operator for node in session.report.nodes):
        return None
    specs = [RNNSpec("rnn_tanh", node.sizes[0], node.sizes[1]) for node in session.report.nodes if node.sizes]
    terms, worst = max(map(longest_sum, specs), default=1), 0.0
    for array, other in zip(actual, expected, strict=True):
        if array.shape != other.shape:
            raise ValueError(f"shapes of outputs must be equal; got {array.shape} and {other.shape}")
        rtol, atol = tolerance(np.float32, terms, float(np.abs(other).max(initial=1.0)))
        bound = 2 * (atol + rtol * np.abs(other))
        worst = max(worst, float((np.abs(array - other) / bound).max(initial=0.0)))
    return worst


def measure(file: Path, count: int, threads: int, seconds: float, steps: int) -> Row | None:
    """The figures of a model; None if it has no recurrent nodes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    plain, again = (onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for _ in range(2))
    session = accelerate(file, replace="always", sess_options=options)
    if not session.report.nodes:
        return None
    specs = [RNNSpec("rnn_tanh", *node.sizes[:2]) for node in session.report.nodes if node.sizes]
    feeds = feeds_of(file, plain, specs, steps)
    error = error_of(session, plain.run(None, feeds), session.run(None, feeds))
    if error is not None and error > 1:
        raise ValueError(f"outputs of {file} must agree within the tolerance; got {error:.2g} times as much")
    del session
    session = accelerate(file, feeds=feeds, sess_options=options, calibration_seconds=seconds)
    before, after, control = compare([plain, session, again], [feeds], seconds)
    name = "/".join(file.parts[-2:]) + (f" and {count - 1} more" if count > 1 else "")
    report = session.report
    figures = before.median * 1e3, after.median * 1e3, 1 / after.relative, 1 / control.relative - 1
    return Row(name, len(report.nodes), report.num_replaced, report.recurrent_share, *figures, error)


def table(rows: Sequence[Row], threads: int) -> Table:
    """The rows as a table."""
    title = f"median of a run in ms, {threads} thread{'s' * (threads > 1)}"
    result = Table(title=title)
    columns = "model", "recurrent nodes", "replaced", "share", "ONNX Runtime", "accelerate", "ratio", "noise", "error"
    for column in columns:
        result.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        share = "" if row.share is None else f"{row.share:.0%}"
        times = f"{row.onnxruntime:.3f}", f"{row.fused:.3f}", f"{row.ratio:.2f}", f"{row.noise:+.1%}"
        error = "" if row.error is None else f"{row.error:.2f}"
        result.add_row(row.model, str(row.nodes), str(row.replaced), share, *times, error)
    return result


@app.command()
def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Models, or folders of models.")] = None,
    package: Annotated[list[str] | None, typer.Option(help="An installed package that ships models.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.01, callback=finite, help="Time for each model, about, twice.")] = 2.0,
    steps: Annotated[int, typer.Option(min=1, help="Size of axes that the model leaves open.")] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows into this file.")] = None,
) -> None:
    """Time whole ONNX models, in ONNX Runtime alone and after accelerate."""
    try:
        check_writable("--json", json_file)
        files = model_files(models or (), package or ())
    except ValueError as error:
        fail(str(error))
    onnxruntime.set_default_logger_severity(3)
    rows, console = [], output()
    for file, count in distinct(files):
        try:
            row = measure(file, count, threads, seconds, steps)
        except ValueError as error:
            console.print(f"left out: {error}", markup=False)
            continue
        if row is not None:
            rows.append(row)
    console.print(table(rows, threads))
    if json_file is not None:
        content = {"onnxruntime": onnxruntime.__version__, "threads": threads, "rows": [asdict(row) for row in rows]}
        write_json(json_file, content)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.onnx_models")
