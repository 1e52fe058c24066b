"""Products by CUTLASS for Hopper: TMA and wgmma, with bias, activation and residual in the epilogue.

CUTLASS's headers come from the PyPI package ``nvidia-cutlass`` (the extra ``cuda``). A kernel takes about a minute to
build, so only a search that was asked for offers these choices.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuser.ir.expression import Op
from fuser.ir.extents import Extents
from fuser.ir.graph import TensorSpec
from fuser.ir.target import Target
from fuser.kernels import gemm_cuda
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec
from fuser.kernels.gemm import GemmMatch
from fuser.kernels.gemm_cuda import Linear

_PACKAGE = "nvidia-cutlass"
_ALIGNMENT = 16  # bytes to a multiple of which TMA needs rows to start
_ACTIVATIONS = frozenset({Op.RELU, Op.GELU, Op.SILU, Op.SIGMOID, Op.TANH})
# (rows, columns, cluster of blocks along rows, ping-pong schedule) of a block's tile.
_TILES = (
    (128, 128, 2, False),
    (128, 256, 2, False),
    (64, 128, 1, True),
    (64, 256, 1, True),
    (64, 64, 1, True),
)
_DEPTH_BYTES = 128
# Estimates: no kernel has been measured on a GPU.
_SHARE = 0.85  # of the tensor cores' rate, for large products
_START_SECONDS = 2e-6  # of a persistent block: descriptors, barriers, the first tiles


@dataclass(frozen=True)
class CutlassExtents(Extents):
    """Rows of A, and elements between the rows of A, W, C and the residual (0 without one); ``multiprocessors`` of
    the GPU."""

    rows: int
    a_stride: int
    w_stride: int
    output_stride: int
    residual_stride: int
    multiprocessors: int


@dataclass(frozen=True)
class CutlassParameters:
    """What the template ``cuda/gemm_cutlass.cu.j2`` is rendered from.

    ``n`` and ``k`` are the weight's sizes, ``dtype`` the type of A, W, the result and the residual, ``bias`` that of a
    bias (None: there is none). A block computes ``bm`` × ``bn`` of C in steps of ``bk``; ``cluster`` blocks along the
    rows share tiles of W; with ``pingpong`` two warp groups alternate between product and epilogue of different tiles,
    else they share a tile. ``version`` is CUTLASS's.
    """

    n: int
    k: int
    dtype: DType
    bias: DType | None
    activation: Op | None
    residual: bool
    bm: int
    bn: int
    bk: int
    cluster: int
    pingpong: bool
    version: tuple[int, ...]

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return CutlassExtents.declaration()

    @property
    def includes(self) -> tuple[Path, ...]:
        """Folders of CUTLASS's headers on this machine."""
        folder = include_folder()
        return (folder,) if folder is not None else ()


@functools.cache
def include_folder() -> Path | None:
    """The folder of CUTLASS's C++ headers in the installed package ``nvidia-cutlass``, None without it."""
    try:
        spec = importlib.util.find_spec("cutlass_library")
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(location) / "source" / "include"
        if (folder / "cutlass" / "cutlass.h").is_file():
            return folder
    return None


@functools.cache
def version() -> tuple[int, ...]:
    """The release of the installed package ``nvidia-cutlass``."""
    return tuple(int(part) for part in importlib.metadata.version(_PACKAGE).split(".") if part.isdigit())


class CutlassGemm(Implementation[GemmMatch, CutlassParameters]):
    """CUTLASS's kernels, all of which take long to build."""

    def space(self, match: GemmMatch, target: Target) -> Sequence[CutlassParameters]:
        return []

    def offline_space(self, match: GemmMatch, target: Target) -> Sequence[CutlassParameters]:
        """CUTLASS's tiles for a product that it can run: on sm_90a, with 16-byte rows in one 16-bit type, and a linear
        layer's epilogue. None
        without its headers."""
        linear, values = gemm_cuda.linear(match), match.group.graph.values
        dtype = STORAGE[values[match.a].dtype]
        if target.arch != "sm_90a" or target.emulated or include_folder() is None or linear is None:
            return []
        if not gemm_cuda.is_multiplied(match):
            return []
        if dtype not in (DType.F16, DType.BF16) or linear.activation not in (None, *_ACTIVATIONS):
            return []
        specs = [values[v] for v in (match.a, *match.program.outputs, *([linear.residual] if linear.residual else []))]
        if any(spec.dtype != dtype.torch for spec in specs) or match.k == 0 or match.program.rows >= 1 << 31:
            return []
        strides = [match.row_stride, match.k, match.n, *match.program.output_strides]
        strides += [b.stride for b in match.program.bounds]
        if any(stride * dtype.bytes % _ALIGNMENT for stride in strides) or not _aligned(match, linear):
            return []
        bias = STORAGE[values[linear.bias].dtype] if linear.bias else None
        return [
            CutlassParameters(
                match.n,
                match.k,
                dtype,
                bias,
                linear.activation,
                linear.residual is not None,
                bm,
                bn,
                _DEPTH_BYTES // dtype.bytes,
                cluster,
                pingpong,
                version(),
            )
            for bm, bn, cluster, pingpong in _TILES
        ]

    def cost(self, match: GemmMatch, parameters: CutlassParameters, target: Target) -> Cost:
        """Whole tiles on whole SMs at the tensor cores' rate, every tensor touched once."""
        p, rows = parameters, match.program.rows
        tiles = -(-rows // p.bm) * -(-p.n // p.bn)
        each = 2.0 * p.bm * p.bn * p.k / (target.rate(p.dtype.torch) * _SHARE)
        seconds = _START_SECONDS + -(-tiles // target.cores) * each
        flops = max(2.0 * rows * p.n * p.k, 1.0)
        moved = gemm_cuda.moved_bytes(match)
        return Cost(flops, moved, 1, flops / (target.peak_flops * target.cores * seconds))

    def call(self, match: GemmMatch, parameters: CutlassParameters, target: Target, threads: int) -> KernelCall:
        """The launch of a choice of :meth:`offline_space`."""
        linear = gemm_cuda.linear(match)
        if linear is None:
            raise ValueError("CUTLASS runs only products that `offline_space` offers it for")
        program = match.program
        strides = {b.value: b.stride for b in program.bounds}
        weight, stride = gemm_cuda.weight(match)
        operands = [value for value in (linear.bias, linear.residual) if value is not None]
        (output_stride,) = program.output_strides
        residual_stride = strides[linear.residual] if linear.residual else 0
        return KernelCall(
            KernelSpec("gemm", "cuda/gemm_cutlass.cu.j2", parameters),
            (match.a, weight, *operands, *program.outputs),
            CutlassExtents(program.rows, match.row_stride, stride, output_stride, residual_stride, target.cores),
            program.outputs,
        )


def _aligned(match: GemmMatch, linear: Linear) -> bool:
    """Whether every tensor is known to start at a multiple of 16 bytes; a caller's may start anywhere."""
    graph = match.group.graph

    def starts(value: str) -> bool:
        spec: TensorSpec = graph.values[value]
        return graph.base(value) not in graph.inputs and spec.offset * spec.dtype.itemsize % _ALIGNMENT == 0

    tensors = (match.a, match.weight, linear.bias, linear.residual)
    return all(starts(value) for value in tensors if value is not None)
