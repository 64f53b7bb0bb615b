"""What machine code that runs without the interpreter reads of the process: the thread pool, and the threads to use."""

from __future__ import annotations

import numpy as np

_state = np.zeros(2, np.int64)
_CONTROL, _NUM_THREADS = range(2)
# Control blocks of pools. A caller in machine code may hold the address of one: its memory outlives the pool, and its
# ``busy`` refuses jobs then.
_immortal: list[object] = []


def publish_pool(control: int, *memory: object) -> None:
    """Let machine code use the pool with that control block, in memory that is never freed; 0 for no pool."""
    _immortal.extend(memory)
    _state[_CONTROL] = control


def publish_num_threads(threads: int) -> None:
    """Let machine code know how many threads a call may use."""
    _state[_NUM_THREADS] = threads


def control_cell() -> int:
    """Where machine code finds the address of the control block of the current pool; that is 0 without one."""
    return int(_state.ctypes.data + 8 * _CONTROL)


def num_threads_cell() -> int:
    """Where machine code finds how many threads a call may use; 0 before anyone has set or asked for that."""
    return int(_state.ctypes.data + 8 * _NUM_THREADS)
