"""The FMA peak of this machine: what a loop of nothing but independent fused multiply-adds reaches."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from functools import lru_cache

from llvmlite import ir

from fusedrnn.codegen import cache
from fusedrnn.codegen.build import Function
from fusedrnn.codegen.target import Target, current
from fusedrnn.codegen.vector import Vectors

# Latency times throughput of the deepest pipeline known: 5 cycles, 2 units.
_CHAINS = 12
