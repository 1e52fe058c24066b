"""``attn_implementation="fuser"`` for Hugging Face models.

After :func:`register`, ``AutoModel.from_pretrained(name, attn_implementation="fuser")`` runs every attention of the
model through :func:`fuser.sparse_attention`, eager or compiled, and ``fuser.optimize`` fuses it. Needs transformers
4.53 or later.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fuser.attention import attend
from fuser.ir.errors import MaskError
from fuser.ir.masks import Mask
from fuser.ir.scores import SoftCap

logger = logging.getLogger("fuser")
_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "cache": "a paged cache (continuous batching)",
}


def register(mask: Mask | None = None, *, name: str = "fuser") -> None:
    """Add an attention implementation to transformers; calling it again replaces the one of that ``name``.

    Without ``mask`` attention is exactly the model's own: causal or not, with padding and any 4-D mask. With it, every
    self-attention is restricted further to the pairs that ``mask`` allows: attention over as many keys as queries, and
    causal attention over a growing cache, whose queries are the last of the keys (not a static cache, which does not
    tell where its queries are). A query that may see nothing gives zeros.

    Raises:
        MaskError: ``mask`` is not a mask.
        ImportError: transformers is missing or older than 4.53.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise MaskError(f"register takes one of fuser.masks, not a {type(mask).__name__}")
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError("fuser.integrations.transformers needs transformers 4.53 or later") from error
    AttentionInterface.register(name, _forward_with(mask))
    # Boolean 4-D masks, or None where the causal flag or nothing at all says the same.
    AttentionMaskInterface.register(name, sdpa_mask)


def _forward_with(pattern: Mask | None) -> Callable[..., tuple[Tensor, None]]:
    def fuser_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, Sq, D), key and value (B, Hkv, Sk, D) to (B, Sq, H, Dv); weights are never returned."""
        for argument, what in _UNSUPPORTED.items():
            if kwargs.get(argument) is not None:
                raise ValueError(f'attn_implementation="fuser" does not support {what}; use "sdpa" or "eager"')
        q_len, kv_len = query.shape[2], key.shape[2]
        decoder = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(decoder) and attention_mask is None and q_len > 1
        runtime = _with_bias(attention_mask, position_bias)
        if runtime is not None:
            runtime = runtime[..., :kv_len]
        own, offset = pattern, 0
        if q_len != kv_len:
            offset = kv_len - q_len
            if not decoder or offset < 0:
                own, offset = None, 0
        rule = None if softcap is None else SoftCap(softcap)
        if dropout and rule is not None:
            raise ValueError('attn_implementation="fuser" does not support dropout of soft-capped scores; use "eager"')
        if dropout:
            out = _with_dropout(query, key, value, own, runtime, causal, offset, dropout, scaling)
        else:
            out = attend(query, key, value, own, runtime, causal=causal, offset=offset, rule=rule, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    return fuser_attention_forward


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask and a learned bias of positions as one operand."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -math.inf)
    return mask + bias


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Mask | None,
    runtime: Tensor | None,
    causal: bool,
    offset: int,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Training: PyTorch's own attention, under the same masks."""
    mask = runtime
    if pattern is not None or (causal and runtime is not None):
        q_len, kv_len = query.shape[2], key.shape[2]
        allowed = torch.ones(q_len, kv_len, dtype=torch.bool)
        if pattern is not None:
            allowed = pattern.shift(offset).dense(q_len, kv_len)
        if causal:
            allowed = allowed.tril()
        allowed = allowed.to(query.device)
        if mask is None:
            mask = allowed
        else:
            mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -math.inf)
        causal = False
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
