"""The kernel families that the compiler chooses from, and how constants are brought into their layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from fuser.kernels import gemm, gemm_cuda
from fuser.kernels.attention import AttentionFamily
from fuser.kernels.base import KernelFamily, Literal, Packed
from fuser.kernels.gemm import GemmFamily
from fuser.kernels.mlp import MlpFamily
from fuser.kernels.rowwise import PointwiseFamily, RowwiseFamily

FAMILIES: tuple[KernelFamily, ...] = (AttentionFamily(), GemmFamily(), MlpFamily(), RowwiseFamily(), PointwiseFamily())


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
