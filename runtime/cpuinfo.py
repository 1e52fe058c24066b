"""What the CPU of this machine is, read from the system: instruction sets, usable cores, caches and its name."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import re
from pathlib import Path

import torch

from fuser.ir.target import Isa, Target

_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"})
_AVX512_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AMX = frozenset({"amx_bf16", "amx_int8", "amx_tile"})
# Linux, Documentation/arch/x86/xstate.rst: a process asks for the state of AMX's tiles before it uses them.
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18
_EXTENSIONS = {
    Isa.AVX512: frozenset({"avx512_bf16", "avx512_vnni", *_AMX}),
    Isa.AVX2: frozenset({"avx_vnni"}),
    Isa.NEON: frozenset({"asimddp", "bf16", "i8mm"}),
    Isa.PORTABLE: frozenset[str](),
}
_LOWER = {Isa.AVX512: (Isa.AVX2, Isa.PORTABLE), Isa.AVX2: (Isa.PORTABLE,), Isa.NEON: (Isa.PORTABLE,), Isa.PORTABLE: ()}
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# What a cache level that cannot be read is taken to be: L1 data, L2, L3 in bytes.
_TYPICAL_CACHES = (32 << 10, 1 << 20, 16 << 20)


def detect_isa() -> Isa:
    """The best instruction set of this CPU that the templates know."""
    return _isa_of(cpu_flags(), platform.machine())


def has_isa(isa: Isa) -> bool:
    """Whether this CPU runs kernels of the instruction set ``isa``: its best, or one that this includes."""
    best = detect_isa()
    return isa is best or isa in _LOWER[best]


def features(isa: Isa) -> frozenset[str]:
    """The extensions of ``isa`` that this CPU has and the templates use."""
    return cpu_flags() & _EXTENSIONS[isa]


def lacking(target: Target) -> str:
    """What keeps this CPU from running kernels built for ``target``, as the end of "this CPU …"; empty if nothing."""
    isa = Isa(target.arch)
    if not has_isa(isa):
        return f"({cpu_name()}) has no {isa.value}; its best is {detect_isa().value}"
    if missing := sorted(target.features - cpu_flags()):
        return f"({cpu_name()}) has no {', '.join(missing)}"
    return ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Names of this CPU's extensions as Linux spells them, and the operating system allows them."""
    fields = _cpuinfo()
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return flags - _AMX if flags & _AMX and not _may_use_tiles() else flags


def _may_use_tiles() -> bool:
    """Ask the system to let this process and its children use AMX's tiles; whether it does."""
    try:
        system = ctypes.CDLL(None, use_errno=True)
        return int(system.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0
    except (OSError, AttributeError):
        return False


def cpu_name() -> str:
    """The CPU's model, for people and for the key of its calibration."""
    fields = _cpuinfo()
    names = [
        fields[name] for name in ("model name", "cpu family", "model", "CPU implementer", "CPU part") if name in fields
    ]
    return " ".join(names) or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may use: those of its affinity mask, within the container's quota."""
    cpus = os.sched_getaffinity(0)
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    quota = cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def cache_sizes() -> tuple[int, int, int]:
    """Bytes of (L1 data, L2 of one core, shared L3); a level that the system does not tell is a typical one."""
    cpu = min(os.sched_getaffinity(0))
    sizes: dict[int, int] = {}
    for folder in (_CPUS / f"cpu{cpu}" / "cache").glob("index*"):
        level, kind = _read(folder / "level"), _read(folder / "type")
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / "size") or "")
        if size and level.isdecimal() and kind in ("Data", "Unified") and int(size[1]) > 0:
            sizes[int(level)] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    l1 = sizes.get(1, _TYPICAL_CACHES[0])
    l2 = sizes.get(2, _TYPICAL_CACHES[1])
    # A CPU that tells its L2 but no L3 has none: its L2 is the last level.
    l3 = sizes.get(3, l2 if 2 in sizes else _TYPICAL_CACHES[2])
    return l1, l2, l3


def _isa_of(flags: frozenset[str], machine: str) -> Isa:
    if machine in ("x86_64", "AMD64"):
        if not flags:
            # Some sandboxes hide /proc/cpuinfo; torch asks the CPU itself.
            capability = str(torch.backends.cpu.get_cpu_capability())
            return {"AVX512": Isa.AVX512, "AVX2": Isa.AVX2}.get(capability, Isa.PORTABLE)
        if flags >= _AVX512_FLAGS:
            return Isa.AVX512
        return Isa.AVX2 if flags >= _AVX2_FLAGS else Isa.PORTABLE
    return Isa.NEON if machine in ("aarch64", "arm64") else Isa.PORTABLE


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def cgroup_quota() -> float | None:
    """CPUs that the container may keep busy (cgroup v2, then v1), or None for no limit."""
    pairs = [_read(_CGROUP / "cpu.max").split()]
    pairs.append([_read(_CGROUP / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")])
    for pair in pairs:
        if len(pair) == 2 and all(text.isdecimal() for text in pair) and int(pair[1]) > 0:
            return int(pair[0]) / int(pair[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
