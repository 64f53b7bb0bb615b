"""Weights packed as bfloat16 and int8: the panels that the GEMMs read."""

import ctypes

import numpy as np
import pytest

from fusedrnn.engines.cpu.weights.pack_kernel import CALL, PACK, PACK_TRANSPOSED, PACK_VECTOR, PackTask, load_pack
from fusedrnn.number_formats import quantize_rows, to_bfloat16
from gemms import aligned, each_target, panels_of

POISON = 0x55


def pack(compute, target, task, flat, size, threads):
    packed = aligned(np.full(size + 64, POISON, np.uint8))
    tasks = np.array([task], np.int64)
    for thread in range(threads):
        call = (ctypes.c_int64 * len(CALL.names))(tasks.ctypes.data, 1, threads, flat.ctypes.data, packed.ctypes.data)
        load_pack(compute, target)(ctypes.addressof(call), thread)
    assert (packed[size:] == POISON).all()
    return packed[:size]


def padded_units(matrix, gates, units, lanes):
    """A matrix (gates·units, K) as (unit vectors, gates, lanes, K), with zeros for units that do not exist."""
    unit_vecs = -(-units // lanes)
    result = np.zeros((gates, unit_vecs * lanes, matrix.shape[1]), matrix.dtype)
    result[:, :units] = matrix.reshape(gates, units, -1)
    return result.reshape(gates, unit_vecs, lanes, -1).transpose(1, 0, 2, 3)


def operands(compute, shape):
    """Float weights as packing takes them, and the integers that a panel holds of them."""
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if compute == "bfloat16":
        return weights, to_bfloat16(weights)
    integers, _ = quantize_rows(weights)
    return integers.astype(np.float32), integers


@pytest.mark.parametrize(("gates", "units", "k"), [(1, 1, 1), (4, 5, 3), (3, 17, 40), (4, 16, 16), (1, 33, 7)])
@each_target("bfloat16", "int8", "int8_weights")
def test_transposed(compute, target, gates, units, k):
    target = target.for_compute(compute)
    lanes, width = target.lanes("float32"), target.tile[1]
    flat, integers = operands(compute, (gates * units, k))
    columns = padded_units(integers, gates, units, lanes)  # (unit vectors, gates, lanes, K)
    vectors = columns.reshape(-1, lanes, k)
    panels = -(-len(vectors) // width)
    expected = np.zeros((panels * width, lanes, k), integers.dtype)
    expected[: len(vectors)] = vectors
    expected = panels_of(expected.reshape(panels, width, lanes, k), compute, target)
    task = PackTask(PACK_TRANSPOSED, 0, 0, k, panels, 0, gates, units, -(-units // lanes))
    for threads in (1, 3):
        packed = pack(compute, target, task, flat, expected.nbytes, threads)
        np.testing.assert_array_equal(packed.view(expected.dtype).reshape(expected.shape), expected)


@pytest.mark.parametrize(("gates", "units", "k"), [(1, 1, 1), (4, 5, 3), (3, 17, 40), (4, 16, 70)])
@each_target("bfloat16")
def test_plain(compute, target, gates, units, k):
    target = target.for_compute(compute)
    lanes, width = target.lanes("float32"), target.tile[1]
    flat, integers = operands(compute, (gates * units, k))
    rows = padded_units(integers, gates, units, lanes).reshape(-1, k)
    panels = -(-k // (width * lanes))
    expected = np.zeros((len(rows), panels * width * lanes), integers.dtype)
    expected[:, :k] = rows
    expected = panels_of(expected.reshape(-1, panels, width, lanes).transpose(1, 2, 3, 0), compute, target)
    task = PackTask(PACK, 0, 0, k, panels, 0, gates, units, -(-units // lanes), len(rows))
    for threads in (1, 3):
        packed = pack(compute, target, task, flat, expected.nbytes, threads)
        np.testing.assert_array_equal(packed.view(expected.dtype).reshape(expected.shape), expected)


@each_target("bfloat16", "int8")
def test_vector(compute, target):
    """A bias is not rounded."""
    target = target.for_compute(compute)
    lanes, width = target.lanes("float32"), target.tile[1]
    bias = np.random.default_rng(0).standard_normal((3 * 17, 1)).astype(np.float32)
    vectors = padded_units(bias, 3, 17, lanes).reshape(-1, lanes)
    panels = -(-len(vectors) // width)
    expected = np.zeros((panels * width, lanes), np.float32)
    expected[: len(vectors)] = vectors
    task = PackTask(PACK_VECTOR, 0, 0, 1, panels, 0, 3, 17, -(-17 // lanes))
    packed = pack(compute, target, task, bias, expected.nbytes, 2)
    np.testing.assert_array_equal(packed.view(np.float32).reshape(expected.shape), expected)
