"""Measures the read bandwidth of caches and memory: for the cost model, and for the sloped roofs of the roofline."""

from __future__ import annotations

from fusedrnn.jit.host import cache_sizes, current_target
from fusedrnn.runtime.machine_rates import MachineRates, keep_rates, kept_rates
from fusedrnn.runtime.peak import measure_peak, measure_reading

MEMORY = "memory"
_ROUNDS = 5
# For the cost model: many short rounds, so that at least one of them is undisturbed.
_SHORT_ROUNDS, _SHORT_READ_BYTES = 24, 1 << 24


def measure_bandwidth(
    threads: int,
    caches: dict[str, int] | None = None,
    *,
    read_bytes: int = 1 << 27,
    min_memory_bytes: int = 16 << 20,
    rounds: int = _ROUNDS,
) -> dict[str, float]:
    """GB/s that ``threads`` threads read together, by level: ``"L2"``, ``"L3"`` where they are known, ``"memory"``.

    Every thread sums an array of its own repeatedly; the best of a few rounds counts. For the L2, each array fills half
    of it. For the L3, all arrays together fill a quarter of it. For memory, they are together three times as large as
    the L3. The measurement takes less than a second.

    Args:
        threads: Their number.
        caches: Bytes of each level; None for those of this machine.
        read_bytes: Bytes that each thread reads in a round, which takes some milliseconds.
        min_memory_bytes: Least size of a thread's array in memory: more than a core's share of any processor's L3.
        rounds: How often each cache is measured. Memory takes longest and is measured no more often than the default.
    """
    arrays = array_bytes(threads, cache_sizes() if caches is None else caches, min_memory_bytes)
    return {
        level: measure_reading(size, threads, read_bytes, min(rounds, _ROUNDS) if level == MEMORY else rounds)
        for level, size in arrays.items()
    }


def measured_rates(*, anew: bool = False) -> MachineRates:
    """The rates of one thread for the target in force: those kept, or new ones if there are none or with ``anew``.

    New rates are kept. A measurement takes most of a second. Nothing else should run on the machine meanwhile, although
    only the best of many short rounds counts.
    """
    target = current_target()
    rates = None if anew else kept_rates(target)
    if rates is None:
        bandwidths = measure_bandwidth(1, read_bytes=_SHORT_READ_BYTES, rounds=_SHORT_ROUNDS)
        l2, l3, memory = (bandwidths.get(level, 0.0) for level in ("L2", "L3", MEMORY))
        rates = MachineRates(measure_peak("float32", 1), l2, l3, memory)
        keep_rates(target, rates)
    return rates


def array_bytes(threads: int, caches: dict[str, int], min_memory_bytes: int) -> dict[str, int]:
    """Size of each thread's array, by level. An L3 too small to be distinguished from the L2 is left out."""
    l2, l3 = caches.get("L2", 0), caches.get("L3", 0)
    arrays = {"L2": l2 // 2} if l2 else {}
    if l3 // (4 * threads) >= 2 * l2 > 0:
        arrays["L3"] = l3 // (4 * threads)
    arrays[MEMORY] = max(3 * l3 // threads, 2 * l2, min_memory_bytes)
    return arrays
