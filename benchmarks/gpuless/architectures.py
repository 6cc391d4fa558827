"""Limits of GPUs by compute capability, and the occupancy that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
WARP_REGISTERS, REGISTERS = 256, 65536  # registers are allocated to a warp in units; a multiprocessor has this many
RESERVED = 1024  # bytes of shared memory that the system takes of each block


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, and of one block.

    Args:
        warps, blocks: the most that are resident at once.
        shared: bytes of shared memory of the multiprocessor.
        shared_block: bytes of shared memory that one block may have, with opt-in.
        multiprocessors: the number on the largest common chip.
    """

    warps: int
    blocks: int
    shared: int
    shared_block: int
    multiprocessors: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
ARCHITECTURES = {
    80: Architecture(64, 32, 164 * KIB, 163 * KIB, 108),
    86: Architecture(48, 16, 100 * KIB, 99 * KIB, 84),
    89: Architecture(48, 24, 100 * KIB, 99 * KIB, 128),
    90: Architecture(64, 32, 228 * KIB, 227 * KIB, 132),
    100: Architecture(64, 32, 228 * KIB, 227 * KIB, 148),
    120: Architecture(48, 24, 100 * KIB, 99 * KIB, 170),
}
# No kernel may spill on these GPUs, nor ask for more shared memory than a block may have there.
GATED = ("sm_80", "sm_86", "sm_89", "sm_90")


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks of a multiprocessor, the share of its warps that they occupy, and what limits their number."""

    blocks: int
    share: float
    limited_by: str


def occupancy(capability: int, registers: int, shared: int, warps: int) -> Occupancy:
    """Return the occupancy of a kernel by the rules of CUDA's occupancy calculator.

    Registers are allocated in units of 256 for each warp, within a quarter of the multiprocessor, and shared memory in
    units of 128 bytes.

    Args:
        capability: 80 for sm_80.
        registers: registers of a thread.
        shared: bytes of a block.
        warps: warps of a block.

    Raises:
        KeyError: the capability is not in `ARCHITECTURES`.
    """
    chip = ARCHITECTURES[capability]
    per_warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
    limits = {
        "registers": REGISTERS // 4 // per_warp * 4 // warps if registers else chip.blocks,
        "shared memory": chip.shared // (-(-(shared + RESERVED) // 128) * 128),
        "warps": chip.warps // warps,
        "blocks": chip.blocks,
    }
    by = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[by], limits[by] * warps / chip.warps, by)


def capability_of(target: str) -> int | None:
    """Return 80 for `sm_80` or `sm_80a`, None for the name of another maker's GPU."""
    number = target.removeprefix("sm_").removesuffix("a")
    return int(number) if target.startswith("sm_") and number.isdigit() else None


def shared_block_limit(target: str) -> int | None:
    """Return the bytes of shared memory that a block may have on a target, None where that is not known."""
    capability = capability_of(target)
    if capability is None:
        return 160 * KIB if target == "gfx950" else 64 * KIB
    return ARCHITECTURES[capability].shared_block if capability in ARCHITECTURES else None
