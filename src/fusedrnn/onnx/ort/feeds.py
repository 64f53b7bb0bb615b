"""The inputs of a model: examples made from their shapes, and checks with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusedrnn.arrays import Array

Feeds = Mapping[str, Array]

_DTYPES = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16,
    "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip
SIZES = (100, 512, 4096)
"""Sizes to try for axes of unknown size, one after the other, until the model runs. A batch is 1."""


def dtype_of(kind: str) -> Any:
    """The dtype of an input of this type, such as ``tensor(float)``; None if NumPy has none."""
    return _DTYPES.get(kind.removeprefix("tensor(").removesuffix(")"))


def example_feeds(
    inputs: Sequence[Any], num_features: Sequence[int], sizes: Sequence[int] = SIZES
) -> Iterator[dict[str, Array]]:
    """Feeds of several sizes for these inputs of a session: normal numbers, ones for integers.

    ``num_features`` are sizes to try for the last axis of an input if its size is unknown; other axes of unknown size
    have one of ``sizes``.

    Raises:
        ValueError: If an input is no tensor of numbers.
    """
    for entry in inputs:
        if dtype_of(entry.type) is None:
            raise ValueError(f"input {entry.name!r} is a {entry.type}, of which there are no examples")
    unknown = any(not isinstance(size, int) for entry in inputs for size in entry.shape or ())
    for size in sizes if unknown else sizes[:1]:
        for last in (size, *num_features) if unknown else (size,):
            rng = np.random.default_rng(0)
            yield {entry.name: _example(rng, entry, size, last) for entry in inputs}


def _example(rng: np.random.Generator, entry: Any, size: int, last: int) -> Array:
    sizes = list(entry.shape or ())
    for axis, declared in enumerate(sizes):
        if not isinstance(declared, int):
            is_batch = "batch" in str(declared).lower() or (declared is None and axis == 0 and len(sizes) > 1)
            sizes[axis] = 1 if is_batch else last if 0 < axis == len(sizes) - 1 else size
    dtype = dtype_of(entry.type)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(sizes).astype(dtype)
    return np.ones(sizes, dtype)


def checked_feeds(feeds: object, inputs: Sequence[Any], optional: Sequence[Any]) -> list[Feeds]:
    """One set of feeds or several, as a list, checked against a session's inputs.

    Raises:
        TypeError: If an input has the wrong type; the message names it, what was given and what was expected.
        ValueError: If a name or a shape is wrong; the message is of the same form.
    """
    several = [feeds] if isinstance(feeds, Mapping) else feeds
    if not isinstance(several, Sequence) or not several or not all(isinstance(each, Mapping) for each in several):
        raise TypeError(f"feeds must be a mapping of names to arrays, or several; got {type(feeds).__name__}")
    for each in several:
        check_feeds(each, inputs, optional)
    return list(several)


def check_feeds(feeds: object, inputs: Sequence[Any], optional: Sequence[Any]) -> None:
    """Check feeds against a session's inputs and its replaceable initializers; errors as in :func:`checked_feeds`."""
    names = ", ".join(repr(entry.name) for entry in inputs)
    if not isinstance(feeds, Mapping):
        raise TypeError(f"feeds must be a mapping of names to arrays: {names}; got {type(feeds).__name__}")
    known = {entry.name: entry for entry in (*inputs, *optional)}
    for name in feeds:
        if name not in known:
            raise ValueError(f"feeds must have the model's inputs {names}; got {name!r}")
    if missing := [entry.name for entry in inputs if entry.name not in feeds]:
        raise ValueError(f"feeds must have the model's inputs {names}; missing {', '.join(map(repr, missing))}")
    for name, value in feeds.items():
        _check_feed(name, value, known[name])


def _check_feed(name: str, value: object, entry: Any) -> None:
    dtype, shape = dtype_of(entry.type), entry.shape
    if dtype is None or not isinstance(value, np.ndarray):
        return  # ONNX Runtime itself checks lists, sequences and its own values
    if value.dtype != dtype:
        raise TypeError(f"feeds: {name!r} must be {np.dtype(dtype)}; got {value.dtype}")
    if not shape:
        return  # this may be a scalar or an unknown shape
    fits = all(not isinstance(size, int) or size == got for size, got in zip(shape, value.shape, strict=False))
    if len(shape) != value.ndim or not fits:
        expected = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"feeds: {name!r} must have shape ({expected}); got {value.shape}")
