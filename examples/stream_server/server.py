"""The server: connections put frames into queues, and one task steps all streams that have a frame in one call."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import fusedrnn
from examples.stream_server import protocol
from examples.stream_server.connection import CLOSING_SECONDS, Connection, Frame
from fusedrnn.arrays import Array

"""How many seconds clients may take to read the last messages."""
_NUM_KEPT = 1_000_000
"""Of how many frames and steps a server keeps figures, however long it runs."""


class Server:
    """Serves one network to many connections, each of which is a stream.

    While a step runs in its own thread, frames arrive and wait. The next step takes one frame of each stream.

    Args:
        streams: The network and the states.
        window: Seconds to wait for more frames, before a step, after the first frame has arrived.
        threads: The number of threads of a step.

    Attributes:
        latencies: Seconds from the arrival of each frame to the writing of its output into the socket, of the last
            million frames.
        batches: The number of streams of each step, of the last million steps.
        refused: The number of connections that the server has closed.
        processor_seconds: The processor time of serving.
    """

    def __init__(self, streams: fusedrnn.Streams, window: float = 0.0, threads: int = 1) -> None:
        self.streams, self.window = streams, window
        spec = streams.op.spec
        self.input_size, self.output_size = spec.input_size, spec.output_size
        self.latencies: deque[float] = deque(maxlen=_NUM_KEPT)
        self.batches: deque[int] = deque(maxlen=_NUM_KEPT)
        self.connections: set[Connection] = set()
        self.refused, self.processor_seconds = 0, 0.0
        self._threads = threads
        self._ready: deque[Connection] = deque()
        self._has_frames = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, "step")
        self._listener: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen at an address, and return the port; port 0 is for any free port.

        Raises:
            OSError: If that is not possible.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._warm_up)
        self._listener = await loop.create_server(lambda: Connection(self), host, port, backlog=self.streams.capacity)
        self._task = loop.create_task(self._serve())
        number: int = self._listener.sockets[0].getsockname()[1]
        return number

    async def wait(self) -> None:
        """Wait until serving fails, with its exception, or :meth:`stop` is called."""
        assert self._task is not None
        await self._task

    async def stop(self) -> None:
        """Take no more connections, finish the running step, tell all clients, and close."""
        if self._listener is not None:
            self._listener.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._executor.shutdown()
        for connection in list(self.connections):
            connection.refuse("the server shuts down")
        deadline = time.monotonic() + CLOSING_SECONDS
        while self.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        for connection in list(self.connections):
            connection.abort()

    def add_frames(self, connection: Connection) -> None:
        """Add a connection that has frames to the queue. It must not be in the queue already."""
        self._ready.append(connection)
        self._has_frames.set()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._has_frames.wait()
            if self.window:
                await asyncio.sleep(self.window)
            batch = [connection for connection in self._ready if not connection.is_closed]
            self._ready.clear()
            self._has_frames.clear()
            if not batch:
                continue
            frames = [connection.next_frame() for connection in batch]
            step = loop.run_in_executor(self._executor, self._step, [each.id for each in batch], frames)
            try:
                outputs = await asyncio.shield(step)
            except asyncio.CancelledError:
                await asyncio.wait([step])
                raise
            finally:
                for connection in batch:
                    connection.end_step()
            self._send(batch, frames, outputs)

    def _step(self, ids: Sequence[int], frames: Sequence[Frame]) -> Array:
        """The messages of the outputs (n, bytes)."""
        x = np.frombuffer(b"".join([frame.content for frame in frames]), "<f4").reshape(1, len(ids), -1)
        resets = np.array([[frame.is_first for frame in frames]])
        with fusedrnn.thread_limits(self._threads):
            y = self.streams.step(ids, x.astype(np.float32, copy=False), resets=resets if resets.any() else None)
        header = protocol.HEADER.pack(self.output_size * protocol.FLOAT_BYTES, protocol.OUTPUT)
        outputs = np.empty((len(ids), len(header) + y[0, 0].nbytes), np.uint8)
        outputs[:, : len(header)] = np.frombuffer(header, np.uint8)
        outputs[:, len(header) :] = y[0].astype("<f4", copy=False).view(np.uint8)
        return outputs

    def _send(self, batch: Sequence[Connection], frames: Sequence[Frame], outputs: Array) -> None:
        content, size = memoryview(outputs.tobytes()), outputs.shape[1]
        for number, (connection, frame) in enumerate(zip(batch, frames, strict=True)):
            connection.send(content[number * size : (number + 1) * size])
            self.latencies.append(time.perf_counter() - frame.arrived)
        self.batches.append(len(batch))

    def _warm_up(self) -> None:
        """Step batches of all sizes, so that kernels are compiled, weights packed, and steps of each size planned."""
        ids, size = [self.streams.join() for _ in range(self.streams.capacity)], 1
        frame = Frame(bytes(self.input_size * protocol.FLOAT_BYTES), 0.0, is_first=False)
        while size <= len(ids):
            for _ in range(2):
                self._step(ids[:size], [frame] * size)
            size += max(1, size // 16)
        for id in ids:
            self.streams.leave(id)
