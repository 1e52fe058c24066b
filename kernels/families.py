"""The kernel families that the compiler chooses from, and who runs them on which kind of target."""

from __future__ import annotations

from fuser.kernels.append import AppendFamily, CpuAppend
from fuser.kernels.attention import AttentionFamily, CpuAttention
from fuser.kernels.attention_cuda import CudaAttention
from fuser.kernels.attention_disentangled import CpuDisentangledAttention
from fuser.kernels.attention_importance import CpuImportanceAttention
from fuser.kernels.attention_int8 import CpuInt8Attention
from fuser.kernels.attention_joined import CpuJoinedAttention
from fuser.kernels.attention_predicted import CpuPredictedAttention
from fuser.kernels.attention_quantized_cuda import CudaFewBitsAttention
from fuser.kernels.base import Table
from fuser.kernels.concat import CPU_CONCAT, CUDA_CONCAT, ConcatFamily
from fuser.kernels.depthwise import CpuDepthwise, CudaDepthwise, DepthwiseFamily
from fuser.kernels.gemm import CpuGemm, GemmFamily, OneDnnGemm
from fuser.kernels.gemm_bf16 import Bf16GemmFamily, CpuBf16Gemm, CudaBf16Gemm
from fuser.kernels.gemm_cuda import CublasGemm, CudaGemm
from fuser.kernels.gemm_cutlass import CutlassGemm
from fuser.kernels.gemm_grouped import CpuGroupedGemm, GroupedGemmFamily
from fuser.kernels.gemm_int8 import (
    CodeGemmFamily,
    CpuCodeGemm,
    CpuInt8Gemm,
    CpuStoredInt8Gemm,
    QuantizedGemmFamily,
    StoredInt8GemmFamily,
)
from fuser.kernels.gemm_int8_cuda import CudaCodeGemm, CudaInt8WeightGemm, CudaQuantizedGemm
from fuser.kernels.gemm_int8_weight import CpuInt8WeightGemm, Int8WeightGemmFamily
from fuser.kernels.linear_attention import CpuFeatures, CpuLinearAttention, FeaturesFamily, LinearAttentionFamily
from fuser.kernels.linear_attention_cuda import CudaFeatures, CudaLinearAttention
from fuser.kernels.mlp import CudaMlp, MlpFamily
from fuser.kernels.rotary import CPU_ROTARY, CUDA_ROTARY, RotaryFamily
from fuser.kernels.rowwise import CpuRowwise, PointwiseFamily, RowwiseFamily
from fuser.kernels.rowwise_cuda import CudaRowwise
from fuser.kernels.unfold import CPU_UNFOLD, CUDA_UNFOLD, UnfoldFamily
from fuser.kernels.write_rows import CpuWriteRows, WriteRowsFamily

IMPLEMENTATIONS: Table = {
    (AppendFamily(), "cpu"): (CpuAppend(),),
    (WriteRowsFamily(), "cpu"): (CpuWriteRows(),),
    (ConcatFamily(), "cpu"): (CPU_CONCAT,),
    (ConcatFamily(), "cuda"): (CUDA_CONCAT,),
    (AttentionFamily(), "cpu"): (
        CpuAttention(),
        CpuDisentangledAttention(),
        CpuImportanceAttention(),
        CpuJoinedAttention(),
        CpuPredictedAttention(),
        CpuInt8Attention(),
    ),
    (AttentionFamily(), "cuda"): (CudaAttention(), CudaFewBitsAttention()),
    (GemmFamily(), "cpu"): (CpuGemm(), OneDnnGemm()),
    (GemmFamily(), "cuda"): (CudaGemm(), CublasGemm(), CutlassGemm()),
    (GroupedGemmFamily(), "cpu"): (CpuGroupedGemm(),),
    (Bf16GemmFamily(), "cpu"): (CpuBf16Gemm(),),
    (Bf16GemmFamily(), "cuda"): (CudaBf16Gemm(),),
    (QuantizedGemmFamily(), "cpu"): (CpuInt8Gemm(),),
    (QuantizedGemmFamily(), "cuda"): (CudaQuantizedGemm(),),
    (CodeGemmFamily(), "cpu"): (CpuCodeGemm(),),
    (CodeGemmFamily(), "cuda"): (CudaCodeGemm(),),
    (StoredInt8GemmFamily(), "cpu"): (CpuStoredInt8Gemm(),),
    (Int8WeightGemmFamily(), "cpu"): (CpuInt8WeightGemm(),),
    (Int8WeightGemmFamily(), "cuda"): (CudaInt8WeightGemm(),),
    (DepthwiseFamily(), "cpu"): (CpuDepthwise(),),
    (DepthwiseFamily(), "cuda"): (CudaDepthwise(),),
    (UnfoldFamily(), "cpu"): (CPU_UNFOLD,),
    (UnfoldFamily(), "cuda"): (CUDA_UNFOLD,),
    (LinearAttentionFamily(), "cpu"): (CpuLinearAttention(),),
    (LinearAttentionFamily(), "cuda"): (CudaLinearAttention(),),
    (FeaturesFamily(), "cpu"): (CpuFeatures(),),
    (FeaturesFamily(), "cuda"): (CudaFeatures(),),
    (MlpFamily(), "cuda"): (CudaMlp(),),
    (RotaryFamily(), "cpu"): (CPU_ROTARY,),
    (RotaryFamily(), "cuda"): (CUDA_ROTARY,),
    (RowwiseFamily(), "cpu"): (CpuRowwise(),),
    (RowwiseFamily(), "cuda"): (CudaRowwise(),),
    (PointwiseFamily(), "cpu"): (CpuRowwise(),),
    (PointwiseFamily(), "cuda"): (CudaRowwise(),),
}
"""Where several kernels run a group equally fast, the first of this table is taken."""
