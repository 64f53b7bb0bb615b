"""Bandwidth is measured on arrays that fit the level that is measured."""

import pytest

from fusedrnn.runtime import bandwidth


def test_arrays_fit_their_level():
    caches = {"L1d": 1 << 15, "L2": 1 << 20, "L3": 1 << 25}
    arrays = bandwidth.array_bytes(2, caches, 1 << 20)
    assert list(arrays) == ["L2", "L3", "memory"]
    assert arrays["L2"] < caches["L2"] < arrays["L3"] and 2 * arrays["L3"] < caches["L3"] < arrays["memory"]
    assert list(bandwidth.array_bytes(64, caches, 1 << 20)) == ["L2", "memory"]
    assert list(bandwidth.array_bytes(1, {}, 1 << 20)) == ["memory"]


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_measured(threads):
    sizes = {"read_bytes": 1 << 20, "min_memory_bytes": 1 << 16}
    speeds = bandwidth.measure_bandwidth(threads, {"L2": 1 << 16}, **sizes)
    assert set(speeds) == {"L2", "memory"} and all(speed > 0 for speed in speeds.values())
