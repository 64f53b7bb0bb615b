"""The code that comes out, with the processor pinned per target: full vectors, fused multiply-add, no spills.

The assembly is made here for every target of the family, whether this processor can run it or not.
"""

import itertools
import re
from functools import cache as remembered

import pytest
from variants import variant_spec

from fusedrnn.cell.cells import FAMILIES
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.common import build_common, build_common_training
from fusedrnn.engines.cpu.kernels.dropout import DROP_PANEL, DROP_ROW
from fusedrnn.engines.cpu.kernels.forward import build_forward, build_training
from fusedrnn.engines.cpu.kernels.gemm import _UNROLL, _UNROLL_OF_PART, GEMM, GEMM_TN
from fusedrnn.engines.cpu.kernels.gemm_unpacked import UNPACKED_GEMM_NN, UNPACKED_GEMM_NT
from fusedrnn.jit import compiler
from fusedrnn.jit.target import Target, is_x86, known_targets
from fusedrnn.spec import DTYPES, MODES

pytestmark = pytest.mark.skipif(not is_x86(), reason="knows the instructions of x86 only")

REGISTERS = {"avx512": "zmm", "avx512-half": "ymm", "avx2": "ymm", "generic": "xmm"}
SUFFIX = {"float32": "ps", "float64": "pd"}
# A number from memory for every lane: broadcast on its way into a register or an operation, or loaded, then spread.
BROADCAST = r"vbroadcasts|v?movddup|v?movs[sd]\s|vfmadd.*\{1to"
TARGETS = known_targets() if is_x86() else ()
BUILDERS = {"forward": build_forward, "training": build_training, "backward": build_backward}
EXPORTED = GEMM, GEMM_TN, UNPACKED_GEMM_NT, UNPACKED_GEMM_NN, DROP_PANEL, DROP_ROW
SHARED = {"tile": build_common, "upright": build_common_training}
# Beside the plain cells one of two stages, and one that has everything there is.
VARIANTS = {name: variant_spec(name, 8, 8).variant for name in ("reset-before", "lstm-all")}


@remembered
def functions(mode, dtype, target, module="forward"):
    """The assembly of a cell's module: the lines of each function by its name."""
    variant = VARIANTS[mode] if mode in VARIANTS else FAMILIES[mode].default
    return parsed(BUILDERS[module](variant, dtype, target), target)


@remembered
def shared_functions(kind, dtype, target):
    """The same of the module that has the tiles of that kind."""
    return parsed(SHARED[kind](dtype, target), target)


def parsed(module, target):
    text = compiler.assembly(module, target)
    found = re.findall(r"^(\w+):\n(.*?)^\.Lfunc_end\d+:$", text, re.MULTILINE | re.DOTALL)
    return {name: [line.strip() for line in body.splitlines()] for name, body in found}


def loops(lines):
    """Innermost loops: what lies between a label and the jump back to it, with no other label between."""
    found, label, body = [], None, []
    for line in lines:
        if match := re.fullmatch(r"(\.LBB\d+_\d+):.*", line):
            label, body = match[1], []
        elif label and re.fullmatch(rf"j\w+\s+{re.escape(label)}", line):
            found.append(body)
            label, body = None, []
        else:
            body.append(line)
    return found


def multiplying(lines, dtype):
    """The loops over k, by how many products of whole vectors a turn makes."""
    pattern = rf"v?(fmadd\d+|mul){SUFFIX[dtype]}\b"
    counted = [(sum(bool(re.match(pattern, line)) for line in body), body) for body in loops(lines)]
    return {count: body for count, body in counted if count}


