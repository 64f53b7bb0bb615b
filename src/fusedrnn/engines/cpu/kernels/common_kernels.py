"""The kernels that all cells share, compiled once for each format and target: GEMMs, and dropout's masks.

A cell's own code calls these functions by name, so that only its maths and its loops are compiled for each cell.
Inference needs only the first of the two modules.
"""

from __future__ import annotations

from fusedrnn.engines.cpu.kernels.dropout import emit_drop_panel, emit_drop_row
from fusedrnn.engines.cpu.kernels.gemm import GEMM_TN, emit_gemm, gemm_of
from fusedrnn.engines.cpu.kernels.gemm_unpacked import emit_unpacked_gemm_nn, emit_unpacked_gemm_nt
from fusedrnn.engines.cpu.kernels.operand_rows import emit_convert_row
from fusedrnn.engines.cpu.kernels.products import PRODUCTS, STORAGE, gradient_format, products_class
from fusedrnn.engines.cpu.kernels.tile_gemm import emit_tile_gemm, emit_tile_gemm_tn
from fusedrnn.jit.builder import Module
from fusedrnn.jit.target import Target


def build_common(compute: str, target: Target) -> Module:
    """The module of the GEMM and, if the format has them, of ``unpacked_gemm_nt`` and ``convert_row``."""
    module, products = Module(f"common_{compute}"), products_class(compute, target)
    if products.tile_instruction:
        emit_tile_gemm(module, target, compute)
    else:
        emit_gemm(module, target, compute, gemm_of(compute))
    if products.reads_unpacked:
        emit_unpacked_gemm_nt(module, target, compute)
    if PRODUCTS[compute].converts_rows:
        emit_convert_row(module, target, compute)
    return module


def build_common_training(compute: str, target: Target) -> Module:
    """The module of what only training needs: ``gemm_tn``, ``unpacked_gemm_nn``, ``drop_panel`` and ``drop_row``."""
    module, dtype = Module(f"common_training_{compute}"), STORAGE[compute]
    format_of_gradients = gradient_format(compute, target)
    if target.multiplies_tiles(format_of_gradients):
        emit_tile_gemm_tn(module, target, format_of_gradients)
    else:
        emit_gemm(module, target, format_of_gradients, GEMM_TN)
    if products_class(compute, target).reads_unpacked:
        emit_unpacked_gemm_nn(module, target, compute)
    emit_drop_row(module, target, dtype, emit_drop_panel(module, target, dtype))
    return module
