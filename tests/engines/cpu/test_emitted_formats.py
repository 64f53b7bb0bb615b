"""The emitted code of GEMMs in bfloat16 and int8: the right instruction in the loop over k, no spills.

The tests read the assembly for every x86 target, whether this processor can run it or not.
"""

import itertools
import re
from collections import Counter

import pytest

from assembly import common_functions, loops, parsed
from fusedrnn.cell.cells import FAMILIES
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.forward import build_forward
from fusedrnn.jit.target import is_x86, known_targets

pytestmark = pytest.mark.skipif(not is_x86(), reason="reads x86 assembly")

REGISTERS = {512: "zmm", 256: "ymm", 128: "xmm"}
DOT_PRODUCT = {"bfloat16": "vdpbf16ps", "int8": "vpdpbusd"}
WIDENED = {"bfloat16": r"v?(fmadd\d+|mul)ps", "int8": r"v?pmaddwd", "int8_weights": r"v?(fmadd\d+|mul)ps"}
VARIANT = FAMILIES["lstm"].default
JOBS = "forward", "backward"
TILES = {"bfloat16": "tdpbf16ps", "int8": "tdpbusd"}
ALL_CASES = [
    pytest.param(compute, target, id=f"{compute}-{target.name}")
    for compute, target in itertools.product(WIDENED, known_targets())
    if target.base is None or compute in target.dot_products
]
CASES = [case for case in ALL_CASES if not case.values[1].has_tiles]
TILE_CASES = [case for case in ALL_CASES if case.values[1].has_tiles]
# By the kind of common module; that of the weights' gradients multiplies tiles of bfloat16 only.
TILE_KERNELS = {"nn": [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2)], "tn": [(1, 1), (1, 2), (1, 3), (1, 4)]}


def loops_over_k(compute, target):
    """The loops over k of each micro-kernel, with the number of products of a group."""
    code = common_functions("nn", compute, target)
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
    per_group = 2 if compute == "bfloat16" and not is_dot_product and target.narrow_weights else 1
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


@pytest.mark.parametrize("kind", TILE_KERNELS)
@pytest.mark.parametrize(("compute", "target"), TILE_CASES)
def test_tile_products(kind, compute, target):
    """A step loads each tile of A and of B once and multiplies every pair of them; nothing else touches memory."""
    if kind == "tn" and compute != "bfloat16":
        return
    code, kernels = common_functions(kind, compute, target), TILE_KERNELS[kind]
    assert sum(name.startswith("tile_kernel") for name in code) == len(kernels)
    for height, vecs in kernels:
        [body] = [body for body in loops(code[f"tile_kernel{height}x{vecs}"]) if any("%tmm" in line for line in body)]
        counts = Counter(line.split()[0] for line in body)
        assert counts["tileloadd"] == height + vecs
        assert counts[TILES[compute]] == height * vecs
        products = [re.findall(r"%tmm(\d)", line) for line in body if line.startswith(TILES[compute])]
        assert (
            len({sums for *_, sums in products}) == len({(left, sums) for _, left, sums in products}) == height * vecs
        )
        others = counts.keys() - {"tileloadd", TILES[compute]}
        assert others <= {"leaq", "addq", "incq", "cmpq", "subq", "movq"}
        assert not [line for line in body if re.search(r"^movq.*\(|\([^)]*%rsp\b", line)]


@pytest.mark.parametrize(("compute", "target"), TILE_CASES)
def test_one_row_is_multiplied_by_vectors(compute, target):
    """Two multiply-adds for a pair of bfloat16, one dot product for four int8; the loops do not touch the stack."""
    code, width = common_functions("nn", compute, target), target.tile[1]
    pattern, per_group = {"bfloat16": (WIDENED["bfloat16"], 2), "int8": (DOT_PRODUCT["int8"], 1)}[compute]
    for col_vecs in (*range(1, width + 1), width * target.one_row_panels):
        for body in loops(code[f"microkernel_nn1x{col_vecs}"]):
            products = [line for line in body if re.match(rf"{pattern}\b.*%zmm", line)]
            assert products and len(products) % (col_vecs * per_group) == 0
            assert not [line for line in body if re.search(r"%tmm|\([^)]*%rsp\b", line)]


@pytest.mark.parametrize(("compute", "target"), TILE_CASES)
@pytest.mark.parametrize("build", [build_forward, build_backward])
def test_tiles_are_released(build, compute, target):
    """Before the first call of a job, as another library may have left them configured, and after the last one."""
    if build is build_backward and compute != "bfloat16":
        return
    [job] = [lines for name, lines in parsed(build(VARIANT, compute, target), target).items() if name in JOBS]
    first, last = (number for number, line in enumerate(job) if line == "tilerelease")
    calls = [number for number, line in enumerate(job) if line.startswith("call")]
    assert first < min(calls) and max(calls) < last < job.index("retq")
    assert not [line for line in job[last:] if line.startswith("j")]


@pytest.mark.parametrize("kind", TILE_KERNELS)
@pytest.mark.parametrize(("compute", "target"), TILE_CASES)
def test_tiles_are_configured_where_they_have_other_rows(kind, compute, target):
    """Asked first: to configure takes longer than many products."""
    if kind == "tn" and compute != "bfloat16":
        return
    code = common_functions(kind, compute, target)
    [gemm] = [lines for name, lines in code.items() if name in ("gemm", "gemm_int8", "gemm_tn")]
    instructions = [line.split()[0] for line in gemm]
    asked, configured = instructions.index("sttilecfg"), instructions.index("ldtilecfg")
    assert any(word.startswith("j") for word in instructions[asked:configured])
    assert not [name for name, lines in code.items() if lines is not gemm and any("tilecfg" in line for line in lines)]


PAIRED = [target for target in known_targets() if target.multiplies_pairs("bfloat16")]


@pytest.mark.parametrize("target", PAIRED, ids=lambda target: target.name)
def test_weight_gradients_multiply_pairs(target):
    """The GEMM of the weights' gradients multiplies pairs of rows: it only loads, broadcasts and multiplies."""
    code = common_functions("tn", "bfloat16", target)
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
