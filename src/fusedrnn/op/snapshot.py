"""The states of one sequence as bytes, with a header that describes their spec and their format.

The format is the 16 bytes of :data:`MAGIC`, the length of the header as four bytes, the header in JSON, and the states
one after the other, each (L, size). Numbers of more than one byte are little-endian; the header names the byte order,
since another version may use another.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.cell.cells import Cell
from fusedrnn.op.streamed_spec import StreamedSpec
from fusedrnn.spec import RNNSpec

MAGIC = b"fusedrnn state\r\n"
VERSION = 1
_BYTE_ORDERS = "little", "big"
_LENGTH_BYTES = 4


def to_bytes(spec: StreamedSpec, states: Sequence[Array]) -> bytes:
    """The snapshot of the flat states of one sequence, each (L, 1, size)."""
    data = b"".join(state.astype(state.dtype.newbyteorder("<"), copy=False).tobytes() for state in states)
    header = {
        "version": VERSION, "spec": described(spec), "states": _sizes(spec), "dtype": spec.layers[0].dtype,
        "byte_order": "little", "crc32": zlib.crc32(data),
    }  # fmt: skip
    text = json.dumps(header).encode()
    return b"".join((MAGIC, len(text).to_bytes(_LENGTH_BYTES, "little"), text, data))


def from_bytes(spec: StreamedSpec, snapshot: object) -> tuple[Array, ...]:
    """The flat states in a snapshot of that spec.

    Raises:
        TypeError: If it is not bytes.
        ValueError: If it is no snapshot, is of another version or another spec, or is damaged.
    """
    if not isinstance(snapshot, (bytes, bytearray, memoryview)):
        raise TypeError(f"snapshot must be bytes; got {type(snapshot).__name__}")
    header, data = _split(bytes(snapshot))
    if header.get("version") != VERSION:
        raise ValueError(f"snapshot must have version {VERSION}; got version {header.get('version')!r}")
    _check_spec(spec, header)
    order, shapes = header["byte_order"], spec.state_shapes(1)
    if order not in _BYTE_ORDERS:
        raise ValueError(f"snapshot must have byte order {' or '.join(_BYTE_ORDERS)}; got {order!r}")
    dtype = np.dtype(spec.layers[0].dtype)
    expected = sum(layers * size for layers, _, size in shapes) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"snapshot must have {expected} bytes of states; got {len(data)}")
    if zlib.crc32(data) != header["crc32"]:
        raise ValueError("snapshot must have the checksum of its header; its states are damaged")
    values, begin, states = np.frombuffer(data, dtype.newbyteorder(order)).astype(dtype), 0, []
    for shape in shapes:
        end = begin + shape[0] * shape[2]
        states.append(values[begin:end].reshape(shape))
        begin = end
    return tuple(states)


def described(spec: StreamedSpec) -> dict[str, str]:
    """The fields of all layers as text."""
    return {
        prefix + name: text
        for prefix, layer in zip(spec.prefixes, spec.layers, strict=True)
        for name, text in _described_layer(layer).items()
    }


def _described_layer(spec: RNNSpec) -> dict[str, str]:
    """The fields of a spec as text. A user cell is given by its name and a hash of its equations."""
    texts = {field.name: repr(getattr(spec, field.name)) for field in fields(spec)}
    if isinstance(spec.mode, Cell):
        texts["mode"] = f"cell {spec.mode.name} {spec.mode.digest}"
    return texts


def _default(name: str) -> str:
    """The default of a field as text; "missing" if it has none."""
    default = RNNSpec.__dataclass_fields__[name.rpartition(".")[2]].default
    return "missing" if default is MISSING else repr(default)


def _kind(described_spec: dict[str, Any]) -> str:
    """Whether it describes an RNNSpec or a NetworkSpec, and how many layers that has."""
    prefixes = {name.rpartition(".")[0] for name in described_spec}
    return f"NetworkSpec, len(layers)={len(prefixes)}" if any(prefixes) else "RNNSpec"


def _sizes(spec: StreamedSpec) -> dict[str, list[int]]:
    """The number of layers and of elements of each state, by its name."""
    shapes = zip(spec.state_names, spec.state_shapes(1), strict=True)
    return {name: [layers, size] for name, (layers, _, size) in shapes}


def _split(snapshot: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of the states."""
    error = ValueError("snapshot must be what Streams.snapshot returned; got other bytes")
    begin = len(MAGIC) + _LENGTH_BYTES
    if not snapshot.startswith(MAGIC) or len(snapshot) < begin:
        raise error
    end = begin + int.from_bytes(snapshot[len(MAGIC) : begin], "little")
    try:
        header = json.loads(snapshot[begin:end])
    except (ValueError, RecursionError):
        raise error from None
    names = {"version", "spec", "states", "dtype", "byte_order", "crc32"}
    if not isinstance(header, dict) or not isinstance(header.get("spec"), dict):
        raise error
    if header.get("version") == VERSION and not names <= set(header):
        raise error
    return header, snapshot[end:]


def _check_spec(spec: StreamedSpec, header: dict[str, Any]) -> None:
    """Raise an error that names the fields in which a snapshot's spec differs."""
    saved, own = header["spec"], described(spec)
    if _kind(saved) != _kind(own):
        raise ValueError(f"snapshot must be of a spec of this kind: {_kind(own)}; got one of {_kind(saved)}")
    # An option that is newer than the version which wrote the snapshot had the effect of its default.
    saved = {name: _default(name) for name in own} | saved
    differences = [
        f"{name} is {saved.get(name, 'missing')} in the snapshot and {own.get(name, 'missing')} here"
        for name in {**own, **saved}
        if saved.get(name) != own.get(name)
    ]
    if differences:
        raise ValueError(f"snapshot must be of this spec: {'; '.join(differences)}")
    if header["states"] != _sizes(spec) or header["dtype"] != spec.layers[0].dtype:
        raise ValueError(f"snapshot must have states {_sizes(spec)} of {spec.layers[0].dtype}; got {header['states']}")
