"""Operators: one frozen class a kind, which knows what it computes, what that costs and how others may treat it.

Nothing else knows a kind's meaning: kernels ask for its :attr:`~Semantics.expression` or its attributes, the reference
that they are checked against, PyTorch where no kernel runs it, the cost model, pictures and hashes ask its methods.
"""

from __future__ import annotations

from fuser.ir.operators.attention import (
    PV,
    QK,
    DisentangledBias,
    Features,
    ImportanceBias,
    JoinedKeys,
    LinearAttention,
    LogSumExp,
    PredictedAttention,
)
from fuser.ir.operators.base import KINDS, Ref, Semantics, Shape, TorchCall, canonical, kind, laid_out
from fuser.ir.operators.products import (
    Bf16Gemm,
    CodeGemm,
    Gemm,
    GroupedGemm,
    Int8Gemm,
    Int8WeightGemm,
    Product,
    QuantizedGemm,
)
from fuser.ir.operators.pytorch import Extern, MergeHeads, SplitHeads, View
from fuser.ir.operators.rows import Append, Concat, Depthwise, Embedding, GatherRows, Rotary, Unfold, WriteRows, room
from fuser.ir.operators.rowwise import (
    Activation,
    Bias,
    ChangeScores,
    FakeQuantize,
    FakeQuantizeAsFound,
    Norm,
    Pointwise,
    QuantizeRows,
    Reduction,
    Residual,
    Scale,
    Softmax,
)
from fuser.ir.operators.score_masks import (
    AdditiveMask,
    BiasByDistance,
    BooleanMask,
    DocumentMask,
    PatternMask,
    ScoreMask,
)

__all__ = [
    "Activation",
    "AdditiveMask",
    "Append",
    "Bf16Gemm",
    "Bias",
    "BiasByDistance",
    "BooleanMask",
    "ChangeScores",
    "CodeGemm",
    "Concat",
    "Depthwise",
    "DisentangledBias",
    "DocumentMask",
    "Embedding",
    "Extern",
    "FakeQuantize",
    "FakeQuantizeAsFound",
    "Features",
    "GatherRows",
    "Gemm",
    "GroupedGemm",
    "ImportanceBias",
    "Int8Gemm",
    "Int8WeightGemm",
    "JoinedKeys",
    "KINDS",
    "LinearAttention",
    "LogSumExp",
    "MergeHeads",
    "Norm",
    "PV",
    "PatternMask",
    "Pointwise",
    "PredictedAttention",
    "Product",
    "QK",
    "QuantizeRows",
    "QuantizedGemm",
    "Reduction",
    "Ref",
    "Residual",
    "Rotary",
    "Scale",
    "ScoreMask",
    "Semantics",
    "Shape",
    "Softmax",
    "SplitHeads",
    "TorchCall",
    "Unfold",
    "View",
    "WriteRows",
    "canonical",
    "kind",
    "laid_out",
    "room",
]
