"""Panel matrices: the addresses of columns and of the next panels, and which of two matrices a GEMM uses."""

import numpy as np
import pytest

from fusedrnn.engines.cpu.kernels.gemm import GEMM
from fusedrnn.engines.cpu.kernels.panel_matrix import ColVecs, LeftOperand, PanelMatrix, Rows, WeightMatrix
from fusedrnn.jit.builder import Declared, Function, Module
from fusedrnn.jit.loader import function, load
from fusedrnn.jit.vector import Vectors
from fusedrnn.spec import DTYPES

K = 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_of_panels(dtype, target):
    """``at`` finds a vector of columns, ``next`` the same columns of a later or an earlier panel."""

    def build():
        module = Module(f"panel_addresses_{dtype}")
        f = Function(module, "addresses", ["base", "col_vec", "panels", "into"], exported=True)
        base, col_vec, panels, into = f.arguments
        v = Vectors(f, target, dtype)
        panel = PanelMatrix(v, target.tile[1], v.bytes, Declared(module, GEMM), base, f.constant(K)).at(col_vec)
        f.store(panel.address, into)
        f.store(panel.next(panels), into + 8)
        f.ret()
        return module

    # The test calls no GEMM, which the module only declares.
    addresses = function(load(f"panel_addresses_{dtype}", target, build), "addresses", 4)
    width, lanes = target.tile[1], target.lanes(dtype)
    packed = np.empty((4, K, width, lanes), dtype)  # (panel, k, vector, lane)
    result = np.empty(2, np.int64)
    for col_vec in range(width, 3 * width):
        for panels in (-1, 0, 1):
            addresses(packed.ctypes.data, col_vec, panels, result.ctypes.data)
            panel, vector = divmod(col_vec, width)
            expected = [packed[panel, 0, vector].ctypes.data, packed[panel + panels, 0, vector].ctypes.data]
            assert result.tolist() == expected


class Recorder:
    """A matrix that notes its calls instead of emitting a GEMM."""

    def __init__(self):
        self.calls = []

    def gemm(self, *args):
        self.calls.append(args)


def test_weight_matrix_emits_both_gemms(target):
    """Each in its branch, with the same arguments."""
    f = Function(Module("choice"), "choice", ["is_unpacked", "address", "count"])
    is_unpacked, address, count = f.arguments
    packed, unpacked = Recorder(), Recorder()
    weights = WeightMatrix(is_unpacked.is_set, lambda: unpacked, lambda: packed)
    a, cols, c = LeftOperand(address, count), ColVecs(count, count), Rows(address, 64)
    weights.gemm(a, cols, c, next_panel=-1)
    assert packed.calls == unpacked.calls == [(a, cols, c, None, -1)]
