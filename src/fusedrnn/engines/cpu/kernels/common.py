"""The kernels that all cells share, compiled once for each dtype and target: GEMMs, and dropout's masks.

A cell's own code calls these functions by name, so that only its maths and its loops are compiled for each cell.
Inference needs only the first of the two modules.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.dropout import emit_drop_panel, emit_drop_row
from fusedrnn.engines.cpu.kernels.gemm import GEMM, GEMM_TN, emit_gemm
from fusedrnn.engines.cpu.kernels.gemm_unpacked import emit_unpacked_gemm_nn, emit_unpacked_gemm_nt
from fusedrnn.jit.builder import Module
from fusedrnn.jit.target import Target


def build_common(dtype: str, target: Target) -> Module:
    """The module of ``gemm`` and ``unpacked_gemm_nt``."""
    module = Module(f"common_{dtype}")
    emit_gemm(module, target, dtype, GEMM)
    emit_unpacked_gemm_nt(module, target, dtype)
    return module


def build_common_training(dtype: str, target: Target) -> Module:
    """The module of what only training needs: ``gemm_tn``, ``unpacked_gemm_nn``, ``drop_panel`` and ``drop_row``."""
    module = Module(f"common_training_{dtype}")
    emit_gemm(module, target, dtype, GEMM_TN)
    emit_unpacked_gemm_nn(module, target, dtype)
    emit_drop_row(module, target, dtype, emit_drop_panel(module, target, dtype))
    return module
