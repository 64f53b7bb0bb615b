"""GEMMs as Python functions, and arrays for them."""

import numpy as np
import pytest

from fusedrnn.engines.cpu.kernels.gemm import emit_gemm, gemm_of
from fusedrnn.engines.cpu.kernels.tile_gemm import emit_tile_gemm
from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.loader import function, load
from fusedrnn.number_formats import from_bfloat16
from fusedrnn.runtime.buffers import aligned_empty
from pairwise import target_names


def compiled(name, target, emit):
    """A GEMM as a Python function with the arguments of the function that ``emit`` emits; it is emitted once."""
    if (name, target) not in _compiled:
        _compiled[name, target] = _compile(name, target, emit)
    return _compiled[name, target]


_compiled = {}


def _compile(name, target, emit):
    def build():
        module = Module(name)
        gemm = emit(module)
        f = Function(module, "go", [f"argument{number}" for number in range(len(gemm.arguments))], exported=True)
        f.call(gemm, *f.arguments)
        f.ret()
        return module

    count = len(emit(Module(name)).arguments)
    return function(load(name, target, build), "go", count)


def emit_packed_gemm(module, target, compute, **options):
    """The GEMM on packed weights that the common module has."""
    if target.multiplies_tiles(compute):
        return emit_tile_gemm(module, target, compute, **options)
    return emit_gemm(module, target, compute, gemm_of(compute), **options)


def aligned(values):
    """A copy of the values that is aligned to vectors."""
    copy = aligned_empty(values.shape, values.dtype)
    copy[:] = values
    return copy


def before_poison(values, axis):
    """An aligned copy of the values. Along an axis, 16 elements follow that are NaN as floats."""
    shape = list(values.shape)
    shape[axis] += 16
    whole = aligned_empty(tuple(shape), values.dtype)
    whole.view(np.uint8)[...] = 0xFF
    copy = np.moveaxis(np.moveaxis(whole, axis, 0)[:-16], 0, axis)
    copy[...] = values
    return copy


def each_target(*formats):
    """Run a test for each format of operands on each target, and on the targets with a dot product for that format."""
    pairs = [(compute, name) for compute in formats for name in target_names(compute)]
    return pytest.mark.parametrize(("compute", "target"), pairs, indirect=["target"])


def padded(array, multiple, axis):
    """The array with zeros appended along an axis, to a multiple of a size."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % multiple)
    return np.pad(array, width)


def panels_of(columns, compute, target):
    """A matrix (panels, vectors, lanes, K) of bfloat16 bits or int8 as panels (panels, groups, vectors, lanes, group).

    Wide weights are float32 and one to a group. A dot product of bfloat16 takes the second of a pair first. For a dot
    product of int8, each panel begins with four bytes for each column: they hold -128 times the column's sum.
    """
    if not target.narrow_weights:
        wide = from_bfloat16(columns) if compute == "bfloat16" else columns.astype(np.float32)
        return np.ascontiguousarray(wide.transpose(0, 3, 1, 2)[..., None])
    has_dot_product = compute in target.dot_products
    group = 1 if compute == "int8_weights" else 4 if compute == "int8" and has_dot_product else 2
    columns = padded(columns, group, 3)
    panels = columns.reshape(*columns.shape[:3], -1, group).transpose(0, 3, 1, 2, 4)
    if not has_dot_product:
        return panels
    if compute == "bfloat16":
        return panels[..., ::-1]
    heads = np.ascontiguousarray(-128 * columns.sum(axis=3, dtype=np.int32)[:, None, ..., None])
    return np.concatenate([heads.view(np.int8), panels], axis=1)


def rows_of(rows, compute, target):
    """Rows of A of bfloat16 bits or int8 as the GEMM reads them."""
    if compute not in target.dot_products:
        return from_bfloat16(rows) if compute == "bfloat16" else rows.astype(np.int16)
    if compute == "int8":
        return (rows.astype(np.int16) + 128).astype(np.uint8)
    pairs = padded(rows, 2, -1)
    return pairs.reshape(*pairs.shape[:-1], -1, 2)[..., ::-1].reshape(pairs.shape)
