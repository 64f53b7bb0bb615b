"""What this processor has: vector length, registers, fused multiply-add; and its name and caches, for people."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm

from fusedrnn import env

ITEM_SIZE = {"float32": 4, "float64": 8}
# Processors, by LLVM's names, that work on vectors of 512 bits in halves, one after the other.
_HALF_FOR_HALF = ("znver4",)
# How many times as many lanes whole vectors must take as halves: halves take more instructions for the same.
_WORTH_HALVES = 1.07


@dataclass(frozen=True)
class Target:
    """A vector instruction set, and the processor that code for it is compiled for.

    The processor is pinned per instruction set, not the one found, so that the same code comes out everywhere.
    """

    name: str
    description: str
    vector_bits: int
    registers: int
    fma: bool
    cpu: str
    features: str = ""
    required: tuple[str, ...] = ()

    def lanes(self, dtype: str) -> int:
        """Numbers in a vector."""
        return self.vector_bits // 8 // ITEM_SIZE[dtype]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of the micro-kernel: the largest accumulator whose operands still fit the registers."""
        if self.registers == 32:
            return 6, 4
        # Without a fused multiply-add each product needs a register before it is added.
        return (4, 3) if self.fma else (4, 2)


_X86 = (
    Target(
        "avx512", "AVX-512, 512-bit vectors", 512, 32, True, "x86-64-v4", "-prefer-256-bit",
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
    ),
    Target(
        "avx512-half", "AVX-512, 256-bit vectors", 256, 32, True, "x86-64-v4", "",
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
    ),
    Target("avx2", "AVX2 and FMA, 256-bit vectors", 256, 16, True, "x86-64-v3", "", ("avx2", "fma", "bmi2")),
    Target("generic", "SSE2, 128-bit vectors", 128, 16, False, "x86-64"),
)  # fmt: skip
_ARM = (Target("generic", "NEON, 128-bit vectors", 128, 32, True, "generic"),)


def is_x86() -> bool:
    """Whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def known() -> tuple[Target, ...]:
    """Every target of this processor's family, widest first."""
    return _X86 if is_x86() else _ARM


@lru_cache(maxsize=1)
def _host_name() -> str:
    return str(llvm.get_host_cpu_name())


@lru_cache(maxsize=1)
def _host_features() -> frozenset[str]:
    llvm.initialize_native_target()
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def available() -> tuple[Target, ...]:
    """The targets that this processor can run, widest first."""
    return tuple(target for target in known() if _host_features().issuperset(target.required))


def emulated(target: Target) -> Target:
    """The same kernels, their vectors split over those that this processor has: right, not fast."""
    host = available()[0]
    return replace(
        target,
        name=f"{target.name}-emulated",
        description=f"{target.description}, split over {host.name}",
        cpu=host.cpu,
        features=host.features,
        fma=host.fma,
        required=host.required,
    )


def current() -> Target:
    """The target in force: the widest that the processor can run, or the one ``FUSEDRNN_TARGET`` names.

    Raises:
        ValueError: If the variable names no target, or one that this processor lacks.
    """
    asked = env.target()
    if not asked:
        return available()[0]
    for target in known():
        if asked == f"{target.name}-emulated":
            return emulated(target)
        if asked == target.name:
            if target not in available():
                lacking = ", ".join(sorted(set(target.required) - _host_features()))
                raise ValueError(
                    f"FUSEDRNN_TARGET is {asked!r}, which this processor cannot run (it lacks {lacking}); "
                    f"available: {', '.join(t.name for t in available())}; "
                    f"{asked}-emulated runs the same kernels on narrower vectors"
                )
            return target
    names = ", ".join(target.name for target in known())
    raise ValueError(f"FUSEDRNN_TARGET must be one of {names}, or NAME-emulated; got {asked!r}")


def suited(hidden_size: int, dtype: str) -> Target:
    """The target for layers of so many units: the one in force, or one with half as long vectors.

    Where half a vector costs half as much it is taken if so many more lanes of the last vector would be empty.
    """
    target = current()
    if env.target() or _host_name() not in _HALF_FOR_HALF:
        return target
    halves = [other for other in available() if 2 * other.vector_bits == target.vector_bits and other.registers == 32]
    for half in halves:
        padded, less = (-(-hidden_size // one.lanes(dtype)) * one.lanes(dtype) for one in (target, half))
        if padded >= _WORTH_HALVES * less:
            return half
    return target


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches that the first core sees: ``{"L1d": ..., "L2": ..., "L3": ...}``; what is known."""
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
