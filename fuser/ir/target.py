"""What a kernel is built for: a device kind, an instruction set and the measured limits that the cost model needs."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

import torch

from fuser.ir.errors import FuserError


class Isa(enum.Enum):
    """CPU instruction sets that the templates know; the value is the name that templates and cache keys use."""

    AVX512 = "avx512"
    AVX2 = "avx2"
    NEON = "neon"
    PORTABLE = "portable"


VECTOR_BYTES = {Isa.AVX512: 64, Isa.AVX2: 32, Isa.NEON: 16, Isa.PORTABLE: 16}


EMULATED = "emulated"
"""The feature of targets whose CUDA kernels run on the CPU."""
TF32 = "tf32"
"""The feature of targets that may round the fp32 operands of a product to TF32."""


# Multiply-adds of one instruction per fp32 lane of its registers, where `fma` does one: the extensions' dot products
# (Intel SDM, VDPBF16PS and VPDPBUSD), and, on AVX2 and later, VPMADDWD on bytes widened to 16 bits. These are ratios of
# documented widths, at as many instructions a cycle as `fma`; they were not measured.
# AMX multiplies tiles of 16 × 16 × 64 bytes in 16 cycles (Intel, "Optimization Reference Manual", on AMX), in which two
# `fma` of 16 lanes a cycle make 512 multiply-adds.
_BF16_EXTENSIONS = (("amx_bf16", 16.0), ("avx512_bf16", 2.0))
_INT8_EXTENSIONS = (("amx_int8", 32.0), ("avx512_vnni", 4.0))
_INT8_WIDENED = 2.0
_EIGHT_BITS = frozenset({torch.int8, torch.uint8})
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
# Of the tensor cores' rates in data sheets: dense int8 and fp8 over fp16 with fp32 sums, which GeForce GPUs do at half
# of their rate with fp16 sums. Not measured. What is not listed the architecture does not multiply, or more slowly.
_INT8_TENSOR = {"sm_80": 2.0, "sm_86": 4.0, "sm_87": 2.0, "sm_89": 2.0, "sm_90": 2.0, "sm_90a": 2.0, "sm_100": 2.0}
_INT8_TENSOR |= {"sm_120": 4.0}
_FP8_TENSOR = {"sm_89": 2.0, "sm_90": 2.0, "sm_90a": 2.0, "sm_100": 2.0, "sm_103": 2.0, "sm_120": 2.0}
# `mma.sync` feeds tensor cores that are made for `wgmma` only in part, on Hopper to 63 % (Luo et al., "Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499); those made for `tcgen05` are taken to do the same.
_MMA_SHARE = {"sm_90": 0.63, "sm_90a": 0.63, "sm_100": 0.63, "sm_103": 0.63}


# Of fp8 they are fed fp16 there, which ptxas converts it to (github.com/NVIDIA/cutlass, issue 1986; nvcc 13's code for
# sm_100 has the same conversions).
_MMA_CONVERTS_FP8 = frozenset(_MMA_SHARE)


@dataclass(frozen=True)
class _Gpu:
    """A GPU by its data sheet: rates of the whole device in flop/s and bytes/s, memories in bytes."""

    cores: int
    l1: int
    l2: int
    shared: int
    flops: float
    tensor: float
    bandwidth: float


# The reference GPU of every architecture that has templates, and the shared memory of a block and of an SM
# (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_A100 = _Gpu(108, 192 << 10, 40 << 20, 163 << 10, 19.5e12, 312e12, 1.9e12)
_RTX_3090 = _Gpu(82, 128 << 10, 6 << 20, 99 << 10, 35.6e12, 71e12, 0.9e12)
_L40S = _Gpu(142, 128 << 10, 96 << 20, 99 << 10, 91.6e12, 362e12, 0.86e12)
_H100 = _Gpu(132, 256 << 10, 50 << 20, 227 << 10, 66.9e12, 989e12, 3.3e12)
_B200 = _Gpu(148, 256 << 10, 126 << 20, 227 << 10, 74.4e12, 2250e12, 7.7e12)
_RTX_5090 = _Gpu(170, 128 << 10, 96 << 20, 99 << 10, 104.8e12, 210e12, 1.8e12)
_GPUS = {
    "sm_80": _A100,
    "sm_86": _RTX_3090,
    "sm_87": _A100,
    "sm_89": _L40S,
    "sm_90": _H100,
    "sm_90a": _H100,
    "sm_100": _B200,
    "sm_103": _B200,
    "sm_120": _RTX_5090,
}
CUDA_ARCHS = tuple(_GPUS)
"""Architectures that the CUDA templates can be built for."""
_LAUNCH_SECONDS = 2e-6
_EMULATED_CORES = 4
# L2 gives all SMs of an A100 5120 bytes a clock (NVIDIA's A100 whitepaper), which is 6.7e10 bytes/s for one of 108 at
# 1.41 GHz, and for one of an H100's 132 if it gives as much; a tenth is taken to be lost. Not measured.
_L2_BANDWIDTH = 6e10
# 32 banks of 4 bytes a clock (CUDA C++ Programming Guide, "Shared Memory"), at about 1.6 GHz.
_SHARED_BANDWIDTH = 2e11
REGISTERS = 65536
"""32-bit registers of an SM, on every architecture that has templates (CUDA C++ Programming Guide)."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory that a block takes beside its own, from sm_80 on (CUDA C++ Programming Guide)."""
MOST_SHARED_BYTES = 228 << 10
"""Shared memory of an SM where there is most, for blocks and what is reserved beside them."""


