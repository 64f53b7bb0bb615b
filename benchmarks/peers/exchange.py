"""Passes workloads to workers and results back, as folders of .npy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn.bench.data import Batch, Results, Workload


def write_workload(work: Workload, batch: Batch, folder: Path, *, training: bool, threads: int) -> dict[str, Any]:
    """Write the arrays into ``folder``. Returns the fields of the ``load`` command."""
    spec = work.spec
    arrays = {"x": batch.x, "params": work.params}
    arrays |= {f"{name}0": state for name, state in zip(spec.state_names, batch.states, strict=True)}
    if training:
        arrays["dy"] = batch.dy
        arrays |= {f"d{name}_n": gradient for name, gradient in zip(spec.state_names, batch.dstates, strict=True)}
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
    """The results that a worker wrote, in the form that contenders return. This removes the files.

    Raises:
        ValueError: If the gradient of a parameter is missing or has another shape than the parameter.
    """
    results: Results = {}
    for path in sorted(folder.glob("result-*.npy")):
        results[path.stem.removeprefix("result-")] = np.load(path)
        path.unlink()
    dparams = {name.removeprefix("d_"): results.pop(name) for name in list(results) if name.startswith("d_")}
    return results | {"dparams": work.spec.layout.pack(dparams)} if dparams else results
