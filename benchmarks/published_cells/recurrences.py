"""Times cells without recurrent weights on states beyond the caches, in turns with a copy of memory.

Such a cell is a recurrence of single elements. A loop over pre-activations in memory reads those of every gate and
writes the output. A copy of as many bytes is the measure, although it writes more of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.timed_rows import take_turns
from fusedrnn import RNNOp, RNNSpec, cells, frozen, init_params
from fusedrnn.bench.extrapolate import Call
from fusedrnn.bench.peaks import RunPeak

STEPS, BATCH, HIDDEN = 256, 64, 1024
FEATURES = 1
"""The product of the inputs is part of the layer's time, so it is as small as possible."""
CELLS = "ind_rnn", "qrnn_f", "qrnn_fo", "qrnn_ifo", "min_gru", "min_gru_log", "min_lstm", "sru_projected", "t_lstm"


def figures(seconds: float, peak: RunPeak) -> Iterator[dict[str, Any]]:
    """The medians of a layer and of the copy, for each cell, and the bytes that the two read and write."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, BATCH, FEATURES), np.float32)
    # Memory of PyTorch begins at a cache line.
    y, source, into = (torch.ones(STEPS, BATCH, HIDDEN) for _ in range(3))
    for name in CELLS:
        spec = RNNSpec(getattr(cells, name), FEATURES, HIDDEN)
        op, params = RNNOp(spec), frozen(init_params(spec, rng))
        fused = partial(op.forward, x, params, out=y.numpy())
        calls: dict[str, Call] = {"copy": lambda: into.copy_(source), "fused": fused}
        timings = take_turns(calls, seconds, peak)
        yield {
            "cell": name, "bytes": (spec.num_gates + 1) * y.nbytes, "copied_bytes": 2 * y.nbytes,
            **{contender: timing.median for contender, timing in timings.items()},
        }  # fmt: skip
