"""The `linear_attention` and `features` families on GPUs. Estimates: no kernel has been measured on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuser.ir.target import Target
from fuser.kernels.base import Cost, Implementation, KernelCall, KernelSpec
from fuser.kernels.linear_attention import (
    FeaturesMatch,
    FeaturesParameters,
    LinearAttentionMatch,
    Recurrent,
)

_LANES = 32
_WARPS = 8
_CHUNK = 16
_MOST_ROWS = 128
"""Rows of the state that a lane holds in registers."""
_WARPS_OF_FEATURES = 4
_FMA_SHARE = 0.3


@dataclass(frozen=True)
class CudaLinearAttentionParameters(Recurrent):
    """``warps`` hold ``rows`` rows of the state each, while ``chunk`` tokens pass."""

    warps: int
    rows: int
    chunk: int = _CHUNK

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
        width = match.spec("k").shape[-1]
        warps = 1 if match.operator.semantics.recurrence.delta else min(_WARPS, -(-width // _WARPS))
        made = CudaLinearAttentionParameters(**match.recurrent, warps=warps, rows=-(-width // warps))
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
class CudaFeaturesParameters(FeaturesParameters):
    """Each of the ``warps`` of a block has ``rows`` rows."""

    warps: int
    rows: int


class CudaFeatures(Implementation[FeaturesMatch, CudaFeaturesParameters]):
    """Our template on GPUs."""

    def space(self, match: FeaturesMatch, target: Target) -> Sequence[CudaFeaturesParameters]:
        """One choice, where registers have room for the features of rows."""
        known = match.parameters
        vectors = -(-known.features // _LANES)
        rows = next((rows for rows in (4, 2, 1) if rows * vectors <= _MOST_ROWS // 2), None)
        if rows is None:
            return []
        return [CudaFeaturesParameters(**vars(known), warps=_WARPS_OF_FEATURES, rows=rows)]

    def cost(self, match: FeaturesMatch, parameters: CudaFeaturesParameters, target: Target) -> Cost:
        """A product, and its result once more for keys."""
        launches = 2 if parameters.keys else 1
        return Cost(match.group.graph.flops(match.operator), match.moved_bytes, launches, _FMA_SHARE)

    def call(
        self, match: FeaturesMatch, parameters: CudaFeaturesParameters, target: Target, threads: int
    ) -> KernelCall:
        spec = KernelSpec("features", "cuda/features.cu.j2", parameters)
        return match.call(spec, _LANES, parameters.warps * parameters.rows if parameters.keys else None)
