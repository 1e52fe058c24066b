"""The kernel families that the compiler chooses from, and who runs them on which kind of target."""

from __future__ import annotations

import torch
from torch import Tensor

from fuser.kernels import gemm, gemm_cuda
from fuser.kernels.attention import AttentionFamily, CpuAttention
from fuser.kernels.attention_cuda import CudaAttention
from fuser.kernels.base import Literal, Packed, Table
from fuser.kernels.gemm import CpuGemm, GemmFamily, OneDnnGemm
from fuser.kernels.gemm_cuda import CublasGemm, CudaGemm
from fuser.kernels.gemm_cutlass import CutlassGemm
from fuser.kernels.mlp import CudaMlp, MlpFamily
from fuser.kernels.rowwise import CpuRowwise, PointwiseFamily, RowwiseFamily
from fuser.kernels.rowwise_cuda import CudaRowwise

IMPLEMENTATIONS: Table = {
    (AttentionFamily(), "cpu"): (CpuAttention(),),
    (AttentionFamily(), "cuda"): (CudaAttention(),),
    (GemmFamily(), "cpu"): (CpuGemm(), OneDnnGemm()),
    (GemmFamily(), "cuda"): (CudaGemm(), CublasGemm(), CutlassGemm()),
    (MlpFamily(), "cuda"): (CudaMlp(),),
    (RowwiseFamily(), "cpu"): (CpuRowwise(),),
    (RowwiseFamily(), "cuda"): (CudaRowwise(),),
    (PointwiseFamily(), "cpu"): (CpuRowwise(),),
    (PointwiseFamily(), "cuda"): (CudaRowwise(),),
}
"""Where several kernels run a group equally fast, the first of this table is taken."""


def materialize(constant: Packed | Literal, value: Tensor | None) -> Tensor:
    """The tensor of a packed constant, made from ``value``, or of a literal."""
    if isinstance(constant, Literal):
        return torch.from_numpy(constant.array.copy())
    if value is None:
        raise ValueError(f"{constant.value} must be given to be packed")
    family, *arguments = constant.layout
    if family == "gemm_cuda":
        return gemm_cuda.pack(value, *arguments)
    if family != GemmFamily.name:
        raise ValueError(f"the {family} family packs nothing")
    return gemm.pack(value, *arguments)
