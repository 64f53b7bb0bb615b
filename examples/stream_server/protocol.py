"""The messages between clients and the server, over TCP.

A message is the length of its payload as four bytes, its kind as one byte, and the payload. Numbers are little-endian.
A connection is one stream, whose states are zero at first.

============ ========= =======================================================================
kind         sender    payload
============ ========= =======================================================================
``WELCOME``  server    version, features of a frame, features of an output: three integers of
                       four bytes. It is the first message, before which clients send nothing
``FRAME``    client    the input of one step, in float32
``OUTPUT``   server    the output of one step, in float32: one for each frame, in their order
``RESET``    client    none: the next frame begins a new sequence
``ERROR``    server    UTF-8 text for people; then the server closes the connection
============ ========= =======================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct("<IB")
SIZES = struct.Struct("<III")
VERSION = 1
FRAME, RESET, WELCOME, OUTPUT, ERROR = 1, 2, 16, 17, 18
NAMES = {FRAME: "FRAME", RESET: "RESET", WELCOME: "WELCOME", OUTPUT: "OUTPUT", ERROR: "ERROR"}
FLOAT_BYTES = 4


class ProtocolError(Exception):
    """A message that the other side must not send."""


def message(kind: int, payload: bytes = b"") -> bytes:
    """The bytes of a message."""
    return HEADER.pack(len(payload), kind) + payload


def welcome(input_size: int, output_size: int) -> bytes:
    """The first message of the server."""
    return message(WELCOME, SIZES.pack(VERSION, input_size, output_size))


def parse_welcome(payload: bytes) -> tuple[int, int]:
    """The features of a frame and of an output.

    Raises:
        ProtocolError: If the server has another version.
    """
    if len(payload) != SIZES.size:
        raise ProtocolError(f"WELCOME must have {SIZES.size} bytes; got {len(payload)}")
    version, input_size, output_size = SIZES.unpack(payload)
    if version != VERSION:
        raise ProtocolError(f"the server must have version {VERSION} of the protocol; it has {version}")
    return input_size, output_size


def messages(buffer: bytearray, limits: dict[int, int]) -> Iterator[tuple[int, bytes]]:
    """The kind and the payload of each complete message in a buffer. These messages are removed from the buffer.

    Args:
        buffer: The bytes that have been received.
        limits: The kinds of messages that are allowed, and for each the most bytes of its payload.

    Raises:
        ProtocolError: If a message is of another kind, or longer. The error does not wait for the rest of the message.
    """
    position = 0
    try:
        while len(buffer) - position >= HEADER.size:
            size, kind = HEADER.unpack_from(buffer, position)
            if kind not in limits:
                expected = " or ".join(NAMES[each] for each in limits)
                raise ProtocolError(f"a message must be {expected}; got one of kind {NAMES.get(kind, kind)}")
            if size > limits[kind]:
                raise ProtocolError(f"{NAMES[kind]} must have at most {limits[kind]} bytes; got {size}")
            begin = position + HEADER.size
            if len(buffer) < begin + size:
                return
            position = begin + size
            yield kind, bytes(buffer[begin:position])
    finally:
        del buffer[:position]
