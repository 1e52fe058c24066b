"""What a kernel is built for: a device kind, an instruction set and the measured limits that the cost model needs."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass


class Isa(enum.Enum):
    """CPU instruction sets that the templates know; the value is the name that templates and cache keys use."""

    AVX512 = "avx512"
    AVX2 = "avx2"
    NEON = "neon"
    PORTABLE = "portable"


VECTOR_BYTES = {Isa.AVX512: 64, Isa.AVX2: 32, Isa.NEON: 16, Isa.PORTABLE: 16}


@dataclass(frozen=True)
class Target:
    """One device, as a value.

    ``kind`` is ``"cpu"`` (later also ``"cuda"``), ``arch`` the :class:`Isa` value (or ``"sm_80"`` …), ``features`` are
    extensions beyond the base (``"avx512_bf16"``, ``"avx512_vnni"``). ``cores`` counts physical cores, ``cache_bytes``
    is (L1 data, L2 of one core, shared L3). ``peak_flops`` is the measured fp32 FMA rate of one core in flop/s,
    ``bandwidth`` the measured copy rate of all cores in bytes/s, ``launch_seconds`` the cost of starting one kernel.
    """

    kind: str
    arch: str
    features: frozenset[str]
    cores: int
    cache_bytes: tuple[int, int, int]
    peak_flops: float
    bandwidth: float
    launch_seconds: float

    @property
    def vector_bytes(self) -> int:
        """Width of one vector register in bytes."""
        return VECTOR_BYTES[Isa(self.arch)]

    @property
    def vector_lanes(self) -> int:
        """fp32 lanes of one vector register."""
        return self.vector_bytes // 4

    @property
    def key(self) -> str:
        """What decides whether a compiled kernel runs here: kind, architecture and features, not the measured rates."""
        text = "\0".join([self.kind, self.arch, *sorted(self.features)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
