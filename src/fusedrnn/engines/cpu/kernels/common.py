"""What the kernels of all cells share, compiled once for a float type and a target: GEMMs, and dropout's masks.

A cell's own code calls these functions by name, and what is compiled anew for a cell is its maths and the loops around
it. Inference needs only the first of the two modules.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.dropout import emit_drop_panel, emit_drop_row
from fusedrnn.engines.cpu.kernels.gemm import emit_gemm, emit_gemm_tn
from fusedrnn.engines.cpu.kernels.gemm_unpacked import emit_unpacked_gemm_nn, emit_unpacked_gemm_nt
from fusedrnn.jit.builder import Module
from fusedrnn.jit.target import Target


def build_common(dtype: str, target: Target) -> Module:
    """The module of ``gemm`` and ``unpacked``."""
    module = Module(f"shared_{dtype}")
    emit_gemm(module, target, dtype)
    emit_unpacked_gemm_nt(module, target, dtype)
    return module


def build_common_training(dtype: str, target: Target) -> Module:
    """The module of what only training needs: ``upright``, ``unpacked_back``, ``drop_panel`` and ``drop_row``."""
    module = Module(f"shared_training_{dtype}")
    emit_gemm_tn(module, target, dtype)
    emit_unpacked_gemm_nn(module, target, dtype)
    emit_drop_row(module, target, dtype, emit_drop_panel(module, target, dtype))
    return module
