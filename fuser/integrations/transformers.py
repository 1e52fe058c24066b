"""``attn_implementation="fuser"`` for Hugging Face models, and :func:`sparsify` for their sparse ones.

After :func:`register`, ``AutoModel.from_pretrained(name, attn_implementation="fuser")`` runs every attention of the
model through :func:`fuser.sparse_attention`, eager or compiled, and ``fuser.optimize`` fuses it. Needs transformers
4.53 or later.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fuser.attention import attend, varlen_attention
from fuser.integrations.sparse_models import sparsify as sparsify
from fuser.ir.errors import MaskError, ScoreError
from fuser.ir.masks import Causal, Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.ir.scores import SoftCap

logger = logging.getLogger("fuser")
_HINTS = ("max_length_q", "max_length_k")
_registered: set[str] = set()
_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "cache": "a paged cache (continuous batching)",
}


def register(mask: Mask | None = None, *, quantize: ScoreQuantization | None = None, name: str = "fuser") -> None:
    """Add an attention implementation to transformers; calling it again replaces the one of that ``name``.

    Without ``mask`` attention is exactly the model's own: causal or not, with padding and any 4-D mask. With it, every
    self-attention is restricted further to the pairs that ``mask`` allows: attention over as many keys as queries, and
    causal attention over a growing cache, whose queries are the last of the keys (not a static cache, which does not
    tell where its queries are). A query that may see nothing gives zeros.

    Documents may lie one behind the other in a batch of one row, without padding: call the model with ``cu_seq_lens_q``
    and ``cu_seq_lens_k``, as for flash-attention, and with the ``position_ids`` of each document. ``mask`` then applies
    to each document by itself. Where a model masks other documents itself (decoders without a cache whose
    ``position_ids`` start again), nothing is computed across them either.

    ``quantize`` (``fuser.Int8Attention(...)``, ``fuser.DEQ(...)`` or ``fuser.Sanger(...)``) is that of
    :func:`fuser.sparse_attention`, in training as well; it takes neither dropout nor documents, and says so by a
    ValueError when the model runs.

    Raises:
        MaskError: ``mask`` is not a mask.
        ScoreError: ``quantize`` is no specification.
        ImportError: transformers is missing or older than 4.53.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise MaskError(f"register takes one of fuser.masks, not a {type(mask).__name__}")
    if quantize is not None and not isinstance(quantize, ScoreQuantization):
        kind = type(quantize).__name__
        raise ScoreError(f"quantize must be a fuser.DEQ, a fuser.Sanger, a fuser.Int8Attention or None, not a {kind}")
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError("fuser.integrations.transformers needs transformers 4.53 or later") from error
    AttentionInterface.register(name, _forward_with(mask, quantize))
    _registered.add(name)
    # Boolean 4-D masks, or None where the causal flag or nothing at all says the same.
    AttentionMaskInterface.register(name, sdpa_mask)


