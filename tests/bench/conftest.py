"""Fixtures of the tests of benchmarks."""

import pytest

from fusedrnn.bench import peaks
from fusedrnn.runtime.peak import PeakSample


@pytest.fixture
def known_peak(monkeypatch):
    """The FMA peak is 100 GFLOP/s a thread."""
    monkeypatch.setattr(peaks, "measure_peak", lambda dtype, threads: 100.0 * threads)
    monkeypatch.setattr(peaks, "sample_peak", lambda dtype, threads: PeakSample(100.0 * threads, True))
