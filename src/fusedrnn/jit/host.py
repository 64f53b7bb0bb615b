"""This processor: the targets that it can run, the target in force, the processor's name and its caches."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm

from fusedrnn import env
from fusedrnn.jit.target import Target, known_targets

# Processors, by LLVM's names, that execute a 512-bit instruction as two 256-bit halves, one after the other.
_SPLITS_512_BITS = ("znver4",)
# On them, micro-kernels of this many rows and vectors were measured to be the fastest; see docs/experiments.md.
_TILE_OF_SPLIT = (6, 4)
# On these, vdpbf16ps takes twice as long as the same products in float32, and the bits are the same.
_SLOW_PAIRS = ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d")
# 256-bit vectors take more instructions for the same work. They pay only if 512-bit vectors have at least this many
# times as many lanes, padding included.
_HALF_VECTORS_PAY = 1.07

_DOT_PRODUCT_SETS = {
    "AVX-512 BF16": "avx512bf16", "AVX-512 VNNI": "avx512vnni", "AVX-VNNI": "avxvnni", "AMX-BF16": "amx-bf16",
    "AMX-INT8": "amx-int8",
}  # fmt: skip
"""LLVM's feature for each instruction set, by the name of the set."""


@lru_cache(maxsize=1)
def _host_name() -> str:
    return str(llvm.get_host_cpu_name())


@lru_cache(maxsize=1)
def _host_features() -> frozenset[str]:
    llvm.initialize_native_target()
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def dot_product_sets() -> dict[str, bool]:
    """Instruction sets with dot products of bfloat16 or int8, by name: whether this processor has each."""
    return {name: feature in _host_features() for name, feature in _DOT_PRODUCT_SETS.items()}


def available_targets() -> tuple[Target, ...]:
    """The targets that this processor can run, widest first."""
    return tuple(_with_tile(target) for target in known_targets() if not _missing(target))


def _with_tile(target: Target) -> Target:
    """The target with the tile that is the fastest on this processor. The tile changes no bit of a result."""
    if target.vector_bits == 512 and _host_name() in _SPLITS_512_BITS:
        base = None if target.base is None else _with_tile(target.base)
        return replace(target, format_tile=target.format_tile or _TILE_OF_SPLIT, base=base)
    return target


def _missing(target: Target) -> list[str]:
    """What keeps this process from running a target: features, or the permission to use tiles."""
    features = sorted(set(target.required) - _host_features())
    return features or (["permission to use AMX"] if target.has_tiles and not _tiles_are_permitted() else [])


@lru_cache(maxsize=1)
def _tiles_are_permitted() -> bool:
    """Whether the system permits tiles. The system is asked once, so that a process does not change its target."""
    from fusedrnn.jit.amx import request_permission  # few processors need it

    return request_permission()


def emulated(target: Target) -> Target:
    """The same kernels compiled for this processor: long vectors are split into shorter ones. Correct, not fast."""
    native = available_targets()[0]
    return replace(
        target,
        name=f"{target.name}-emulated",
        description=f"{target.description}, split over {native.name}",
        cpu=native.cpu,
        features=native.features,
        fma=native.fma,
        required=native.required,
        base=None if target.base is None else emulated(target.base),
        emulated=True,
    )


def _default_target() -> Target:
    """The widest target that the processor can run, except those whose instruction for pairs is slow on it."""
    is_slow = _host_name() in _SLOW_PAIRS
    return next(t for t in available_targets() if not (is_slow and t.multiplies_pairs("bfloat16")))


def current_target() -> Target:
    """The target in force: the widest that the processor runs at full speed, or the one ``FUSEDRNN_TARGET`` names.

    Raises:
        ValueError: If the variable names no target, or one that this processor cannot run.
    """
    name = env.target()
    if not name:
        return _default_target()
    for target in known_targets():
        if name == f"{target.name}-emulated":
            return emulated(target)
        if name == target.name:
            if missing := _missing(target):
                raise ValueError(
                    f"FUSEDRNN_TARGET is {name!r}, which this processor cannot run (it lacks {', '.join(missing)}); "
                    f"available: {', '.join(t.name for t in available_targets())}; "
                    f"{name}-emulated runs the same kernels on narrower vectors"
                )
            return _with_tile(target)
    names = ", ".join(target.name for target in known_targets())
    raise ValueError(f"FUSEDRNN_TARGET must be one of {names}, or NAME-emulated; got {name!r}")


def target_for(hidden_size: int, dtype: str) -> Target:
    """The target for layers of that many units: the one in force, or the one with vectors half as long.

    The shorter vectors are for processors that split 512-bit instructions, if enough fewer lanes then stay empty.
    """
    target = current_target()
    if env.target() or _host_name() not in _SPLITS_512_BITS:
        return target
    for half in available_targets():
        is_half = 2 * half.vector_bits == target.vector_bits and half.registers == 32
        if is_half and half.dot_products == target.dot_products:
            padded, padded_half = (-(-hidden_size // t.lanes(dtype)) * t.lanes(dtype) for t in (target, half))
            if padded >= _HALF_VECTORS_PAY * padded_half:
                return half
    return target


def processor_name() -> str:
    """The processor's name according to the system."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches, ``{"L1d": ..., "L2": ..., "L3": ...}``, as far as the system tells."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            number = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
            sizes["L1d" if level == "1" else f"L{level}"] = number
    return sizes
