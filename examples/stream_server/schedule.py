"""A load test without sockets: streams are due at fixed times, and one thread steps those that are, again and again.

It shows what the operator alone takes. A step begins a millisecond after its first frame was due, or when the step
before has ended, and takes all frames that are due then. Until then the thread sleeps.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

import numpy as np

from fusedrnn import Streams
from fusedrnn.spec import Array

WINDOW = 1e-3
"""Seconds for which frames are collected. Without, they are stepped almost one by one, which takes more time in all."""


@dataclass(frozen=True)
class Load:
    """What the test has measured.

    Attributes:
        latencies: Seconds from when each frame was due to its output.
        batches: Frames of each step.
        processor_seconds: What the process has taken of a processor.
    """

    latencies: array[float]
    batches: array[int]
    processor_seconds: float


def run(streams: Streams, count: int, period: float, seconds: float, window: float = WINDOW) -> Load:
    """Step ``count`` new streams, each once in a period, at times that are spread over the period.

    Args:
        streams: With that many free slots.
        count: The number of streams.
        period: Seconds between two frames of a stream.
        seconds: The duration.
        window: Seconds from when a frame is due to the step that takes it, at least for the first of the step.
    """
    ids = np.array([streams.join() for _ in range(count)])
    x = np.random.default_rng(0).standard_normal((1, count, streams.op.spec.input_size)).astype(streams.op.spec.dtype)
    due = np.arange(count) * (period / count)
    latencies, batches = array("d"), array("l")
    _warm_up(streams, ids, x)
    begin, processor, position, turn = time.perf_counter(), time.process_time(), 0, 0
    try:
        while turn * period < seconds:
            now = time.perf_counter() - begin
            wait = due[position] + turn * period + window - now
            if wait > 0:
                time.sleep(wait)
                continue
            end = position + int(np.searchsorted(due[position:], now - turn * period, "right"))
            streams.step(ids[position:end], x[:, position:end])
            after = time.perf_counter() - begin
            latencies.extend((after - turn * period - due[position:end]).tolist())
            batches.append(end - position)
            position = end
            if position == count:
                position, turn = 0, turn + 1
        return Load(latencies, batches, time.process_time() - processor)
    finally:
        for id in ids.tolist():
            streams.leave(id)


def _warm_up(streams: Streams, ids: Array, x: Array) -> None:
    """Step every size of a batch once, so that all are planned."""
    size = 1
    while size <= len(ids):
        for _ in range(2):
            streams.step(ids[:size], x[:, :size])
        size += max(1, size // 16)
