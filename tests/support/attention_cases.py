"""Inputs and checks that the tests of attention share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_reference import exact
from torch import Tensor, nn

from fuser import DEQ, Int8Attention, sparse_attention
from fuser.ir.score_quantization import ScoreQuantization
from fuser.runtime.device import cpu_target

OPERATOR = torch.ops.fuser.sparse_attention.default
WITH_LSE = torch.ops.fuser.sparse_attention_lse.default


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, q_len: int = 70, kv_len: int = 90, width: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, width), (batch, kv_heads, kv_len, width), (batch, kv_heads, kv_len, width))
    q, k, v = (torch.randn(*shape, generator=g) for shape in shapes)
    return q, k, v


def multiplies_bytes(how: ScoreQuantization) -> bool:
    """Whether this CPU's kernel multiplies weights and values as bytes."""
    in_bytes = isinstance(how, Int8Attention) or (isinstance(how, DEQ) and how.high_bits is not None)
    return in_bytes and bool(cpu_target().features & {"avx512_vnni", "avx_vnni"})


def rounding_of(how: ScoreQuantization, values: float = 3.0) -> float:
    """How far kernels with few bits are from the reference, for values up to ``values``: where the CPU multiplies them
    so, weights become 255ths and values 127ths of their largest, or both bf16."""
    if multiplies_bytes(how):
        return values * (1 / 255 + 0.5 / 127)
    return values / 3 * 2.0**-6 if "avx512_bf16" in cpu_target().features else 3e-6


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None = None) -> None:
    """Relative error at most twice that of eager attention (rows that see nothing, which are NaN there, apart)."""
    want, _ = exact(q, k, v, allowed, bias)
    seen = allowed.broadcast_to(*q.shape[:3], k.shape[2]).any(-1)
    mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~allowed, -math.inf)
    mask = (mask if bias is None else mask + bias).to(q.dtype)
    eager = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert relative(out[seen], want[seen]) <= 2 * relative(eager[seen], want[seen])
    assert not out[~seen].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside tokens": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "strided columns": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
}


class Block(nn.Module):
    def __init__(self, mask: Any, lse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)
        self.mask = mask
        self.lse = lse

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.lse:
            out, lse = sparse_attention(q, k, v, self.mask, return_lse=True)
            return self.out(out.transpose(1, 2).flatten(2)), lse
        return self.out(sparse_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))  # type: ignore[union-attr]


X = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(4))
