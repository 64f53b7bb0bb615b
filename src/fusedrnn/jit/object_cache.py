"""Machine code: compiled from a module, kept on disk between runs, loaded into the process.

A file in the cache is named by a hash of everything its code depends on. It begins with a hash of that name and of the
rest of itself: what is damaged, half written, unreadable or another file's content is compiled again. Files are written
under another name and then renamed, so that two processes may write at once. Only a folder that no other user can write
to is used, see :mod:`fusedrnn.jit.cache_folder`; where there is none, kernels stay in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from fusedrnn import env
from fusedrnn.jit import sources
from fusedrnn.jit.cache_folder import Folder, UntrustedError
from fusedrnn.jit.target import Target

logger = logging.getLogger(__name__)

cache_directory = env.cache_directory

_FORMAT = b"fusedrnn object file 2\n"
_DIGEST = hashlib.sha256().digest_size
# Files of this package, finished or being written; anything else in the folder is left alone.
_OBJECT = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\.o")
_TEMPORARY = re.compile(r"[A-Za-z]\w*-[a-z0-9-]+-[0-9a-f]{32}\w*(\.\w+)?\.tmp")
# Enough for dozens of cells in every dtype on every target; the oldest go first. Most files have 10 to 30 KB.
_MOST_FILES = 1024
_MOST_BYTES = 256 << 20
_LARGEST_FILE = 64 << 20
# Seconds. Writing a file takes milliseconds: one that is older was left by a process that was killed.
_STALE = 3600.0


class LoadedObject:
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


def load(name: str, target: Target, build: Callable[[], ir.Module], needs: Sequence[bytes] = ()) -> LoadedObject:
    """The code of that name, ready to run; functions that its module only declares are in the object files it needs."""
    return LoadedObject(name, target, fetch(name, target, build), needs)


def fetch(name: str, target: Target, build: Callable[[], ir.Module]) -> bytes:
    """The object file of that name for that target: from the disk if it is there, else what ``build`` makes."""
    path = env.cache_directory()
    key = _key(name, target) if path else None
    if path is None or key is None:
        return compile_module(build(), target)
    file = f"{name}-{target.name}-{key}.o"
    image = _read(path, file) if env.debug() < 3 else None
    if image is None:
        image = compile_module(build(), target)
        _write(path, file, image)
    return image


def compile_module(module: ir.Module, target: Target) -> bytes:
    """An object file. No vectorizer or unroller: the vectors are explicit, the loops are as they should be."""
    parsed, machine = optimize(module, target)
    if env.debug() >= 3:
        logger.info(f"LLVM IR of {module.name} for {target.name}\n{parsed}")
    if env.debug() >= 4:
        logger.info(f"assembly of {module.name} for {target.name}\n{machine.emit_assembly(parsed)}")
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


def _seal(file: str, image: bytes) -> bytes:
    """What a file begins with: no content passes for that of a file with another name."""
    return _FORMAT + hashlib.sha256(file.encode() + b"\0" + image).digest()


def _read(path: Path, file: str) -> bytes | None:
    content = None
    try:
        with Folder(path) as folder:
            try:
                content = folder.read(file, _LARGEST_FILE)
            except UntrustedError as error:
                env.warn_once(str(path), f"fusedrnn compiles a kernel again that it does not load: {error}.")
    except UntrustedError as error:
        _warn_memory_only(path, error)
    except OSError:
        return None
    if content is None:
        return None
    seal, image = content[: len(_FORMAT) + _DIGEST], content[len(_FORMAT) + _DIGEST :]
    return image if image and seal == _seal(file, image) else None


def _write(path: Path, file: str, image: bytes) -> None:
    temporary = f"{file.removesuffix('.o')}.{os.urandom(8).hex()}.tmp"
    try:
        with Folder(path, make=True) as folder:
            folder.write(file, temporary, _seal(file, image) + image)
            _prune(folder, file)
    except UntrustedError as error:
        _warn_memory_only(path, error)
    except OSError:
        # Nothing is lost but time: the code in hand is good.
        return


def _warn_memory_only(path: Path, error: UntrustedError) -> None:
    env.warn_once(
        str(path),
        f"fusedrnn keeps compiled kernels in memory and loads none from {path}, where another user could have placed "
        f"code: {error}. For another folder set FUSEDRNN_CACHE_DIR, for none to an empty string.",
    )


def _prune(folder: Folder, written: str) -> None:
    """Remove the oldest files that exceed the limits, but not the one just written, and temporary files left over."""
    objects, now = [], time.time()
    for name, status in folder.files():
        if _TEMPORARY.fullmatch(name):
            if now - status.st_mtime > _STALE:
                folder.remove(name)
        elif _OBJECT.fullmatch(name) and name != written:
            objects.append((status.st_mtime, status.st_size, name))
    number, size = 1, 0
    for _, its_size, name in sorted(objects, reverse=True):
        number, size = number + 1, size + its_size
        if number > _MOST_FILES or size > _MOST_BYTES:
            folder.remove(name)
