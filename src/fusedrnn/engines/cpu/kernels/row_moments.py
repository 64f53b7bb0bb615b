"""Means and variances over the units of a row, which each thread that needs them computes by itself.

The order of a sum is the same for any number of threads: lane by lane from the first vector of units to the last, then
by halves. Lanes without a unit do not count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce

from fusedrnn.cell.reductions import Reduction
from fusedrnn.engines.cpu.kernels.thread_share import ThreadShare
from fusedrnn.jit.builder import Value


def _unchanged(value: Value) -> Value:
    return value


def row_mean(share: ThreadShare, addresses: Sequence[Value], transform: Callable[[Value], Value] = _unchanged) -> Value:
    """The mean over all units of several rows together, in every lane; ``transform`` is applied to each vector."""
    f, v, hidden = share.f, share.v, share.c.hidden
    whole = hidden // v.lanes
    totals = [f.var(v.const(0.0)) for _ in addresses]
    with f.loop(0, whole) as unit_vec:
        for total, address in zip(totals, addresses, strict=True):
            total.set(total.get() + transform(v.load(address + unit_vec * v.bytes)))
    units_left = hidden - whole * v.lanes
    with f.if_(units_left > 0):
        for total, address in zip(totals, addresses, strict=True):
            value = transform(v.load(address + whole * v.bytes))
            total.set(total.get() + v.zero_tail(value, units_left))
    lanes = reduce(operator.add, (total.get() for total in totals))
    count = v.splat((hidden * len(addresses)).sitofp(v.format.scalar))
    return v.reduce(lanes, operator.add) / count


def moments_of(share: ThreadShare, reduction: Reduction, addresses: Sequence[Value]) -> list[Value]:
    """The values of a reduction's leaves, from the rows that it reads; the variance from differences to the mean."""
    mean = row_mean(share, addresses)
    if reduction.variance is None:
        return [mean]

    def squared_difference(value: Value) -> Value:
        difference = value - mean
        return difference * difference

    return [mean, row_mean(share, addresses, squared_difference)]
