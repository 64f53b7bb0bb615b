"""What machine code reads of the process without the interpreter: the thread pool, and how many threads to use."""

from __future__ import annotations

import numpy as np

_state = np.zeros(2, np.int64)
_CONTROL, _NUM_THREADS = range(2)
# Control blocks of pools. A caller in machine code may still hold the address of one: so its memory outlives the pool,
# and its ``busy`` then refuses jobs.
_immortal: list[object] = []


def publish_pool(control: int, *memory: object) -> None:
    """Let machine code use the pool with that control block; 0 for no pool. Its ``memory`` is never freed."""
    _immortal.extend(memory)
    _state[_CONTROL] = control


def publish_num_threads(threads: int) -> None:
    """Let machine code know how many threads a call may use."""
    _state[_NUM_THREADS] = threads


def control_cell() -> int:
    """Where machine code finds the address of the current pool's control block; the address is 0 without a pool."""
    return int(_state.ctypes.data + 8 * _CONTROL)


def num_threads_cell() -> int:
    """Where machine code finds how many threads a call may use; 0 until that number has been published."""
    return int(_state.ctypes.data + 8 * _NUM_THREADS)
