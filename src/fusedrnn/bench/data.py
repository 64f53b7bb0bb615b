"""What is run: real text or the user's array, and parameters, the same in every run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import Case

Array = NDArray[Any]

SEED = 20
_SYMBOLS = 256


@dataclass(frozen=True)
class Batch:
    """What a call is given. The gradients are those of some loss, for training alone.

    Attributes:
        x: (T, N, I).
        states: Initial states, each (L·D, N, size): zeros, but given, so that they have gradients.
        dy: (T, N, D·S).
        dstates: Of the final states, each (L·D, N, size).
        lengths: Valid steps of each sequence, int64 (N,); None for T everywhere.
    """

    x: Array
    states: tuple[Array, ...]
    dy: Array
    dstates: tuple[Array, ...]
    lengths: Array | None = None


@dataclass(frozen=True)
class Workload:
    """A network with its data ``x`` (T, N, I) and flat ``params``, both of the spec's dtype.

    Of sequence n only the first ``lengths[n]`` steps count, all T if ``lengths`` is None.
    """

    case: Case
    spec: RNNSpec
    x: Array
    params: Array
    lengths: Array | None = None

    def flops(self, *, training: bool) -> int:
        """Useful floating-point operations: of the steps that count."""
        T, N, _ = self.x.shape
        steps = T * N if self.lengths is None else int(self.lengths.sum())
        return self.spec.flops(steps, 1, training=training)

    def unpacked(self) -> Workload:
        """The same with all steps."""
        return replace(self, lengths=None)

    def exact(self) -> Workload:
        """The same in float64: what an oracle is run on."""
        spec = replace(self.spec, dtype="float64")
        return replace(self, spec=spec, x=self.x.astype(np.float64), params=self.params.astype(np.float64))

    def batch(self, steps: int) -> Batch:
        """The first ``steps`` steps, the same numbers in either dtype; lengths shrink with them, so that they differ.

        The loss's gradients are uniform in ±1/√(T·N): those of the weights, sums over T·N, are then of order one.
        """
        x, spec = self.x[:steps], self.spec
        rng = np.random.default_rng(SEED + 2)
        bound = np.float32(1.0 / math.sqrt(x.shape[0] * x.shape[1]))

        def upstream(*shape: int) -> Array:
            return ((rng.random(shape, np.float32) * 2 - 1) * bound).astype(spec.dtype)

        shapes = spec.state_shape(x.shape[1])
        return Batch(
            x=x,
            states=tuple(np.zeros(shape, spec.dtype) for shape in shapes),
            dy=upstream(*x.shape[:2], spec.output_size),
            dstates=tuple(upstream(*shape) for shape in shapes),
            lengths=None if self.lengths is None else (self.lengths * len(x) + len(self.x) // 2) // len(self.x),
        )


def workload(case: Case, mode: str, dtype: str, x: Array | None = None, *, packed: bool = False) -> Workload:
    """The case with the cell ``mode``, on ``x`` of the case's shape, or on text; with lengths if it is to be packed."""
    spec = case.spec(mode, dtype)
    x = text_input(case.T, case.N, case.I, dtype) if x is None else x.astype(dtype)
    return Workload(case, spec, x, parameters(spec), lengths(case.T, case.N) if packed else None)


def lengths(T: int, N: int) -> Array:
    """Lengths uniform in [T/2, T], in no order: int64 (N,), the same in every run."""
    return np.random.default_rng(SEED + 3).integers(-(-T // 2), T + 1, N)


@lru_cache(maxsize=1)
def text() -> str:
    """The English that ships with every Python: the topics that ``help()`` explains, one after the other.

    Raises:
        RuntimeError: If this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python was installed without pydoc_data; give your own input with --data") from None
    return "\n".join(topics[name] for name in sorted(topics))


def text_input(T: int, N: int, I: int, dtype: str) -> Array:
    """N stretches of the text, evenly spread over it, one character a step, embedded: (T, N, I).

    The embedding is fixed: I features for each character, uniform in [-1, 1). Past its end the text starts again.
    """
    codes = np.frombuffer(text().encode("latin-1", "replace"), np.uint8)
    table = np.random.default_rng(SEED).uniform(-1.0, 1.0, (_SYMBOLS, I)).astype(dtype)
    starts = np.arange(N) * codes.size // N
    places = (np.arange(T)[:, None] + starts) % codes.size  # (T, N)
    x: Array = table[codes[places]]
    return x


def parameters(spec: RNNSpec) -> Array:
    """The flat parameters of ``spec``, uniform in ±1/√H as frameworks initialise them."""
    params: Array = np.random.default_rng(SEED + 1).random(spec.layout.size, np.dtype(spec.dtype).type)
    params -= 0.5
    params *= 2.0 / math.sqrt(spec.hidden_size)
    return params


def load(path: Path) -> Array:
    """The user's data: a .npy file of finite real numbers, shape (T, N, I).

    Raises:
        ValueError: Naming the file, what it holds and what was expected.
    """
    expected = "a .npy array of real numbers with shape (T, N, I): steps, sequences, features"
    try:
        with path.open("rb") as file:
            x: Array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected {expected}") from None
    except ValueError:
        raise ValueError(f"{path} is not a whole .npy file of numbers; expected {expected}") from None
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {x.dtype} values; expected {expected}")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{path} has shape {x.shape}; expected {expected}, each at least 1")
    if not np.isfinite(x).all():
        raise ValueError(f"{path} holds NaN or infinity; expected {expected}, all finite")
    return x
