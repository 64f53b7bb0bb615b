"""Whether the arrays of a workload fit this machine's memory, before any of them is made."""

from __future__ import annotations

import os

import numpy as np

from fusedrnn.scalars import MAX_BYTES
from fusedrnn.spec import RNNSpec
from fusedrnn.testing.cases import Case


def memory_bytes() -> int:
    """The bytes of this machine's memory, or of the address space if the system does not give that number."""
    try:
        return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), MAX_BYTES)
    except (AttributeError, OSError, ValueError):
        return MAX_BYTES


def check_memory(case: Case, spec: RNNSpec, *, training: bool) -> None:
    """Raise a ValueError if the arrays that a call reads and writes are larger than this machine's memory.

    They are the input, the output and the parameters, and in training the gradient of each. Contenders allocate more,
    which is not known here.
    """
    elements = case.T * case.N * (case.I + spec.output_size) + spec.layout.size
    size = elements * np.dtype(spec.dtype).itemsize * (2 if training else 1)
    if size > memory_bytes():
        raise ValueError(
            f"{case.name} with T = {case.T}, N = {case.N} and H = {case.H} takes {_gibibytes(size)}, and this machine "
            f"has {_gibibytes(memory_bytes())} of memory"
        )


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
