"""Problems and results on their way to workers and back: folders of .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn.bench.computed import Results
from fusedrnn.bench.data import Batch, Workload


def write_problem(work: Workload, batch: Batch, folder: Path, *, training: bool, threads: int) -> dict[str, Any]:
    """Put the arrays into ``folder``; return what else a worker must be told."""
    spec = work.spec
    arrays = {"x": batch.x, "params": work.params}
    arrays |= {f"{name}0": state for name, state in zip(spec.state_names, batch.states, strict=True)}
    if training:
        arrays["dy"] = batch.dy
        arrays |= {f"d{name}_n": each for name, each in zip(spec.state_names, batch.dstates, strict=True)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {
        "mode": spec.mode,
        "training": training,
        "threads": threads,
        "dtype": spec.dtype,
        "input_size": spec.input_size,
        "hidden_size": spec.hidden_size,
        "layers": spec.num_layers,
        "bidirectional": spec.bidirectional,
        "states": list(spec.state_names),
        "layout": [(entry.name, entry.offset, entry.shape) for entry in spec.layout],
        "folder": str(folder),
    }


def read_results(work: Workload, folder: Path) -> Results:
    """What a worker computed, as contenders give it; the files are removed.

    Raises:
        ValueError: If a parameter's gradient has another shape than the parameter, or is missing.
    """
    found: Results = {}
    for path in sorted(folder.glob("result-*.npy")):
        found[path.stem.removeprefix("result-")] = np.load(path)
        path.unlink()
    dparams = {name.removeprefix("d_"): found.pop(name) for name in list(found) if name.startswith("d_")}
    return found | {"dparams": work.spec.layout.pack(dparams)} if dparams else found