@pytest.fixture(params=TARGETS, ids=lambda target: target.name)
def pinned(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def tiles(dtype, target, kind="tile"):
    """For each tile in use: its name, its rows, its vectors, and its loops over k: the unrolled one, the rest's."""
    code = shared_functions(kind, dtype, target)
    rows, width = target.tile
    for count, vectors in itertools.product(range(1, rows + 1), range(1, width + 1)):
        name, one = f"{kind}{count}x{vectors}", count * vectors
        found = multiplying(code[name], dtype)
        many = one * steps(vectors, target)
        assert set(found) == {one, many}, name
        yield name, count, vectors, found[many], found[one]


def steps(vectors, target):
    """Steps of k in a turn of a tile's unrolled loop."""
    return _UNROLL if vectors == target.tile[1] else _UNROLL_OF_PART


def assert_no_spills(dtype, target, kind="tile"):
    for name, _, _, *bodies in tiles(dtype, target, kind):
        lines = shared_functions(kind, dtype, target)[name]
        # %rbp points into the stack only in a function that makes it; elsewhere it is a register like any other.
        framed = any(re.match(r"movq\s+%rsp, %rbp", line) for line in lines)
        pointer = r"\([^)]*%r(sp|bp)\b" if framed else r"\([^)]*%rsp\b"
        for body in bodies:
            stack = [line for line in body if re.search(pointer, line)]
            assert not stack, f"{name}: {stack}"


@pytest.fixture(params=["tile", "upright"])
def kind(request):
    return request.param


def test_no_spills(dtype, pinned, kind):
    """Accumulators, operands and addresses stay in registers: a loop over k touches no stack."""
    assert_no_spills(dtype, pinned, kind)


def test_products(dtype, pinned, kind):
    """One instruction a product, on whole vectors; separate sums only where no instruction does both."""
    for name, _, vectors, *bodies in tiles(dtype, pinned, kind):
        for body in bodies:
            products = [line for line in body if re.match(rf"v?(fmadd\d+|mul){SUFFIX[dtype]}\b", line)]
            sums = [line for line in body if re.match(rf"v?add{SUFFIX[dtype]}\b", line)]
            if pinned.fma:
                # Where an element of A is used once, its register may be the one that the sum ends up in.
                forms = "231" if vectors > 1 else r"\d+"
                assert all(re.match(f"vfmadd{forms}{SUFFIX[dtype]}", line) for line in products)
                assert not sums
            else:
                assert len(sums) == len(products)
            registers = set(re.findall(r"%([xyz]mm)\d+", " ".join(products + sums)))
            assert registers == {REGISTERS[pinned.name]}, name


def test_operands_are_loaded_once(dtype, pinned, kind):
    """A step of k reads each vector of B once, and each row of A once, and writes nothing."""
    if kind == "upright" and not pinned.fma:
        pytest.skip("without a broadcast from memory rows that lie side by side are loaded at once")
    for _, count, vectors, unrolled, rest in tiles(dtype, pinned, kind):
        for body, turns in ((unrolled, steps(vectors, pinned)), (rest, 1)):
            memory = [line for line in body if "(" in line and not line.startswith(("prefetch", "lea"))]
            scalars = [line for line in memory if re.match(BROADCAST, line)]
            assert len(scalars) == count * turns
            assert len(memory) - len(scalars) == vectors * turns
            assert not [line for line in memory if line.endswith(")")]


@pytest.mark.parametrize(
    ("module", "function", "quotients"),
    [("forward", "sequence", 5), ("training", "sequence", 5), ("backward", "sweep", 1)],
)
def test_gate_maths_in_whole_vectors(dtype, pinned, module, function, quotients):
    """exp, divisions and the like behind the GEMM are vectors of full width as well."""
    lines = functions("lstm", dtype, pinned, module)[function]
    divisions = [line for line in lines if re.match(rf"v?div{SUFFIX[dtype]}\b", line)]
    assert len(divisions) >= quotients  # forward: three sigmoids, two tanhs; backward: tanh of the new c
    assert all(f"%{REGISTERS[pinned.name]}" in line for line in divisions)
    scalar = {"float32": "ss", "float64": "sd"}[dtype]
    assert not [line for line in lines if re.match(rf"v?(div|mul|fmadd\d+|add|sub){scalar}\b", line)]


def called(lines):
    """The functions that code calls by name, or whose addresses it takes to call them: each with its line."""
    found = (re.match(r"(?:(?:call|jmp)\S*\s+|movabsq\s+\$)([a-z_]\w*)", line) for line in lines)
    return {match[1]: match.string for match in found if match}


@pytest.mark.parametrize(
    ("module", "mode"),
    [
        *(("forward", mode) for mode in MODES),
        *itertools.product(("training", "backward"), ("lstm", "gru")),
        *itertools.product(("training", "backward"), VARIANTS),
    ],
)
def test_no_calls_into_a_library(mode, module, dtype, pinned):
    """Everything is inline or ours: no expf; memory is copied and threads wait by the system's means."""
    code = functions(mode, dtype, pinned, module)
    ours = {*code, *(signature.name for signature in EXPORTED)}
    for name, lines in code.items():
        others = called(lines).keys() - ours - {"memcpy", "memset", "syscall", "sched_yield"}
        assert not others, f"{name}: {others}"
    assert "gemm" in {one for lines in code.values() for one in called(lines)}


def test_no_calls_where_it_is_hot(dtype, pinned, kind):
    """What multiplies calls its own tiles and nothing else, not even memcpy."""
    code = shared_functions(kind, dtype, pinned)
    assert {signature.name for signature in EXPORTED} & code.keys()
    for name, lines in code.items():
        assert not called(lines).keys() - code.keys(), f"{name}: {called(lines)}"


def test_spills_are_seen():
    """The check above can fail: more accumulators than registers do spill, and show."""
    (avx2,) = (target for target in TARGETS if target.name == "avx2")

    class Greedy(Target):
        tile = (6, 4)

    with pytest.raises(AssertionError, match=r"tile\dx\d: .*%rsp"):
        assert_no_spills("float32", Greedy(**vars(avx2)))
