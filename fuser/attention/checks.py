"""What attention asks of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fuser.ir.errors import MaskError, ScoreError
from fuser.ir.masks import Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import ScoreRule


def check_tensors(**given: object) -> None:
    """Raise ValueError, by its name, for what is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_scores(score: object, quantize: object) -> None:
    """Raise ScoreError unless these are a rule and a specification, or None."""
    if score is not None and not isinstance(score, ScoreRule):
        raise ScoreError(f"score must be a rule such as fuser.SoftCap, or None, got {type(score).__name__}")
    if quantize is not None and not isinstance(quantize, ScoreQuantization):
        kind = type(quantize).__name__
        raise ScoreError(f"quantize must be a fuser.DEQ, a fuser.Sanger, a fuser.Int8Attention or None, got {kind}")


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless these are tensors whose shapes, dtypes and devices fit."""
    check_tensors(q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention takes q (B, H, Sq, D), k (B, Hkv, Sk, D) and v (B, Hkv, Sk, Dv), got {shapes}")
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(f"the batch sizes differ: {shapes}")
    if k.shape[1] != v.shape[1] or (k.shape[1] == 0) != (q.shape[1] == 0) or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"the heads of q must be a multiple of those of k and v, which must be equal: {shapes}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have as many rows: {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(f"q and k must have heads of one width above zero: {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")


def check_heads(mask: Mask, q: Tensor) -> None:
    """Raise MaskError if the mask has matrices for other heads than those of q."""
    if mask.heads not in (None, q.shape[1]):
        raise MaskError(f"the mask {mask.name} has {mask.heads} heads and q {q.shape[1]}: {tuple(q.shape)}")


def check_attn_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask given as a tensor, with four dimensions. Raises MaskError if it does not fit q and k."""
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dim() > 4 or any(
        size not in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted), strict=False)
    ):
        raise MaskError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to (B, H, Sq, Sk) = {tuple(wanted)}; "
            "padding (B, Sk) is passed as mask[:, None, None, :]"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise MaskError(f"a mask tensor is bool (True = may attend) or added to the scores, got {mask.dtype}")
    if mask.device != q.device:
        raise MaskError(f"the mask is on {mask.device}, q on {q.device}")
    return mask[(None,) * (4 - mask.dim())]
