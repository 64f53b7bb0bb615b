"""A client of the server: its stream, and the frames that wait for a step."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from typing import Protocol

import fusedrnn
from examples.stream_server import protocol
from examples.stream_server.protocol import ProtocolError

CLOSING_SECONDS = 1.0
SILENT_SECONDS = 30
"""How long the machine of an idle client may not answer, as after a loss of power, before its connection ends."""
MAX_QUEUED = 8
"""The most frames of a connection that wait. Then the server stops reading from it until one has been taken, and TCP
makes the client send less."""


class StepsStreams(Protocol):
    """The parts of the server that a connection uses."""

    streams: fusedrnn.Streams
    input_size: int
    output_size: int
    connections: set[Connection]
    refused: int

    def add_frames(self, connection: Connection) -> None:
        """See :meth:`examples.stream_server.server.Server.add_frames`."""


class Frame:
    """The input of one step.

    Attributes:
        content: The bytes of the frame.
        arrived: The time of its arrival, in seconds.
        is_first: Whether a sequence begins with this frame.
    """

    __slots__ = ("arrived", "content", "is_first")

    def __init__(self, content: bytes, arrived: float, is_first: bool) -> None:
        self.content, self.arrived, self.is_first = content, arrived, is_first


def end_when_silent(connected: socket.socket) -> None:
    """Let the system end an idle connection whose other side has not answered for :data:`SILENT_SECONDS`.

    Otherwise a client whose machine vanishes without closing the connection keeps its stream for ever. If an output was
    on its way then, the system gives up after its own time, a quarter of an hour on Linux. A limit for outputs too
    (``TCP_USER_TIMEOUT``) would end the connections of clients that do not read for as long.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": SILENT_SECONDS // 2, "TCP_KEEPINTVL": SILENT_SECONDS // 6, "TCP_KEEPCNT": 3}
    for name, value in options.items():
        if hasattr(socket, name):  # some systems lack some
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Connection(asyncio.BufferedProtocol):
    """A client: its stream, and the frames that wait.

    Attributes:
        id: The id of its stream; -1 if there is none.
        is_closed: Whether the client has disconnected, or has been disconnected.
    """

    def __init__(self, server: StepsStreams) -> None:
        self.id, self.is_closed = -1, False
        self._server, self._transport = server, asyncio.Transport()
        frame_bytes = server.input_size * protocol.FLOAT_BYTES
        space = bytearray(MAX_QUEUED * (protocol.HEADER.size + frame_bytes))
        self._received, self._space = bytearray(), memoryview(space)
        self._frame_bytes, self._limits = frame_bytes, {protocol.FRAME: frame_bytes, protocol.RESET: 0}
        self._frame_header = protocol.HEADER.pack(frame_bytes, protocol.FRAME)
        self._frames: deque[Frame] = deque()
        self._is_stepped = self._is_first = self._is_writable = False
        self._is_reading = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join a stream, or tell the client that the server is full."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._is_writable = transport, True
        end_when_silent(transport.get_extra_info("socket"))
        self._server.connections.add(self)
        try:
            self.id = self._server.streams.join()
        except RuntimeError as error:
            self.refuse(str(error))
            return
        transport.write(protocol.welcome(self._server.input_size, self._server.output_size))

    def get_buffer(self, sizehint: int) -> memoryview:
        """The memory into which the event loop writes received bytes."""
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        """Handle ``nbytes`` received bytes."""
        if self.is_closed:
            return
        content, had_frames = self._space[:nbytes], bool(self._frames)
        header_bytes = len(self._frame_header)
        if (
            nbytes == header_bytes + self._frame_bytes
            and not self._received
            and content[:header_bytes] == self._frame_header
        ):  # exactly one frame, the most frequent case
            self._add_frame(bytes(content[header_bytes:]))
        else:
            self._received += content
            try:
                self._take_messages()
            except ProtocolError as error:
                self.refuse(str(error))
                return
        if self._frames and not had_frames and not self._is_stepped:
            self._server.add_frames(self)
        self._regulate()

    def _take_messages(self) -> None:
        for kind, payload in protocol.messages(self._received, self._limits):
            if kind == protocol.RESET:
                self._is_first = True
            elif len(payload) == self._frame_bytes:
                self._add_frame(payload)
            else:
                raise ProtocolError(f"FRAME must have {self._frame_bytes} bytes; got {len(payload)}")

    def _add_frame(self, content: bytes) -> None:
        self._frames.append(Frame(content, time.perf_counter(), self._is_first))
        self._is_first = False

    def eof_received(self) -> bool:
        """Close, because the client closes: its stream ends, and frames that wait are dropped."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End the stream, because the client has gone; a step that has its frame ends first."""
        self.is_closed = True
        self._server.connections.discard(self)
        if not self._is_stepped:
            self._leave()

    def pause_writing(self) -> None:
        """Take no more frames, because the client does not read its outputs."""
        self._is_writable = False
        self._regulate()

    def resume_writing(self) -> None:
        """Take frames again, because the client reads again."""
        self._is_writable = True
        self._regulate()

    def refuse(self, words: str) -> None:
        """Send an error, end the stream, and close; the client has :data:`CLOSING_SECONDS` to read what was sent."""
        if not self.is_closed:
            self.is_closed = True
            self._server.refused += 1
            if not self._is_stepped:
                self._leave()
            self._transport.write(protocol.message(protocol.ERROR, words.encode()))
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSING_SECONDS, self._transport.abort)

    def abort(self) -> None:
        """Close without sending what is still in the transport's buffer."""
        self._transport.abort()

    def next_frame(self) -> Frame:
        """Take the oldest frame for a step."""
        self._is_stepped = True
        return self._frames.popleft()

    def end_step(self) -> None:
        """Handle the end of the step."""
        self._is_stepped = False
        if self.is_closed:
            self._leave()
        elif self._frames:
            self._server.add_frames(self)

    def send(self, output: memoryview) -> None:
        """Send the message of an output."""
        if not self.is_closed:
            self._transport.write(output)
            self._regulate()

    def _regulate(self) -> None:
        """Read from the socket only while frames may be taken."""
        should_read = self._is_writable and len(self._frames) < MAX_QUEUED
        if should_read is not self._is_reading and not self.is_closed:
            self._is_reading = should_read
            if should_read:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _leave(self) -> None:
        if self.id >= 0:
            self._server.streams.leave(self.id)
            self.id = -1
