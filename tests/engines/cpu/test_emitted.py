"""The emitted code, with the processor pinned per target: full vectors, fused multiply-add, no spills.

The tests read the assembly for every x86 target, whether this processor can run it or not.
"""

import itertools
import re
from functools import cache

import pytest

from assembly import TARGETS, common_functions, loops, parsed
from fusedrnn.cell.cells import FAMILIES
from fusedrnn.cells import sru
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL, DROP_ROW
from fusedrnn.engines.cpu.kernels.forward import build_forward
from fusedrnn.engines.cpu.kernels.gemm import GEMM, GEMM_TN
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NN, UNPACKED_GEMM_NT
from fusedrnn.engines.cpu.kernels.lowered_cell import derivative_of
from fusedrnn.engines.cpu.kernels.training import build_training
from fusedrnn.jit.target import Target, is_x86
from fusedrnn.spec import DTYPES, MODES, RNNSpec
from variants import variant_spec

pytestmark = pytest.mark.skipif(not is_x86(), reason="reads x86 assembly")

REGISTERS = {"avx512": "zmm", "avx512-half": "ymm", "avx2": "ymm", "generic": "xmm"}
SUFFIX = {"float32": "ps", "float64": "pd"}
# A load of one number into every lane: a broadcast, an operand that is broadcast, or a load that is splat later.
BROADCAST = r"vbroadcasts|v?movddup|v?movs[sd]\s|vfmadd.*\{1to"
BUILDERS = {"forward": build_forward, "training": build_training, "backward": build_backward}
EXPORTED = GEMM, GEMM_TN, UNPACKED_GEMM_NT, UNPACKED_GEMM_NN, DROP_PANEL, DROP_ROW
# A cell of two stages, and one with every option.
VARIANTS = {name: variant_spec(name, 8, 8).variant for name in ("reset-before", "lstm-all")}
WITHOUT_GEMM = {"sru": RNNSpec(sru, 8, 8).variant}


@cache
def functions(mode, dtype, target, module="forward"):
    """The assembly of a cell's module: the lines of each function by name."""
    return parsed(BUILDERS[module](variant_of(mode), dtype, target), target)


def variant_of(mode):
    """The default variant of a mode, or the one of that name."""
    named = VARIANTS | WITHOUT_GEMM
    return named[mode] if mode in named else FAMILIES[mode].default


