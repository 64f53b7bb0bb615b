"""The data of a benchmark: English text or the user's array, random parameters, and the results of contenders.

The parameters are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.cells import Cell
from fusedrnn.spec import COMPUTE, RNNSpec
from fusedrnn.testing.cases import Case

NON_FUSED, FUSED, TORCH = "non-fused", "fused", "torch.nn"
IN_TORCH = "fused in torch"
UNPACKED = "fused in torch, unpacked"
"""The contender for comparison with a packed batch: the accelerated module on sequences that all have T steps."""
IN_FORMAT = {"float32": FUSED, **{name: f"{FUSED} {name}" for name in COMPUTE}}
"""The names of the operator as a contender, by the format of its GEMM operands."""
OURS = (*IN_FORMAT.values(), IN_TORCH, UNPACKED)

SEED = 20
_SYMBOLS = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of a call. Only training uses the gradients. Batches are equal only if they are the same object.

    Attributes:
        x: (T, N, I).
        states: Initial states, each (L·D, N, size). They are zero, and passed in so that their gradients are computed.
        dy: (T, N, D·S).
        dstates: Gradients of the final states, each (L·D, N, size).
        lengths: The number of steps of each sequence, int64 (N,); None if all have T.
    """

    x: Array
    states: tuple[Array, ...]
    dy: Array
    dstates: tuple[Array, ...]
    lengths: Array | None = None


@dataclass(frozen=True)
class Workload:
    """A network with its input ``x`` (T, N, I) and flat ``params``, both of the spec's dtype.

    Sequence n has ``lengths[n]`` steps, or T if ``lengths`` is None.
    """

    case: Case
    spec: RNNSpec
    x: Array
    params: Array
    lengths: Array | None = None

    def flops(self, *, training: bool) -> int:
        """Useful floating-point operations of a call; padding does not count."""
        T, N, _ = self.x.shape
        steps = T * N if self.lengths is None else int(self.lengths.sum())
        return self.spec.flops(steps, 1, training=training)

    def unpacked(self) -> Workload:
        """The same network on sequences of T steps."""
        return replace(self, lengths=None)

    def in_format(self, number_format: str) -> Workload:
        """The same workload with GEMM operands in that format."""
        return replace(self, spec=replace(self.spec, compute=number_format))

    def exact(self) -> Workload:
        """The same workload in float64, for the reference."""
        spec = replace(self.spec, dtype="float64", compute=None)
        return replace(self, spec=spec, x=self.x.astype(np.float64), params=self.params.astype(np.float64))

    def batch(self, steps: int) -> Batch:
        """The first ``steps`` steps, with the same values in both dtypes. Lengths are reduced in proportion.

        The upstream gradients are uniform in ±1/√(T·N), so that the gradients of the weights, which are sums over
        T·N, are of order one.
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


Results = dict[str, Array]
GetResults = Callable[[], Results]
"""A function that converts the results of a call to NumPy, after the call was timed."""
Contender = Callable[[Batch], GetResults]
"""A function that runs a batch. Only its call is timed."""
Maker = Callable[[Workload], Contender]


def workload(case: Case, mode: str | Cell, dtype: str, x: Array | None = None, *, packed: bool = False) -> Workload:
    """The case with the cell ``mode``, on ``x`` or by default on text. ``packed`` draws a length for each sequence."""
    spec = case.spec(mode, dtype)
    x = text_input(case.T, case.N, case.I, dtype) if x is None else np.asarray(x, dtype)
    return Workload(case, spec, x, parameters(spec), lengths(case.T, case.N) if packed else None)


def lengths(T: int, N: int) -> Array:
    """Unsorted lengths, uniform in [T/2, T]: int64 (N,), the same in every run."""
    return np.random.default_rng(SEED + 3).integers(-(-T // 2), T + 1, N)


@lru_cache(maxsize=1)
def text() -> str:
    """English text that ships with Python: the topics of ``help()``, concatenated.

    Raises:
        RuntimeError: If this Python was installed without these topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python was installed without pydoc_data; give your own input with --data") from None
    return "\n".join(topics[name] for name in sorted(topics))


def text_input(T: int, N: int, I: int, dtype: str) -> Array:
    """N sections of the text, which begin at equal distances, with one embedded character for each step: (T, N, I).

    The embedding is fixed: I features for each character, uniform in [-1, 1). The text wraps around at its end.
    """
    codes = np.frombuffer(text().encode("latin-1", "replace"), np.uint8)
    table = np.random.default_rng(SEED).uniform(-1.0, 1.0, (_SYMBOLS, I)).astype(dtype)
    starts = np.arange(N) * codes.size // N
    positions = (np.arange(T)[:, None] + starts) % codes.size  # (T, N)
    x: Array = table[codes[positions]]
    return x


def parameters(spec: RNNSpec) -> Array:
    """Flat parameters of ``spec``, uniform in ±1/√H as frameworks initialize them."""
    params: Array = np.random.default_rng(SEED + 1).random(spec.layout.size, np.dtype(spec.dtype).type)
    params -= 0.5
    params *= 2.0 / math.sqrt(spec.hidden_size)
    return params


def load(path: Path, dtype: str) -> Array:
    """The user's data in that dtype: a .npy file of finite real numbers, shape (T, N, I).

    Raises:
        ValueError: If the file has another content; the message names the file, its content and what was expected.
    """
    expected = "a .npy array of real numbers with shape (T, N, I): steps, sequences, features"
    try:
        with path.open("rb") as file:
            x: Array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected {expected}") from None
    except MemoryError:
        raise ValueError(f"{path} says that it holds more than fits the memory; expected {expected}") from None
    except Exception:  # NumPy's reader of headers raises errors of many types
        raise ValueError(f"{path} is not a whole .npy file of numbers; expected {expected}") from None
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds {x.dtype} values; expected {expected}")
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{path} has shape {x.shape}; expected {expected}, each at least 1")
    if not np.isfinite(x).all():
        raise ValueError(f"{path} holds NaN or infinity; expected {expected}, all finite")
    with np.errstate(over="ignore"):
        converted = x.astype(dtype)
    if not np.isfinite(converted).all():
        raise ValueError(f"{path} holds values that {dtype} does not have; the largest is {np.abs(x).max():g}")
    return converted


def outputs(spec: RNNSpec, y: Array, states: tuple[Array, ...]) -> Results:
    """The results of a forward pass."""
    return {"y": y, **{f"{name}_n": state for name, state in zip(spec.state_names, states, strict=True)}}


def gradient_results(spec: RNNSpec, dx: Array, dparams: Array, dstates: tuple[Array, ...]) -> Results:
    """The results of a backward pass; ``dparams`` is in the layout of ``spec``."""
    dh0_dc0 = {f"d{name}0": gradient for name, gradient in zip(spec.state_names, dstates, strict=True)}
    return {"dx": dx, "dparams": dparams, **dh0_dc0}
