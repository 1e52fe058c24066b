"""How many blocks of a kernel a multiprocessor of an NVIDIA GPU holds at once, by calculation.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications; granularities: NVIDIA's
occupancy calculator (registers are given out to a warp by 256, warps by 4, shared memory by 128 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fuser.ir.errors import FuserError
from fuser.ir.target import REGISTERS, RESERVED_SHARED_BYTES

_REGISTER_UNIT = 256
_WARP_UNIT = 4
_SHARED_UNIT = 128
_MAX_REGISTERS = 255
_MAX_THREADS = 1024
_KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at most: blocks, warps and bytes of shared memory, of which ``block_shared_bytes``
    may go to one block."""

    blocks: int
    warps: int
    shared_bytes: int

    @property
    def block_shared_bytes(self) -> int:
        return self.shared_bytes - RESERVED_SHARED_BYTES


_AMPERE = Multiprocessor(32, 64, 164 * _KIB)
_HOPPER = Multiprocessor(32, 64, 228 * _KIB)
_MULTIPROCESSORS = {
    "sm_80": _AMPERE,
    "sm_86": Multiprocessor(16, 48, 100 * _KIB),
    "sm_87": Multiprocessor(16, 48, 164 * _KIB),
    "sm_89": Multiprocessor(24, 48, 100 * _KIB),
    "sm_90": _HOPPER,
    "sm_90a": _HOPPER,
    "sm_100": _HOPPER,
    "sm_103": _HOPPER,
    "sm_120": Multiprocessor(24, 48, 100 * _KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """``blocks`` of a multiprocessor at once, the share of its warps that they are, and what stops one more block:
    ``"blocks"``, ``"warps"``, ``"registers"`` or ``"shared memory"``."""

    blocks: int
    share: float
    limit: str


def multiprocessor(arch: str) -> Multiprocessor:
    """The limits of an architecture (``"sm_80"`` …). Raises FuserError for one that is not known."""
    if arch not in _MULTIPROCESSORS:
        raise FuserError(f"no limits are known for the architecture {arch!r}, only for {', '.join(_MULTIPROCESSORS)}")
    return _MULTIPROCESSORS[arch]


def occupancy(arch: str, *, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """The occupancy of a kernel with blocks of ``threads`` threads, ``registers`` registers a thread, and static and
    dynamic ``shared_bytes`` together a block. Zero blocks: it cannot be launched.

    Raises FuserError for an unknown architecture and ValueError for numbers that no kernel has.
    """
    limits = multiprocessor(arch)
    if threads < 1 or not 0 <= registers <= _MAX_REGISTERS or shared_bytes < 0:
        raise ValueError(f"no kernel has {threads} threads, {registers} registers and {shared_bytes} bytes")
    warps = math.ceil(threads / 32)
    if threads > _MAX_THREADS:
        return Occupancy(0, 0.0, "warps")
    by_warp = max(_round_up(registers * 32, _REGISTER_UNIT), _REGISTER_UNIT)
    bounds = {
        "warps": limits.warps // warps,
        "registers": REGISTERS // by_warp // _WARP_UNIT * _WARP_UNIT // warps,
        "shared memory": limits.shared_bytes // _round_up(shared_bytes + RESERVED_SHARED_BYTES, _SHARED_UNIT),
        "blocks": limits.blocks,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps / limits.warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
