"""The `linear_attention` and `features` families on GPUs. Estimates: no kernel has been measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.linear_attention import FeatureMap
from fuser.ir.target import Target
from fuser.kernels.base import STORAGE, Cost, DType, Implementation, KernelCall, KernelSpec
from fuser.kernels.linear_attention import (
    FeaturesExtents,
    FeaturesMatch,
    LinearAttentionExtents,
    LinearAttentionMatch,
)

_LANES = 32
_WARPS = 8
_CHUNK = 16
_MOST_ROWS = 128
"""Rows of the state that a lane holds in registers."""
_WARPS_OF_FEATURES = 4
_FMA_SHARE = 0.3


@dataclass(frozen=True)
class CudaLinearAttentionParameters:
    """``warps`` hold ``rows`` rows of the state each, while ``chunk`` tokens pass; the rest as on CPUs."""

    width: int
    group: int
    key: DType
    value: DType
    decays: int
    decay: DType | None
    beta: DType | None
    causal: bool
    floor: bool
    resumed: bool
    kept: bool
    warps: int
    rows: int
    chunk: int = _CHUNK

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return LinearAttentionExtents.declaration()

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: its arrays in the order of the template, each from a multiple of 16 bytes on."""
        span, gates = self.warps * self.rows, self.warps * self.rows if self.decays > 1 else 1
        arrays = (self.group * span, span, _LANES, gates, 1, self.warps * self.group * _LANES, self.warps * self.group)
        return sum(-(-4 * self.chunk * array // 16) * 16 for array in arrays)


class CudaLinearAttention(Implementation[LinearAttentionMatch, CudaLinearAttentionParameters]):
    """Our template on GPUs."""

    def space(self, match: LinearAttentionMatch, target: Target) -> Sequence[CudaLinearAttentionParameters]:
        """One choice, where registers hold a block's share of the state: all of it in one warp with the delta rule."""
        op, q, k, v = match.operator.semantics, match.spec("q"), match.spec("k"), match.spec("v")
        width = k.shape[-1]
        warps = 1 if op.recurrence.delta else min(_WARPS, -(-width // _WARPS))
        decay = match.spec("decay") if op.recurrence.decay else None
        made = CudaLinearAttentionParameters(
            width=width,
            group=q.shape[1] // k.shape[1],
            key=STORAGE[k.dtype],
            value=STORAGE[v.dtype],
            decays=0 if decay is None else decay.shape[-1],
            decay=None if decay is None else STORAGE[decay.dtype],
            beta=STORAGE[match.spec("beta").dtype] if op.recurrence.delta else None,
            causal=op.recurrence.causal,
            floor=op.recurrence.floor is not None,
            resumed=op.resumed,
            kept=op.kept,
            warps=warps,
            rows=-(-width // warps),
        )
        return [made] if made.rows <= _MOST_ROWS and made.shared_bytes <= target.shared_bytes else []

    def cost(self, match: LinearAttentionMatch, parameters: CudaLinearAttentionParameters, target: Target) -> Cost:
        """Every element of the state once a token."""
        graph, k, v = match.group.graph, match.spec("k"), match.spec("v")
        blocks = -(-v.shape[-1] // _LANES)
        flops = graph.flops(match.operator) * blocks * _LANES / v.shape[-1]
        used = {*match.operator.inputs, *match.operator.outputs}
        share = min(1.0, k.shape[0] * k.shape[1] * blocks / target.cores)
        return Cost(flops, float(sum(graph.values[value].nbytes for value in used)), 1, share * _FMA_SHARE)

    def call(
        self, match: LinearAttentionMatch, parameters: CudaLinearAttentionParameters, target: Target, threads: int
    ) -> KernelCall:
        return match.call(KernelSpec("linear_attention", "cuda/linear_attention.cu.j2", parameters))


@dataclass(frozen=True)
class CudaFeaturesParameters:
    """Each of the ``warps`` of a block has ``rows`` rows; the rest as on CPUs."""

    width: int
    features: int
    x: DType
    relu: bool
    keys: bool
    warps: int
    rows: int

    @property
    def extents(self) -> str:
        """The kernel's extents in C."""
        return FeaturesExtents.declaration()


class CudaFeatures(Implementation[FeaturesMatch, CudaFeaturesParameters]):
    """Our template on GPUs."""

    def space(self, match: FeaturesMatch, target: Target) -> Sequence[CudaFeaturesParameters]:
        """One choice, where registers have room for the features of rows."""
        values, op = match.group.graph.values, match.operator
        x, kind, features = values[op.inputs[0]], op.semantics.map, values[op.output].shape[-1]
        keys, relu = kind is FeatureMap.FAVOR_KEYS, kind is FeatureMap.RELU
        vectors = -(-features // _LANES)
        rows = next((rows for rows in (4, 2, 1) if rows * vectors <= _MOST_ROWS // 2), None)
        if rows is None:
            return []
        return [CudaFeaturesParameters(x.shape[-1], features, STORAGE[x.dtype], relu, keys, _WARPS_OF_FEATURES, rows)]

    def cost(self, match: FeaturesMatch, parameters: CudaFeaturesParameters, target: Target) -> Cost:
        """A product, and its result once more for keys."""
        graph, op = match.group.graph, match.operator
        moved = graph.values[op.inputs[0]].nbytes + (3 if parameters.keys else 1) * graph.values[op.output].nbytes
        return Cost(graph.flops(op), float(moved), 2 if parameters.keys else 1, _FMA_SHARE)

    def call(
        self, match: FeaturesMatch, parameters: CudaFeaturesParameters, target: Target, threads: int
    ) -> KernelCall:
        spec = KernelSpec("features", "cuda/features.cu.j2", parameters)
        return match.call(spec, _LANES, parameters.warps * parameters.rows if parameters.keys else None)
