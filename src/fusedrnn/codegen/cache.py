"""Machine code: compiled from a module, kept on disk between runs, loaded into the process.

A file in the cache is named by a hash of everything its code depends on and begins with a hash of the rest of itself:
whatever is damaged, half written or unreadable is compiled again. Files are written under another name and then
renamed, so that two processes may write at once. A folder that cannot be written costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from fusedrnn import config
from fusedrnn.codegen import sources
from fusedrnn.codegen.target import Target

cache_directory = config.cache_directory

_DIGEST = hashlib.sha256().digest_size
# Enough for dozens of cells in every dtype on every target; the oldest go first. Most files have 10 to 30 KB.
_MOST_FILES = 1024


class MachineCode:
    """Functions in executable memory, callable by address for as long as this object lives."""

    def __init__(self, name: str, target: Target, image: bytes, needs: Sequence[bytes] = ()) -> None:
        self.name, self.image = name, image
        empty = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"')
        self._engine = llvm.create_mcjit_compiler(empty, _machine(target))
        # A copy of what it calls is part of it: near, and gone with it.
        for one in (image, *needs):
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(one))
        self._engine.finalize_object()

    def address(self, function: str) -> int:
        """Where that function begins."""
        found = self._engine.get_function_address(function)
        if not found:
            raise LookupError(f"{self.name} has no function {function!r}")
        return int(found)


def load(name: str, target: Target, build: Callable[[], ir.Module], needs: Sequence[bytes] = ()) -> MachineCode:
    """The code of that name, ready to run; functions that its module only declares are in the object files it needs."""
    return MachineCode(name, target, fetch(name, target, build), needs)


def fetch(name: str, target: Target, build: Callable[[], ir.Module]) -> bytes:
    """The object file of that name for that target: from the disk if it is there, else what ``build`` makes."""
    folder = config.cache_directory()
    key = _key(name, target) if folder else None
    path = folder / f"{name}-{target.name}-{key}.o" if folder and key else None
    image = _read(path) if path and config.debug() < 3 else None
    if image is not None:
        return image
    image = compile_module(build(), target)
    if path:
        _write(path, image)
    return image


def compile_module(module: ir.Module, target: Target) -> bytes:
    """An object file. No vectorizer or unroller: the vectors are explicit, the loops are as they should be."""
    parsed, machine = optimize(module, target)
    if config.debug() >= 3:
        config.report(f"LLVM IR of {module.name} for {target.name}\n{parsed}")
    if config.debug() >= 4:
        config.report(f"assembly of {module.name} for {target.name}\n{machine.emit_assembly(parsed)}")
    return bytes(machine.emit_object(parsed))


def assembly(module: ir.Module, target: Target) -> str:
    """What the compiler emits, as text."""
    parsed, machine = optimize(module, target)
    return str(machine.emit_assembly(parsed))


def optimize(module: ir.Module, target: Target) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """The module after LLVM's passes, and the machine to emit it for."""
    machine = _machine(target)
    module.triple = machine.triple
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = tuning.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return parsed, machine


@lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(target: Target) -> llvm.TargetMachine:
    _initialize()
    found = llvm.Target.from_triple(llvm.get_process_triple())
    return found.create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def _key(name: str, target: Target) -> str | None:
    """A hash of what the code depends on; None where that is not known."""
    emitters = sources.digest()
    if emitters is None:
        return None
    version = f"{llvmlite.__version__} {llvm.llvm_version_info} {llvm.get_process_triple()}"
    return hashlib.sha256(emitters + f"{name} {target} {version}".encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:_DIGEST], content[_DIGEST:]
    return image if image and hashlib.sha256(image).digest() == digest else None


def _write(path: Path, image: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(image).digest() + image)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _prune(path.parent)
    except OSError:
        # Nothing is lost but time: the code in hand is good.
        return


def _prune(folder: Path) -> None:
    files = sorted(folder.glob("*.o"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_MOST_FILES]:
        path.unlink(missing_ok=True)
