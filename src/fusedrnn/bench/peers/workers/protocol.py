"""The program of every worker: reads commands, a line of JSON each, and answers each with a line of JSON.

``load`` prepares a problem and runs it, cold and once more, ``time`` runs it a number of times, ``unload`` lets it go,
``close`` ends. Arrays travel through a folder of .npy files. Whatever the library prints goes to standard error.
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
"""Seconds from which on a first run is not repeated to have a warm one."""


class RefusedError(Exception):
    """The library cannot do this, in words."""


class Problem:
    """A network with its data, as NumPy arrays.

    Attributes:
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``.
        training: Whether gradients are wanted, else only outputs.
        threads: How many to use.
        dtype: ``"float32"`` or ``"float64"``.
        input_size, hidden_size, layers, bidirectional: I, H, L and whether each layer runs both ways.
        x: (T, N, I).
        params: Weights and biases by name, as ``l0_i2h_weight`` (4H, I) or ``r0_h2h_bias``: l forward, r reverse,
            then the layer; gates by rows, LSTM i f g o, GRU r z n.
        flat: The same in one vector, all weights first, as MXNet and cuDNN have them.
        states: Initial states, each (L*D, N, H): all zeros.
        dy, dstates: Gradients of the output (T, N, D*H) and of the final states; in training alone.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        import numpy as np

        self.mode: str = given["mode"]
        self.training: bool = given["training"]
        self.threads: int = given["threads"]
        self.dtype: str = given["dtype"]
        self.input_size: int = given["input_size"]
        self.hidden_size: int = given["hidden_size"]
        self.layers: int = given["layers"]
        self.bidirectional: bool = given["bidirectional"]
        folder = Path(given["folder"])
        self.x: Any = np.load(folder / "x.npy")
        self.flat: Any = np.load(folder / "params.npy")
        self.layout: list[tuple[str, int, list[int]]] = given["layout"]
        self.params = self.cut(self.flat)
        self.state_names: list[str] = given["states"]
        self.states: list[Any] = [np.load(folder / f"{name}0.npy") for name in self.state_names]
        self.dy: Any = np.load(folder / "dy.npy") if self.training else None
        self.dstates: list[Any] = [np.load(folder / f"d{name}_n.npy") for name in self.state_names if self.training]

    def refuse(self, reason: str) -> NoReturn:
        """Say that the library cannot do this.

        Raises:
            RefusedError: Always.
        """
        raise RefusedError(reason)

    @property
    def directions(self) -> str:
        """One letter for each."""
        return "lr" if self.bidirectional else "l"

    @property
    def gates(self) -> int:
        """G."""
        return {"lstm": 4, "gru": 3}.get(self.mode, 1)

    def cut(self, flat: Any) -> dict[str, Any]:
        """What lies in a vector like ``flat``, by name."""
        return {name: flat[at : at + math.prod(shape)].reshape(shape) for name, at, shape in self.layout}

    def weights(self, layer: int, direction: str) -> list[Any]:
        """i2h weight, h2h weight, i2h bias, h2h bias of one layer in one direction."""
        return [self.params[f"{direction}{layer}_{kind}"] for kind in KINDS]

    def outputs(self, y: Any, states: Any) -> dict[str, Any]:
        """What a forward pass gives, by name."""
        return {"y": y, **{f"{name}_n": state for name, state in zip(self.state_names, states, strict=True)}}

    def gradients(self, dx: Any, dstates: Any, dparams: dict[str, Any]) -> dict[str, Any]:
        """What a backward pass gives, by name."""
        initial = {f"d{name}0": gradient for name, gradient in zip(self.state_names, dstates, strict=True)}
        return {"dx": dx, **initial, **{f"d_{name}": gradient for name, gradient in dparams.items()}}


KINDS = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")


class Worker:
    """One library, and the problem that it has loaded."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._call: Callable[[], Any] | None = None
        self._last: Any = None

    def load(self, given: dict[str, Any]) -> dict[str, Any]:
        """Prepare the problem, run it until it is warm, and leave the arrays of the last run in its folder."""
        import numpy as np

        self.unload({})
        problem = Problem(given)
        self._call, arrays = self._module.prepare(problem)
        (cold,) = self._seconds(1)
        seconds = cold if cold >= LONG else self._seconds(1)[0]
        for name, array in arrays(self._last).items():
            np.save(Path(given["folder"]) / f"result-{name}.npy", np.ascontiguousarray(array))
        self._last = None
        return {"cold": cold, "seconds": seconds, "facts": self._module.facts()}

    def time(self, given: dict[str, Any]) -> dict[str, Any]:
        """Seconds of each of some calls, one after the other."""
        seconds = self._seconds(given["calls"])
        self._last = None
        return {"seconds": seconds}

    def unload(self, given: dict[str, Any]) -> dict[str, Any]:
        """Let the problem go."""
        self._call = self._last = None
        gc.collect()
        return {}

    def _seconds(self, calls: int) -> list[float]:
        if self._call is None:
            raise RuntimeError("nothing is loaded")
        call, stamps = self._call, [time.perf_counter()]
        for _ in range(calls):
            self._last = None  # its memory serves the next
            self._last = call()
            stamps.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(stamps)]


def main() -> None:
    """Answer commands until told to close or nobody is there to give them."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    worker = None
    for line in sys.stdin:
        given = json.loads(line)
        if given["do"] == "close":
            break
        try:
            worker = worker or Worker(importlib.import_module(sys.argv[1]))
            answer = getattr(worker, given["do"])(given)
        except Exception as error:
            refused = isinstance(error, RefusedError)
            answer = {"error": str(error) if refused else f"{type(error).__name__}: {error}"}
            if worker:
                worker.unload({})
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
