"""A load test without sockets: streams are due at fixed times, and one thread repeatedly steps those that are due.

It measures the operator alone. A step begins a millisecond after its first frame is due, or when the previous step has
ended, and takes all frames that are due then. Between steps the thread sleeps.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

import numpy as np

from fusedrnn import Streams
from fusedrnn.arrays import Array

WINDOW = 1e-3
"""Seconds for which frames are collected. Otherwise steps have few frames each, which takes more time in total."""


@dataclass(frozen=True)
class Load:
    """The figures of the test.

    Attributes:
        latencies: Seconds from the due time of each frame to its output.
        batches: The number of frames of each step.
        processor_seconds: The processor time of the process.
    """

    latencies: array[float]
    batches: array[int]
    processor_seconds: float


def run(streams: Streams, count: int, period: float, seconds: float, window: float = WINDOW) -> Load:
    """Step ``count`` new streams, each once in every period, at times that are spread over the period.

    Args:
        streams: The streams, with ``count`` free slots.
        count: The number of streams.
        period: Seconds between two frames of a stream.
        seconds: The duration.
        window: The least seconds from the due time of the first frame of a step to the step.
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
    """Step batches of all sizes that calls have, so that all are planned."""
    size = 1
    while size <= len(ids):
        for _ in range(2):
            streams.step(ids[:size], x[:, :size])
        size += max(1, size // 16)
