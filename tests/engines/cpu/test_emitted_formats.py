"""The emitted code of GEMMs in bfloat16 and int8: the right instruction in the loop over k, no spills.

The tests read the assembly for every x86 target, whether this processor can run it or not.
"""

import itertools
import re

import pytest

from assembly import loops, parsed
from fusedrnn.engines.cpu.kernels.common import build_common, build_common_training
from fusedrnn.jit.target import is_x86, known_targets

pytestmark = pytest.mark.skipif(not is_x86(), reason="reads x86 assembly")

REGISTERS = {512: "zmm", 256: "ymm", 128: "xmm"}
DOT_PRODUCT = {"bfloat16": "vdpbf16ps", "int8": "vpdpbusd"}
WIDENED = {"bfloat16": r"v?(fmadd\d+|mul)ps", "int8": r"v?pmaddwd", "int8_weights": r"v?(fmadd\d+|mul)ps"}
CASES = [
    pytest.param(compute, target, id=f"{compute}-{target.name}")
    for compute, target in itertools.product(WIDENED, known_targets())
    if target.base is None or compute in target.dot_products
]


def loops_over_k(compute, target):
    """The loops over k of each micro-kernel, with the number of products of a group."""
    code = parsed(build_common(compute, target), target)
    max_rows, width = target.tile
    for rows, col_vecs in itertools.product(range(1, max_rows + 1), range(1, width + 1)):
        name = f"microkernel_nn{rows}x{col_vecs}"
        bodies = loops(code[name])
        assert bodies, name
        for body in bodies:
            yield name, rows * col_vecs, body


@pytest.mark.parametrize(("compute", "target"), CASES)
def test_instruction(compute, target):
    """One product instruction for each vector of a group, of full width; two for a widened pair of bfloat16."""
    target = target.for_compute(compute)
    is_dot_product = compute in target.dot_products
    pattern = DOT_PRODUCT[compute] if is_dot_product else WIDENED[compute]
    per_group = 2 if compute == "bfloat16" and not is_dot_product else 1
    for name, products, body in loops_over_k(compute, target):
        lines = [line for line in body if re.match(rf"(\{{vex\}}\s+)?{pattern}\b", line)]
        assert lines and len(lines) % (products * per_group) == 0, name
        assert all(f"%{REGISTERS[target.vector_bits]}" in line for line in lines), name


@pytest.mark.parametrize(("compute", "target"), CASES)
def test_no_spills(compute, target):
    """No loop over k of a whole tile touches the stack."""
    target = target.for_compute(compute)
    for name, _, body in loops_over_k(compute, target):
        assert not [line for line in body if re.search(r"\([^)]*%rsp\b", line)], name


@pytest.mark.parametrize(("compute", "target"), CASES)
def test_dot_products_need_no_conversion(compute, target):
    """Where there is a dot product, the loop only loads, broadcasts and multiplies."""
    if compute not in target.dot_products:
        return
    vectors = rf"(\{{vex\}}\s+)?{DOT_PRODUCT[compute]}|vpbroadcastd|vbroadcastss|vmov[ad]\w*|prefetch"
    allowed = rf"{vectors}|lea|add|sub|inc|dec|cmp|mov"
    for name, _, body in loops_over_k(compute, target):
        assert not [line for line in body if not re.match(rf"({allowed}|j\w+)", line)], name


@pytest.mark.parametrize(
    "target", [pytest.param(target, id=target.name) for target in known_targets() if "bfloat16" in target.dot_products]
)
def test_weight_gradients_multiply_pairs(target):
    """The GEMM of the weights' gradients multiplies pairs of rows: it only loads, broadcasts and multiplies."""
    code = parsed(build_common_training("bfloat16", target), target)
    max_rows, width = target.tile
    product = DOT_PRODUCT["bfloat16"]
    for rows, col_vecs in itertools.product(range(1, max_rows + 1), range(1, width + 1)):
        name = f"microkernel_tn{rows}x{col_vecs}"
        bodies = loops(code[name])
        assert bodies, name
        for body in bodies:
            products = [line for line in body if re.match(rf"{product}\b.*%{REGISTERS[target.vector_bits]}", line)]
            assert products and len(products) % (rows * col_vecs) == 0, name
            allowed = rf"{product}|vpbroadcastd|vbroadcastss|vmov[ad]\w*|prefetch|lea|add|sub|inc|dec|cmp|mov|j\w+"
            assert not [line for line in body if not re.match(rf"({allowed})", line)], name
            assert not [line for line in body if re.search(r"\([^)]*%rsp\b", line)], name