def without_hints(model: nn.Module, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keyword arguments of a call of ``model`` without the lengths of the longest documents, which differ with every
    batch and which our attention reads from the offsets; all where another attention or the model itself takes them."""
    if "cu_seq_lens_q" not in arguments or arguments.keys().isdisjoint(_HINTS):
        return arguments
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in _registered or not inspect.signature(model.forward).parameters.keys().isdisjoint(_HINTS):
        return arguments
    return {name: value for name, value in arguments.items() if name not in _HINTS}


def _forward_with(
    pattern: Mask | None, quantize: ScoreQuantization | None = None
) -> Callable[..., tuple[Tensor, None]]:
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
        attn_mask = _with_bias(attention_mask, position_bias)
        if attn_mask is not None:
            attn_mask = attn_mask[..., :kv_len]
        rule = None if softcap is None else SoftCap(softcap)
        cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
        packed = cu_q is not None and cu_k is not None
        if packed and (query.shape[0] != 1 or dropout):
            raise ValueError('attn_implementation="fuser" takes cu_seq_lens for one row of documents, without dropout')
        if quantize is not None and dropout:
            raise ValueError("quantize= takes no dropout")
        # A mask says of documents what it says of rows, but not what is the largest element of each.
        by_document = quantize is None or quantize.is_by_document(rule)
        if packed and not by_document:
            raise ValueError("quantize= of documents in one row compares within rows: granularity='seq', not 'dynamic'")
        if not packed and not dropout and by_document:
            cu_q = cu_k = _starts(kwargs.get("position_ids"), attn_mask)
        if cu_q is not None and cu_k is not None:
            visible = pattern if not decoder else Causal() if pattern is None else Causal() & pattern
            if attn_mask is None or _says_no_more(attn_mask, cu_q, cu_k, bool(decoder)):
                return _of_documents(query, key, value, cu_q, cu_k, visible, rule, quantize, scaling), None
            if packed and quantize is not None and not quantize.is_by_row:
                raise ValueError(
                    "quantize= of documents that the model masks itself compares within rows: smooth=False"
                )
            if packed and pattern is not None:
                raise MaskError(f"documents that the model masks itself cannot have the mask {pattern.name} as well")
            if packed:
                attn_mask = _within_documents(attn_mask, cu_q, cu_k, q_len, kv_len)
        own, offset = pattern, 0
        if q_len != kv_len:
            offset = kv_len - q_len
            if not decoder or offset < 0:
                own, offset = None, 0
        if dropout and rule is not None:
            raise ValueError('attn_implementation="fuser" does not support dropout of soft-capped scores; use "eager"')
        if dropout:
            out = _with_dropout(query, key, value, own, attn_mask, causal, offset, dropout, scaling)
        else:
            how: dict[str, Any] = {"rule": rule, "quantize": quantize, "scale": scaling}
            out = attend(query, key, value, own, attn_mask, causal=causal, offset=offset, **how)
        return out.transpose(1, 2).contiguous(), None

    return fuser_attention_forward


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask and a learned bias of positions as one operand."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -math.inf)
    return mask + bias


def _of_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    mask: Mask | None,
    rule: SoftCap | None,
    quantize: ScoreQuantization | None,
    scale: float | None,
) -> Tensor:
    """Attention within the documents of one row: (1, H, S, D) to (1, S, H, Dv)."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, score=rule, quantize=quantize, scale=scale)
    return out[None]  # type: ignore[call-overload]


def _starts(position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Where positions start again in one row, and its end, if values can be looked at and they do."""
    if position_ids is None or mask is None or not _has_values(mask) or mask.shape[-1] != position_ids.numel():
        return None
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    if position_ids.shape[0] != 1 or len(starts) < 2 or starts[0] != 0:
        return None
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])])


def _has_values(tensor: Tensor) -> bool:
    """Whether this is no stand-in of a trace."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _same_document(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """(q_len, kv_len) bool: whether tokens are of one document."""
    rows, keys = (
        torch.searchsorted(cu.to(device), torch.arange(n, dtype=cu.dtype, device=device), right=True)
        for cu, n in ((cu_seqlens_q, q_len), (cu_seqlens_k, kv_len))
    )
    return rows[:, None] == keys[None, :]


def _says_no_more(mask: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> bool:
    """Whether a mask of one row says nothing but which tokens are of one document, and the causal order."""
    q_len, kv_len = mask.shape[-2:]
    if not _has_values(mask) or mask.dtype != torch.bool or q_len != kv_len or mask.numel() != q_len * kv_len:
        return False
    same = _same_document(cu_seqlens_q, cu_seqlens_k, q_len, kv_len, mask.device)
    return torch.equal(mask.reshape(q_len, kv_len), same.tril() if causal else same)


def _within_documents(mask: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, kv_len: int) -> Tensor:
    """What a mask allows within documents."""
    same = _same_document(cu_seqlens_q, cu_seqlens_k, q_len, kv_len, mask.device)
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -math.inf)


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Mask | None,
    attn_mask: Tensor | None,
    causal: bool,
    offset: int,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Training: PyTorch's own attention, under the same masks."""
    mask = attn_mask
    if pattern is not None or (causal and attn_mask is not None):
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
