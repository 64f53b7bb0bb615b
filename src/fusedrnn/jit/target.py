"""Vector instruction sets to compile for: vector length, registers, fused multiply-add.

The code of kernels depends on this module, but not on :mod:`fusedrnn.jit.host`, which says what this processor has.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace

ITEM_SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "int8": 1, "int8_weights": 1}


@dataclass(frozen=True)
class Target:
    """A vector instruction set, and the processor that code for it is compiled for.

    That processor is fixed per instruction set, so that the same code comes out on every machine.

    Attributes:
        name: What ``FUSEDRNN_TARGET`` calls it.
        description: What it is, for users.
        vector_bits: Length of its vectors.
        registers: Number of its vector registers.
        fma: Whether it has fused multiply-add.
        cpu: LLVM's name of the processor to compile for.
        features: LLVM's features beyond those of ``cpu``.
        required: LLVM's features that a processor must have to run the code.
        format_tile: A tile in place of the usual one. It is set for GEMM operands of another format than the sums, see
            :meth:`for_compute`, and for processors on which another tile is faster, see :mod:`fusedrnn.jit.host`.
        dot_products: Formats of GEMM operands for which it has an instruction that adds the products of a group.
        has_tiles: Whether those instructions multiply tiles, as AMX's do, and not vectors.
        base: The same target without those instructions; None if it has none.
        narrow_weights: Whether packed weights have the format of operands; if not, they are rounded to it, but stored
            in the format of sums.
        emulated: Whether its kernels are compiled for this processor, which may lack the target's instructions.
    """

    name: str
    description: str
    vector_bits: int
    registers: int
    fma: bool
    cpu: str
    features: str = ""
    required: tuple[str, ...] = ()
    format_tile: tuple[int, int] | None = None
    dot_products: tuple[str, ...] = ()
    has_tiles: bool = False
    base: Target | None = None
    narrow_weights: bool = True
    emulated: bool = False

    def lanes(self, dtype: str) -> int:
        """Elements of a vector."""
        return self.vector_bits // 8 // ITEM_SIZE[dtype]

    def multiplies_pairs(self, compute: str) -> bool:
        """Whether it multiplies vectors of pairs of that format and adds them in float32.

        Processors with tiles have that instruction, too, but it takes twice as long as the same products in float32.
        """
        return compute == "bfloat16" and compute in self.dot_products and not self.has_tiles

    def multiplies_tiles(self, compute: str) -> bool:
        """Whether it multiplies tiles of that format."""
        return self.has_tiles and compute in self.dot_products

    def for_compute(self, compute: str, narrow_weights: bool = True) -> Target:
        """The target for GEMM operands of that format, with the tile for them.

        If the target has no dot product for the format, this is its base target, so that code for other formats is
        compiled only once. There, narrow weights are widened to float32 in registers. That pays only where it saves
        traffic, and never on a target without a fused multiply-add: SSE2 has no instruction that widens. The bits are
        the same.
        """
        if compute in self.dot_products:
            return self
        base = self.base or self
        if compute in ("bfloat16", "int8_weights") and not (narrow_weights and base.fma):
            return replace(base, narrow_weights=False)
        tile = _TILES.get(compute, {}).get((base.registers, base.fma))
        return base if tile is None else replace(base, format_tile=tile)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors of the micro-kernel: as many accumulators as the registers hold beside their operands."""
        if self.format_tile:
            return self.format_tile
        if self.registers == 32:
            return (9, 3) if self.vector_bits == 512 else (6, 4)
        # Without a fused multiply-add each product needs a register before it is added.
        return (4, 3) if self.fma else (4, 2)

    @property
    def one_row_panels(self) -> int:
        """How many panels the micro-kernel for one row has: one panel has too few vectors, each a chain of sums."""
        return -(-_MIN_CHAINS[self.registers] // self.tile[1])


# By number of registers: how many chains of multiply-adds keep a processor busy. In a chain, each one waits some four
# cycles for the one before.
_MIN_CHAINS = {16: 6, 32: 8}
# Tiles by number of registers and by whether there is a fused multiply-add. Widened operands take registers, too.
_TILES = {
    "bfloat16": {(32, True): (6, 3), (16, True): (5, 2)},
    "int8": {(32, True): (6, 4), (16, True): (5, 2), (16, False): (4, 2)},
    "int8_weights": {(32, True): (6, 4), (16, True): (4, 3)},
}


def _with_dot_products(
    base: Target, name: str, formats: tuple[str, ...], instructions: str, required: tuple[str, ...]
) -> Target:
    """A target with more instructions."""
    return replace(
        base,
        name=f"{base.name}-{name}",
        description=f"{base.description}, {instructions}",
        features=",".join(filter(None, [base.features, *(f"+{feature}" for feature in required)])),
        required=base.required + required,
        dot_products=formats,
        base=base,
    )


def _with_avx512_dot_products(base: Target) -> tuple[Target, ...]:
    """The targets of AVX-512 with the instructions that later processors added, then the one without them."""
    vnni, bf16 = ("avx512vnni",), ("avx512vnni", "avx512bf16")
    return (
        _with_dot_products(base, "bf16", ("bfloat16", "int8"), "VNNI and BF16", bf16),
        _with_dot_products(base, "vnni", ("int8",), "VNNI", vnni),
        base,
    )


_AVX512 = Target(
    "avx512", "AVX-512, 512-bit vectors", 512, 32, True, "x86-64-v4", "-prefer-256-bit",
    ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
)  # fmt: skip
_AVX512_HALF = replace(
    _AVX512, name="avx512-half", description="AVX-512, 256-bit vectors", vector_bits=256, features=""
)
_AMX = replace(
    _with_dot_products(
        _AVX512, "amx", ("bfloat16", "int8"), "AMX", ("avx512vnni", "avx512bf16", "amx-tile", "amx-bf16", "amx-int8")
    ),
    has_tiles=True,
    format_tile=(6, 4),
)
_AVX2 = Target("avx2", "AVX2 and FMA, 256-bit vectors", 256, 16, True, "x86-64-v3", "", ("avx2", "fma", "bmi2"))
_X86 = (
    _AMX,
    *_with_avx512_dot_products(_AVX512),
    *_with_avx512_dot_products(_AVX512_HALF),
    _with_dot_products(_AVX2, "vnni", ("int8",), "AVX-VNNI", ("avxvnni",)),
    _AVX2,
    Target("generic", "SSE2, 128-bit vectors", 128, 16, False, "x86-64"),
)
_ARM = (Target("generic", "NEON, 128-bit vectors", 128, 32, True, "generic"),)


def is_x86() -> bool:
    """Whether this is a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def known_targets() -> tuple[Target, ...]:
    """Every target of this processor's family, widest first."""
    return _X86 if is_x86() else _ARM


def widest_target() -> Target:
    """The target with the longest vectors, of all families: memory that is large enough for it suffices for all."""
    return max(_X86 + _ARM, key=lambda target: target.vector_bits)