@dataclass(frozen=True)
class Target:
    """One device, as a value.

    ``kind`` is ``"cpu"`` or ``"cuda"``, ``arch`` the :class:`Isa` value or ``"sm_80"`` …, ``features`` are extensions
    beyond the base (``"avx512_bf16"``, ``"avx512_vnni"``). ``cores`` counts physical cores, ``cache_bytes`` is (L1
    data, L2 of one core, shared L3). ``peak_flops`` is the measured fp32 FMA rate of one core in flop/s, ``bandwidth``
    the measured copy rate of all cores in bytes/s, ``launch_seconds`` the cost of starting one kernel.

    On a GPU a core is a streaming multiprocessor (SM), ``cache_bytes`` is (L1 and shared memory of an SM, L2, L2),
    ``shared_bytes`` the shared memory that one block may ask for, and ``tensor_flops`` the dense fp16 and bf16 rate of
    one SM's tensor cores with fp32 accumulation (TF32 runs at half of it). The feature ``"emulated"`` says that the
    kernels run on the CPU.
    """

    kind: str
    arch: str
    features: frozenset[str]
    cores: int
    cache_bytes: tuple[int, int, int]
    peak_flops: float
    bandwidth: float
    launch_seconds: float
    shared_bytes: int = 0
    tensor_flops: float = 0.0

    def rate(self, dtype: torch.dtype) -> float:
        """Multiply-adds of operands of ``dtype`` that one core can do, in operations (two each) a second.

        fp32 was measured on a CPU and is the data sheet's on a GPU, and others follow by the documented width of their
        instructions; what no instruction multiplies is converted and has fp32's rate. With the feature ``"tf32"`` fp32
        is TF32.
        """
        if self.kind == "cpu":
            return self.peak_flops * self._cpu_ratio(dtype)
        if dtype in (torch.float16, torch.bfloat16):
            return self.tensor_flops
        if dtype is torch.float32:
            return self.tensor_flops / 2 if TF32 in self.features else self.peak_flops
        ratios = _INT8_TENSOR if dtype in _EIGHT_BITS else _FP8_TENSOR if dtype in _FP8 else {}
        return self.tensor_flops * ratios[self.arch] if self.arch in ratios else self.peak_flops

    @property
    def fp8(self) -> bool:
        """Whether ``mma.sync`` takes e4m3, as it does from compute capability 8.9 on (PTX ISA, "mma")."""
        return self.kind == "cuda" and self.arch in _FP8_TENSOR

    def mma_rate(self, dtype: torch.dtype, share: float) -> float:
        """The :meth:`rate` of a kernel that reaches a ``share`` of it, unless ``mma.sync`` alone reaches less."""
        converted = dtype in _FP8 and self.arch in _MMA_CONVERTS_FP8
        return self.rate(torch.float16 if converted else dtype) * min(share, _MMA_SHARE.get(self.arch, 1.0))

    @property
    def l2_bandwidth(self) -> float:
        """Bytes a second that one SM of a GPU draws from L2 when all do."""
        return _L2_BANDWIDTH

    @property
    def shared_bandwidth(self) -> float:
        """Bytes a second between one SM of a GPU and its shared memory."""
        return _SHARED_BANDWIDTH

    def _cpu_ratio(self, dtype: torch.dtype) -> float:
        known = _INT8_EXTENSIONS if dtype in _EIGHT_BITS else _BF16_EXTENSIONS if dtype is torch.bfloat16 else ()
        ratio = next((ratio for feature, ratio in known if feature in self.features), 0.0)
        if self.arch == Isa.AVX512.value and ratio:
            return ratio
        return _INT8_WIDENED if dtype in _EIGHT_BITS and self.arch in (Isa.AVX2.value, Isa.AVX512.value) else 1.0

    @property
    def emulated(self) -> bool:
        """Whether CUDA kernels run on the CPU, by the emulator."""
        return EMULATED in self.features

    @property
    def device(self) -> str:
        """The type of the PyTorch device that tensors live on: ``"cpu"`` or ``"cuda"``."""
        return "cpu" if self.emulated else self.kind

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


def cuda_target(
    arch: str,
    *,
    cores: int | None = None,
    l2_bytes: int | None = None,
    shared_bytes: int | None = None,
    peak_flops: float | None = None,
    tensor_flops: float | None = None,
    bandwidth: float | None = None,
    features: frozenset[str] = frozenset(),
) -> Target:
    """A GPU of architecture ``arch`` (one of :data:`CUDA_ARCHS`); what is not given is the reference GPU's.

    Rates of flops are one SM's. Needs no GPU. Raises FuserError for an architecture without templates.
    """
    if arch not in _GPUS:
        raise FuserError(
            f"fuser has no CUDA kernels for the architecture {arch!r}, only for {', '.join(_GPUS)}; "
            "run the model without fuser, or on the CPU"
        )
    gpu = _GPUS[arch]
    l2 = gpu.l2 if l2_bytes is None else l2_bytes
    return Target(
        kind="cuda",
        arch=arch,
        features=features,
        cores=gpu.cores if cores is None else cores,
        cache_bytes=(gpu.l1, l2, l2),
        peak_flops=gpu.flops / gpu.cores if peak_flops is None else peak_flops,
        bandwidth=gpu.bandwidth if bandwidth is None else bandwidth,
        launch_seconds=_LAUNCH_SECONDS,
        shared_bytes=gpu.shared if shared_bytes is None else shared_bytes,
        tensor_flops=gpu.tensor / gpu.cores if tensor_flops is None else tensor_flops,
    )


def emulated_target(arch: str = "sm_80") -> Target:
    """The kernels of ``arch`` on the CPU, with so few SMs that small problems exercise every loop; ``cuda:emulated`` is
    that of sm_80."""
    return cuda_target(arch, cores=_EMULATED_CORES, features=frozenset({EMULATED}))
