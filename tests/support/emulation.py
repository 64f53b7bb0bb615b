"""Code for emulated targets, compiled without optimization: in less time, with the same bits.

Such code runs in tests alone, to show that what the emitters wrote for other vectors and tiles is right. No processor
is meant to run it fast, and the optimized code of all targets is read in the tests of emitted code.
"""

import llvmlite.binding as llvm

from fusedrnn.jit import compiler

_compile_optimized = compiler.compile_module


def compile_module(module, target, debug=0):
    """The object file of a module, as :func:`fusedrnn.jit.compiler.compile_module` returns it."""
    if not target.emulated:
        return _compile_optimized(module, target, debug)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=target.cpu, features=target.features, opt=0, reloc="default", codemodel="jitdefault", jit=True
    )
    module.triple = machine.triple
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return bytes(machine.emit_object(parsed))
