"""Code for AArch64, compiled on any processor: in NEON's vectors, with fused multiply-add and no spills."""

import platform
import re

import llvmlite.binding as llvm
import pytest

from fusedrnn.cell.cells import FAMILIES
from fusedrnn.engines.cpu.kernels.backward import build_backward
from fusedrnn.engines.cpu.kernels.common_kernels import build_common, build_common_training
from fusedrnn.engines.cpu.kernels.forward import build_forward
from fusedrnn.engines.cpu.kernels.training import build_training
from fusedrnn.jit.target import known_targets
from fusedrnn.spec import DTYPES, MODES


@pytest.fixture
def assembly(monkeypatch):
    """The assembly of a module as an AArch64 Linux machine would compile it."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        family = llvm.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite generates code for no other family")

    def emit(build, *kind):
        (neon,) = known_targets()
        machine = family.create_target_machine(cpu=neon.cpu, features=neon.features, opt=3)
        module = build(*kind, neon)
        module.triple = machine.triple
        parsed = llvm.parse_assembly(str(module))
        tuning = llvm.create_pipeline_tuning_options(speed_level=2)
        tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
        builder = llvm.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(parsed, builder)
        return machine.emit_assembly(parsed)

    return emit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("build", "kind"), [(build_common, "nn"), (build_common_training, "tn")], ids=["nn", "tn"]
)
def test_microkernels_use_fma_without_spills(assembly, dtype, build, kind):
    text = assembly(build, dtype)
    shape = {"float32": "4s", "float64": "2d"}[dtype]
    microkernel = re.search(rf"^microkernel_{kind}6x4:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)[1]
    bodies = re.findall(r"^(\.LBB\d+_\d+):(.*?)b\.\w+\s+\1$", microkernel, re.MULTILINE | re.DOTALL)
    multiplying = [body for _, body in bodies if "fmla" in body]
    assert multiplying
    for body in multiplying:
        assert re.search(rf"fmla\s+v\d+\.{shape}", body)
        assert not re.search(r"\[sp", body)


@pytest.mark.one_value("dtype")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("build", "with_quotients"),
    [
        (build_forward, ("rnn_tanh", "lstm", "gru")),
        (build_training, ("rnn_tanh", "lstm", "gru")),
        (build_backward, ("lstm", "gru")),
    ],
    ids=["forward", "training", "backward"],
)
def test_cells_divide_in_vectors(assembly, mode, dtype, build, with_quotients):
    text = assembly(build, FAMILIES[mode].default, dtype)
    shape = {"float32": "4s", "float64": "2d"}[dtype]
    assert bool(re.search(rf"fdiv\s+v\d+\.{shape}", text)) == (mode in with_quotients)
