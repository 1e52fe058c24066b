"""Linear attention token by token, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    normalize: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    q, k, v = (t.double() for t in (q, k, v))
    batch, heads, _, width = k.shape
    if normalize is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    s = k.new_zeros(batch, heads, width, v.shape[-1]) if state is None else state.double()
    of_query = torch.arange(q.shape[1]) // (q.shape[1] // heads)
    outs = []
    for t in range(k.shape[2]):
        if decay is not None:
            s = s * decay.double().expand(batch, heads, k.shape[2], -1)[:, :, t].exp()[..., None]
        u = v[:, :, t]
        if beta is not None:
            found = (s * k[:, :, t, :, None]).sum(2)
            u = beta.double().expand(batch, heads, k.shape[2], 1)[:, :, t] * (u - found)
        s = s + k[:, :, t, :, None] * u[:, :, None]
        if causal:
            outs.append((s[:, of_query] * q[:, :, t, :, None]).sum(2))
    out = torch.stack(outs, 2) if causal else torch.einsum("bhtd,bhdm->bhtm", q, s[:, of_query])
    out = out * scale
    return (out if normalize is None else out[..., :-1] / out[..., -1:].clamp(min=normalize)), s
