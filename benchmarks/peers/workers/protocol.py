"""The program of every worker: reads a command as one line of JSON and answers with one line of JSON.

``load`` prepares a workload and runs it, first cold and then warm. ``time`` runs it a number of times, ``unload``
releases it, and ``close`` exits. Arrays are exchanged in a folder of .npy files. The output of the library goes to
standard error.
"""

import gc
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

LONG = 5.0
"""A first run that takes more seconds than this is also the warm run."""


class RefusedError(Exception):
    """The library does not support the workload."""


class Workload:
    """A network with its data, as NumPy arrays.

    Attributes:
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        training: Whether gradients are computed too.
        threads: Number of threads to use.
        dtype: ``"float32"`` or ``"float64"``.
        compute: The format to compute in, in the library's best way: ``"float32"`` for the dtype, ``"bfloat16"`` or
            ``"int8"``. Inputs and results are float32.
        input_size, hidden_size, layers, bidirectional: I, H, L, and whether each layer runs in both directions.
        x: (T, N, I).
        params: Weights and biases by names such as ``l0_i2h_weight`` (4H, I) or ``r0_h2h_bias``: l for forward or r for
            reverse, then the layer. Gates are stacked by rows, LSTM i f g o, GRU r z n.
        flat: The same parameters in one vector, all weights first, in the layout of MXNet and cuDNN.
        states: Initial states, each (L*D, N, H), all zero.
        dy, dstates: Gradients of the output (T, N, D*H) and of the final states; only for training.
    """

    def __init__(self, command: dict[str, Any]) -> None:
        import numpy as np

        self.mode: str = command["mode"]
        self.training: bool = command["training"]
        self.threads: int = command["threads"]
        self.dtype: str = command["dtype"]
        self.compute: str = command.get("compute", "float32")
        self.input_size: int = command["input_size"]
        self.hidden_size: int = command["hidden_size"]
        self.layers: int = command["layers"]
        self.bidirectional: bool = command["bidirectional"]
        folder = Path(command["folder"])
        self.x: Any = np.load(folder / "x.npy")
        self.flat: Any = np.load(folder / "params.npy")
        self.layout: list[tuple[str, int, list[int]]] = command["layout"]
        self.params = self.cut(self.flat)
        self.state_names: list[str] = command["states"]
        self.states: list[Any] = [np.load(folder / f"{name}0.npy") for name in self.state_names]
        self.dy: Any = np.load(folder / "dy.npy") if self.training else None
        self.dstates: list[Any] = [np.load(folder / f"d{name}_n.npy") for name in self.state_names if self.training]

    def refuse(self, reason: str) -> NoReturn:
        """Report that the library does not support the workload.

        Raises:
            RefusedError: Always.
        """
        raise RefusedError(reason)

    @property
    def directions(self) -> str:
        """One letter for each direction: ``l`` forward, ``r`` reverse."""
        return "lr" if self.bidirectional else "l"

    @property
    def gates(self) -> int:
        """G, the number of gates."""
        return {"lstm": 4, "gru": 3}.get(self.mode, 1)

    def cut(self, flat: Any) -> dict[str, Any]:
        """The parameters of a vector like ``flat``, by name."""
        return {name: flat[offset : offset + math.prod(shape)].reshape(shape) for name, offset, shape in self.layout}

    def weights(self, layer: int, direction: str) -> list[Any]:
        """The i2h weight, h2h weight, i2h bias and h2h bias of one layer in one direction."""
        return [self.params[f"{direction}{layer}_{kind}"] for kind in KINDS]

    def outputs(self, y: Any, states: Any) -> dict[str, Any]:
        """The results of a forward pass, by name."""
        return {"y": y, **{f"{name}_n": state for name, state in zip(self.state_names, states, strict=True)}}

    def gradients(self, dx: Any, dstates: Any, dparams: dict[str, Any]) -> dict[str, Any]:
        """The results of a backward pass, by name."""
        initial = {f"d{name}0": gradient for name, gradient in zip(self.state_names, dstates, strict=True)}
        return {"dx": dx, **initial, **{f"d_{name}": gradient for name, gradient in dparams.items()}}


KINDS = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")


class Worker:
    """A library, and the workload that it has loaded."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._call: Callable[[], Any] | None = None
        self._last: Any = None

    def load(self, command: dict[str, Any]) -> dict[str, Any]:
        """Prepare the workload, run it until it is warm, and write the results of the last run into its folder."""
        import numpy as np

        self.unload({})
        work = Workload(command)
        self._call, arrays = self._module.prepare(work)
        (cold,) = self._seconds(1)
        seconds = cold if cold >= LONG else self._seconds(1)[0]
        for name, array in arrays(self._last).items():
            np.save(Path(command["folder"]) / f"result-{name}.npy", np.ascontiguousarray(array))
        self._last = None
        return {"cold": cold, "seconds": seconds, "facts": self._module.facts()}

    def time(self, command: dict[str, Any]) -> dict[str, Any]:
        """The seconds of each of some consecutive calls."""
        seconds = self._seconds(command["calls"])
        self._last = None
        return {"seconds": seconds}

    def unload(self, command: dict[str, Any]) -> dict[str, Any]:
        """Release the workload."""
        self._call = self._last = None
        gc.collect()
        return {}

    def _seconds(self, calls: int) -> list[float]:
        if self._call is None:
            raise RuntimeError("nothing is loaded")
        call, stamps = self._call, [time.perf_counter()]
        for _ in range(calls):
            self._last = None  # so that the next call reuses its memory
            self._last = call()
            stamps.append(time.perf_counter())
        return [end - start for start, end in pairwise(stamps)]


def main() -> None:
    """Answer commands until ``close`` or the end of the input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of a library must not mix with the answers
    worker = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "close":
            break
        try:
            worker = worker or Worker(importlib.import_module(sys.argv[1]))
            answer = getattr(worker, command["do"])(command)
        except Exception as error:
            refused = isinstance(error, RefusedError)
            answer = {"error": str(error) if refused else f"{type(error).__name__}: {error}"}
            if worker:
                worker.unload({})
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
