"""The kernels of attention with few bits, by what says how it is computed."""

from __future__ import annotations

from fuser.ir.int8_attention import Int8Attention
from fuser.ir.prediction import Prediction
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule
from fuser.kernels.attention import PlanParameters
from fuser.kernels.attention_int8 import Int8Kernel, Int8Launch
from fuser.kernels.attention_predicted import PredictedAttention, PredictedKernel
from fuser.kernels.base import DType


def quantized(
    how: ScoreQuantization,
    head_dim: int,
    value_dim: int,
    dtype: DType,
    mask: DType | None,
    lse: bool,
    rule: ScoreRule | None,
    *,
    packed: bool = False,
) -> PlanParameters:
    """The parameters of the kernel that computes what ``how`` says on CPUs, of ``packed`` documents if it is to know
    them."""
    kernel = head_dim, value_dim, dtype, mask, lse
    if isinstance(how, Int8Attention):
        return Int8Launch(Int8Kernel(*kernel, rule=rule, documents=packed), how)
    assert isinstance(how, Prediction)
    return PredictedAttention(PredictedKernel(*kernel, rule=rule, form=how.form), how)