def multiplying(lines, dtype):
    """The loops over k, by their number of vector products."""
    pattern = rf"v?(fmadd\d+|mul){SUFFIX[dtype]}\b"
    counted = [(sum(bool(re.match(pattern, line)) for line in body), body) for body in loops(lines)]
    return {count: body for count, body in counted if count}


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def pinned(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def microkernels(dtype, target, kind="nn"):
    """Each micro-kernel: its name, rows and vectors, its unrolled loop over k and the loop over the remainder."""
    code = common_functions(kind, dtype, target)
    max_rows, width = target.tile
    for rows, col_vecs in itertools.product(range(1, max_rows + 1), range(1, width + 1)):
        name, products = f"microkernel_{kind}{rows}x{col_vecs}", rows * col_vecs
        by_products = multiplying(code[name], dtype)
        unrolled = products * unrolled_steps(col_vecs, target)
        assert set(by_products) == {products, unrolled}, name
        yield name, rows, col_vecs, by_products[unrolled], by_products[products]


def unrolled_steps(col_vecs, target):
    """Steps of k per iteration of a micro-kernel's unrolled loop."""
    return 4 if col_vecs == target.tile[1] else 2


def assert_no_spills(dtype, target, kind="nn"):
    for name, _, _, *bodies in microkernels(dtype, target, kind):
        lines = common_functions(kind, dtype, target)[name]
        # %rbp points into the stack only in a function with a frame pointer; elsewhere it is a general register.
        framed = any(re.match(r"movq\s+%rsp, %rbp", line) for line in lines)
        pointer = r"\([^)]*%r(sp|bp)\b" if framed else r"\([^)]*%rsp\b"
        for body in bodies:
            stack = [line for line in body if re.search(pointer, line)]
            assert not stack, f"{name}: {stack}"


@pytest.fixture(params=["nn", "tn"])
def kind(request):
    return request.param


def test_microkernels_do_not_spill(dtype, pinned, kind):
    """Accumulators, operands and addresses stay in registers: no loop over k touches the stack."""
    assert_no_spills(dtype, pinned, kind)


def test_one_instruction_per_product(dtype, pinned, kind):
    """One instruction per product, on whole vectors; separate additions only on targets without FMA."""
    for name, _, col_vecs, *bodies in microkernels(dtype, pinned, kind):
        for body in bodies:
            products = [line for line in body if re.match(rf"v?(fmadd\d+|mul){SUFFIX[dtype]}\b", line)]
            sums = [line for line in body if re.match(rf"v?add{SUFFIX[dtype]}\b", line)]
            if pinned.fma:
                # An element of A that is used once may give its register to the sum.
                forms = "231" if col_vecs > 1 else r"\d+"
                assert all(re.match(f"vfmadd{forms}{SUFFIX[dtype]}", line) for line in products)
                assert not sums
            else:
                assert len(sums) == len(products)
            registers = set(re.findall(r"%([xyz]mm)\d+", " ".join(products + sums)))
            assert registers == {REGISTERS[pinned.name]}, name


def test_operands_are_loaded_once(dtype, pinned, kind):
    """A step of k reads each vector of B once, and each row of A once, and writes nothing."""
    if kind == "tn" and not pinned.fma:
        pytest.skip("without broadcast loads, adjacent elements of A are loaded as one vector")
    for _, rows, col_vecs, unrolled, remainder in microkernels(dtype, pinned, kind):
        for body, steps in ((unrolled, unrolled_steps(col_vecs, pinned)), (remainder, 1)):
            memory = [line for line in body if "(" in line and not line.startswith(("prefetch", "lea"))]
            scalars = [line for line in memory if re.match(BROADCAST, line)]
            assert len(scalars) == rows * steps
            assert len(memory) - len(scalars) == col_vecs * steps
            assert not [line for line in memory if line.endswith(")")]


@pytest.mark.parametrize(
    ("module", "function", "quotients"),
    [("forward", "direction_loop", 5), ("training", "direction_loop", 5), ("backward", "direction_loop", 1)],
)
@pytest.mark.one_value("dtype")
def test_gate_maths_uses_whole_vectors(dtype, pinned, module, function, quotients):
    """The cell's maths, such as exp and division, runs on vectors of full width."""
    lines = functions("lstm", dtype, pinned, module)[function]
    divisions = [line for line in lines if re.match(rf"v?div{SUFFIX[dtype]}\b", line)]
    assert len(divisions) >= quotients  # forward: three sigmoids, two tanhs; backward: tanh of the new c
    assert all(f"%{REGISTERS[pinned.name]}" in line for line in divisions)
    scalar = {"float32": "ss", "float64": "sd"}[dtype]
    assert not [line for line in lines if re.match(rf"v?(div|mul|fmadd\d+|add|sub){scalar}\b", line)]


@pytest.mark.parametrize("module", ["training", "backward"])
@pytest.mark.parametrize("mode", ["lstm", "gru", "reset-before", *WITHOUT_GEMM])
def test_steps_prefetch_what_the_next_one_needs(mode, module):
    """Each vector of saved values, and of y or dy; only in cells with a GEMM in each step, which hides the time."""
    (avx512,) = (target for target in TARGETS if target.name == "avx512")
    variant = variant_of(mode)
    lines = functions(mode, "float32", avx512, module)["direction_loop"]
    num_values = len(derivative_of(variant).saved) + 1
    num_prefetches = sum(line.startswith("prefetcht1") for line in lines)
    assert num_prefetches == 0 if mode in WITHOUT_GEMM else num_prefetches >= num_values


def called(lines):
    """The functions that code calls by name or takes the address of, each with its line."""
    matches = (re.match(r"(?:(?:call|jmp)\S*\s+|movabsq\s+\$)([a-z_]\w*)", line) for line in lines)
    return {match[1]: match.string for match in matches if match}


# Modules other than those of the test before: each on the target without FMA and on another in turn, in one format.
OTHERS = [
    *(("forward", mode) for mode in MODES if mode != "lstm"),
    *itertools.product(("training", "backward"), ("gru", *VARIANTS)),
]
CALLERS = [
    *itertools.product(BUILDERS, ["lstm"], DTYPES, TARGETS),
    *(
        (*module, DTYPES[(place + target) % 2], pinned)
        for place, module in enumerate(OTHERS)
        for target, pinned in enumerate(TARGETS)
        if not pinned.fma or target == place % (len(TARGETS) - 1)
    ),
]


@pytest.mark.parametrize(
    ("module", "mode", "dtype", "pinned"),
    CALLERS,
    ids=[f"{module}-{mode}-{dtype}-{pinned.name}" for module, mode, dtype, pinned in CALLERS],
)
def test_no_calls_into_libraries(mode, module, dtype, pinned):
    """Kernels call only their own functions, memcpy, memset and what waiting threads need; no expf, for example."""
    code = functions(mode, dtype, pinned, module)
    ours = {*code, *(signature.name for signature in EXPORTED)}
    for name, lines in code.items():
        foreign = called(lines).keys() - ours - {"memcpy", "memset", "syscall", "sched_yield"}
        assert not foreign, f"{name}: {foreign}"
    assert "gemm" in {callee for lines in code.values() for callee in called(lines)}


def test_gemms_call_only_their_microkernels(dtype, pinned, kind):
    """Not even memcpy."""
    code = common_functions(kind, dtype, pinned)
    assert {signature.name for signature in EXPORTED} & code.keys()
    for name, lines in code.items():
        # Those on unpacked weights call the GEMM of packed ones, which is in another module.
        assert not called(lines).keys() - code.keys() - {"gemm"}, f"{name}: {called(lines)}"


@pytest.mark.parametrize("pinned", [target for target in TARGETS if target.fma], ids=lambda target: target.name)
def test_vectors_of_unpacked_gemms_stay_in_registers(dtype, pinned):
    """Sums, squares of weights and shuffle masks stay in vector registers; addresses may be on the stack."""
    code = {**common_functions("nn", dtype, pinned), **common_functions("tn", dtype, pinned)}
    width = pinned.tile[1]
    # A masked tile of a whole panel, used only at a matrix's end, may spill one register.
    masked = [f"masked{rows}x{col_vecs}" for rows in (1, 4) for col_vecs in range(1, width)]
    for name in ("transposing1", f"direct1x{width}", f"direct4x{width}", *masked):
        bodies = [body for body in loops(code[name]) if any("vfmadd" in line for line in body)]
        assert bodies
        for body in bodies:
            spilled = [line for line in body if re.search(r"[yz]mm\d+.*\(%rsp\)|\(%rsp\).*[yz]mm", line)]
            assert not spilled, f"{name}: {spilled}"


def test_spills_are_detected():
    """The check itself: more accumulators than registers spill, and the test fails."""
    (avx2,) = (target for target in TARGETS if target.name == "avx2")

    class Greedy(Target):
        tile = (6, 4)

    with pytest.raises(AssertionError, match=r"microkernel_nn\dx\d: .*%rsp"):
        assert_no_spills("float32", Greedy(**vars(avx2)))
