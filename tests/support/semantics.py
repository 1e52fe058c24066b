"""One operator of every kind, for tests that need any."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fuser.ir.expression import Expression, Op, layer_norm, unary
from fuser.ir.masks import SlidingWindow
from fuser.ir.operators import (
    PV,
    QK,
    Activation,
    AdditiveMask,
    Bias,
    BooleanMask,
    ChangeScores,
    Embedding,
    Extern,
    Gemm,
    MergeHeads,
    Norm,
    PatternMask,
    Pointwise,
    Ref,
    Residual,
    Scale,
    Semantics,
    Softmax,
    SplitHeads,
    TorchCall,
    View,
)
from fuser.ir.scores import SoftCap

_VIEW = TorchCall(torch.as_strided, (Ref(0), (2, 3, 4, 8), (96, 8, 24, 1), 0))
SAMPLES: Mapping[type[Semantics], Semantics] = {
    type(sample): sample
    for sample in (
        Extern(TorchCall(torch.add, (Ref(0), Ref(0))), "no kernel adds a value to itself"),
        View(_VIEW),
        SplitHeads(_VIEW),
        MergeHeads(TorchCall(torch.as_strided, (Ref(0), (2, 4, 24), (96, 24, 1), 0))),
        Gemm(transposed=True),
        QK(),
        PV(),
        Bias(),
        Activation(unary(Op.GELU)),
        Residual(),
        Norm(layer_norm(1e-5)),
        Pointwise(unary(Op.EXP)),
        Scale(0.125),
        ChangeScores(SoftCap(2.0)),
        Softmax(masked=True),
        Embedding(),
        PatternMask(pattern=SlidingWindow(1, 1)),
        BooleanMask(),
        AdditiveMask(),
    )
}


def semantics(kind: type[Semantics], function: Expression) -> Semantics:
    """An operator of a kind; one that can compute any row expression computes ``function``."""
    made: Semantics = kind(function) if hasattr(SAMPLES[kind], "function") else SAMPLES[kind]  # type: ignore[call-arg]
    return made
