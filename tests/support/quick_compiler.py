"""Compiles code for the tests, much of it without optimization: that takes less time and gives the same bits.

- What users run most is always optimized: GEMMs, threads and the four modes in float32 on the native target.
- The code of emulated targets, which is not meant to be fast, is never optimized.
- The rest is other targets, formats, variants and cells, whose kernels come from the same emitters. Of these, one
  module in eight is optimized, drawn by its name. ``--all-cases`` optimizes all of them.

The tests of emitted code read the optimized code of all targets.
"""

import zlib

import llvmlite.binding as llvm

from fusedrnn.cell.cells import FAMILIES
from fusedrnn.jit import compiler
from fusedrnn.jit.host import available_targets

_compile_optimized = compiler.compile_module
_NATIVE = available_targets()[0]
_NATIVE_NAMES = (_NATIVE.name, _NATIVE.base and _NATIVE.base.name)  # float32 has the base's code
_JOBS = ("forward", "training", "backward")
_MODES = {f"{family.default.slug}_float32" for family in FAMILIES.values()}


def compile_module(module, target, debug=0, *, all_optimized=False):
    """The object file of a module, as :func:`fusedrnn.jit.compiler.compile_module` returns it."""
    if debug or _is_optimized(module, target, all_optimized):  # with debug, tests read what it logs
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


def _is_optimized(module, target, all_optimized):
    job, _, cell = module.name.partition("_")
    is_usual = target.name in _NATIVE_NAMES and (job not in _JOBS or cell in _MODES)
    is_drawn = zlib.crc32(f"{module.name} {target.name}".encode()) % 8 == 0
    return not target.emulated and (is_usual or is_drawn or all_optimized)
