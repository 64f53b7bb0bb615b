"""Compile a module to an object file with LLVM."""

from __future__ import annotations

import logging

import llvmlite
import llvmlite.binding as llvm

from fusedrnn.jit.builder import Module
from fusedrnn.jit.target import Target

logger = logging.getLogger(__name__)


def compile_module(module: Module, target: Target, debug: int = 0) -> bytes:
    """The object file of a module. If ``debug`` is 3 or more, LLVM IR is logged; if it is 4 or more, assembly too."""
    parsed, machine = optimize(module, target)
    if debug >= 3:
        logger.info(f"LLVM IR of {module.name} for {target.name}\n{parsed}")
    if debug >= 4:
        logger.info(f"assembly of {module.name} for {target.name}\n{machine.emit_assembly(parsed)}")
    return bytes(machine.emit_object(parsed))


def assembly(module: Module, target: Target) -> str:
    """The assembly of a module, as text."""
    parsed, machine = optimize(module, target)
    return str(machine.emit_assembly(parsed))


def optimize(module: Module, target: Target) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """The module after LLVM's passes, and the machine to emit code for.

    Vectorizers and unrollers are off: the emitters write vectors and unrolled loops themselves.
    """
    machine = target_machine(target)
    module.triple = machine.triple
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed, machine


def target_machine(target: Target) -> llvm.TargetMachine:
    """LLVM's description of the processor to compile for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def version() -> str:
    """The version of the compiler and what it compiles for: object files of another version are not loaded."""
    return f"{llvmlite.__version__} {llvm.llvm_version_info} {llvm.get_process_triple()}"
