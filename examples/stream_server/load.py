"""The load generator: many connections on one thread, each of which sends frames at its own times.

It waits on sockets by :mod:`selectors`, which takes a fraction of the time of asyncio's event loop, and looks at them
every half a millisecond. So the measured time is mostly the server's. A frame is due at a fixed time, even if the
previous output has not arrived. Its latency counts from the time when it is sent; how late it is sent is measured too.
"""

from __future__ import annotations

import selectors
import socket
import time
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from examples.stream_server import protocol
from examples.stream_server.protocol import ProtocolError
from fusedrnn.arrays import Array

_GRACE_SECONDS = 5.0
"""How many seconds outputs may take after the last frame."""
_CONNECT_SECONDS = 10.0
_TICK = 5e-4
"""Seconds from one look at the sockets to the next. Looking after each frame would take a whole processor."""


@dataclass
class Result:
    """What a load test has measured.

    Attributes:
        latencies: Seconds from the sending of each frame to its output.
        delays: Seconds from the due time of each frame to its sending. The load generator itself causes large delays.
        lost: The number of frames without an output.
        errors: The error messages of the server.
    """

    latencies: array[float] = field(default_factory=lambda: array("d"))
    delays: array[float] = field(default_factory=lambda: array("d"))
    lost: int = 0
    errors: list[str] = field(default_factory=list)


class Client:
    """A connection: the bytes that it has received, and the sending times of frames without an output so far.

    Raises:
        OSError: If the connection fails.
        ProtocolError: If the server does not welcome it.
    """

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._limits = {protocol.OUTPUT: 1 << 24, protocol.ERROR: 1 << 16}
        self.sent: deque[float] = deque()
        try:
            self.input_size, self.output_size = self._wait_for_welcome()
        except BaseException:
            self.socket.close()
            raise

    def _wait_for_welcome(self) -> tuple[int, int]:
        limits = {protocol.WELCOME: protocol.SIZES.size, protocol.ERROR: 1 << 16}
        while True:
            for kind, payload in protocol.messages(self._received, limits):
                if kind == protocol.ERROR:
                    raise ProtocolError(f"the server says: {payload.decode()}")
                return protocol.parse_welcome(payload)
            content = self.socket.recv(1 << 16)
            if not content:
                raise ProtocolError("the server closed the connection before its first message")
            self._received += content

    def send(self, frame: bytes) -> None:
        """Send the message of a frame, and note the time."""
        self.sent.append(time.perf_counter())
        self.socket.sendall(frame)

    def receive(self) -> list[tuple[int, bytes]]:
        """The messages that have arrived.

        Raises:
            ConnectionError: If the server has closed the connection.
        """
        content = self.socket.recv(1 << 16)
        if not content:
            raise ConnectionError("the server closed the connection")
        self._received += content
        return list(protocol.messages(self._received, self._limits))

    def step(self, x: Array) -> Array:
        """Send one frame (I,), and wait for its output.

        Raises:
            ProtocolError: If the server sends an error.
            OSError: If the connection fails.
        """
        self.send(protocol.message(protocol.FRAME, x.astype("<f4").tobytes()))
        while True:
            for kind, payload in self.receive():
                if kind == protocol.ERROR:
                    raise ProtocolError(f"the server says: {payload.decode()}")
                self.sent.popleft()
                return np.frombuffer(payload, "<f4").astype(np.float32)


def run(host: str, port: int, streams: int, period: float, seconds: float) -> Result:
    """Load a server with ``streams`` connections, each of which sends a frame in every period.

    The due times of the frames of different connections are spread over the period.

    Raises:
        OSError: If a connection fails at the start.
        ProtocolError: If the server refuses a connection.
    """
    clients: list[Client] = []
    try:
        for _ in range(streams):
            clients.append(Client(host, port))
        rng = np.random.default_rng(0)
        content = rng.standard_normal((16, clients[0].input_size)).astype("<f4")
        frames = [protocol.message(protocol.FRAME, row.tobytes()) for row in content]
        return _measure(clients, frames, period, seconds)
    finally:
        for client in clients:
            client.socket.close()


def _measure(clients: list[Client], frames: list[bytes], period: float, seconds: float) -> Result:
    result, selector = Result(), selectors.DefaultSelector()
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)

    def close(client: Client) -> None:
        selector.unregister(client.socket)
        client.socket.close()

    number, count = 0, round(len(clients) * seconds / period)
    interval, begin = period / len(clients), time.perf_counter()
    while selector.get_map():
        now = time.perf_counter() - begin
        while number < count and (due := number * interval) <= now:
            client = clients[number % len(clients)]
            number += 1
            if client.socket.fileno() < 0:
                continue
            if _send(client, frames[number % len(frames)], result):
                result.delays.append(time.perf_counter() - begin - due)
            else:
                close(client)
        if number == count and (not any(client.sent for client in clients) or now > seconds + _GRACE_SECONDS):
            break
        time.sleep(max(0.0, _TICK - (time.perf_counter() - begin - now)))
        for key, _ in selector.select(0):
            if not _receive(key.data, result):
                close(key.data)
    result.lost = sum(len(client.sent) for client in clients)
    selector.close()
    return result


def _send(client: Client, frame: bytes, result: Result) -> bool:
    """Send a frame. Returns whether the connection is still open."""
    try:
        client.send(frame)
    except OSError as error:
        result.errors.append(str(error))
        return False
    return True


def _receive(client: Client, result: Result) -> bool:
    """Note the outputs that have arrived. Returns whether the connection is still open."""
    try:
        received = client.receive()
    except (OSError, ProtocolError) as error:
        result.errors.append(str(error))
        return False
    now = time.perf_counter()
    for kind, payload in received:
        if kind == protocol.ERROR:
            result.errors.append(payload.decode())
            return False
        result.latencies.append(now - client.sent.popleft())
    return True
