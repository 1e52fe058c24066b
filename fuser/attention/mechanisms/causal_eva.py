"""Causal EVA, for language models: trained on whole sequences, decoded token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import MutableMapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuser.attention.mechanisms.configuration import CausalEvaConfiguration, Configuration
from fuser.attention.mechanisms.eva import summarize
from fuser.attention.mechanisms.features import attend
from fuser.attention.mechanisms.positions import BucketedPositions
from fuser.attention.mechanisms.softmax import check_padding, projection
from fuser.attention.mechanisms.windows import (
    Far,
    check_divides,
    first_tokens,
    heads_of,
    missing_tokens,
    padded,
    qkv_of,
    window_attention,
    windows,
)
from fuser.attention.windowed import is_known_to, windowed_attention
from fuser.ir.errors import MechanismError

State = MutableMapping[str, MutableMapping[str, Tensor]]


class NoisyLinear(nn.Linear):
    """A linear layer that trains with a share of its weight's blocks dropped (Fan et al., Training with Quantization
    Noise, ICLR 2021). A block is ``block`` inputs of one output."""

    def __init__(self, inputs: int, outputs: int, bias: bool, noise: float, block: int) -> None:
        super().__init__(inputs, outputs, bias)
        self.noise, self.block = noise, block
        if noise and inputs % block:
            raise MechanismError(f"{inputs} inputs are no multiple of qn_block_size = {block}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.noise:
            return super().forward(x)
        blocks = torch.rand(self.out_features, self.in_features // self.block, device=x.device) >= self.noise
        weight = self.weight * blocks.repeat_interleave(self.block, 1) / (1 - self.noise)
        return F.linear(x, weight, self.bias)


class CausalEvaAttention(nn.Module):
    """EVA (Zheng et al., ICLR 2023) for sequences, causal or not, with the interface of fairseq's attention.

    ``forward(query, key, value, key_padding_mask=None, incremental_state=None)`` takes (T, B, C), all of the same
    length, and returns (what has the shape of ``query``, None). A token sees the keys of its window up to itself, and
    one summary of each chunk before its own; with ``overlap_window`` also the window before. So earlier chunks of its
    window count twice, as in the reference. ``causal=False`` lets it see all of both.

    With ``incremental_state``, a dictionary that begins empty, a call appends any number of tokens; outputs are those
    of one call with all of them, since windows stay where training has them (the reference's slide). The state is
    reordered by ``reorder_incremental_state``. Padding is not known there.

    ``attn_mask`` exists because fairseq gives its causal mask there: it is implied by ``causal`` and nothing else can
    be given. ``need_weights`` is ignored: there are no weights.

    Raises:
        MechanismError: shapes do not fit, a mask with no causal attention, decoding without ``causal`` and
            ``chunk_size``, or with padding.
    """

    configuration_type: ClassVar[type[Configuration]] = CausalEvaConfiguration

    def __init__(self, configuration: CausalEvaConfiguration) -> None:
        super().__init__()
        c = configuration
        self.embed_dim, self.num_heads = c.embed_dim, c.num_heads
        self.head_dim = c.embed_dim // c.num_heads
        self.self_attention, self.causal, self.dropout = c.self_attention, c.causal, c.dropout
        self.window_size, self.extension = c.window_size, c.extension
        self.chunk_size, self.num_chunks = c.chunk_size, c.num_chunks
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            NoisyLinear(width or c.embed_dim, c.embed_dim, c.bias, c.q_noise, c.qn_block_size)
            for width in (c.kdim, c.vdim, None, None)
        )
        self.rel_pos_bias = None
        if c.use_t5_rpe:
            self.rel_pos_bias = BucketedPositions(
                c.window_size,
                c.extension,
                0,
                reach=c.window_size + c.extension,
                heads=1,
                scale=self.head_dim**-0.5,
                causal=c.causal,
                exact=c.exact_rpe,
            )
        self.adaptive_mu_q, self.adaptive_mu_k = (projection(self.head_dim, c.adaptive_proj == "qk") for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as the reference begins with."""
        same = self.k_proj.in_features == self.v_proj.in_features == self.embed_dim
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2) if same else 1.0)
        for mean in (self.adaptive_mu_q[0], self.adaptive_mu_k[0]):
            assert isinstance(mean, nn.Linear)
            nn.init.xavier_uniform_(mean.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        incremental_state: State | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        key = query if key is None or self.self_attention else key
        value = query if value is None or self.self_attention else value
        for name, x, layer in (("query", query, self.q_proj), ("key", key, self.k_proj), ("value", value, self.v_proj)):
            if x.ndim != 3 or x.shape[:2] != query.shape[:2] or x.shape[2] != layer.in_features:
                raise MechanismError(
                    f"{name} has the shape {tuple(x.shape)}; queries of the shape {tuple(query.shape)} need (time, "
                    f"batch, {layer.in_features})"
                )
        if attn_mask is not None and not self.causal:
            raise MechanismError("causal_eva knows no masks but the causal one: build it with causal=True")
        time, batch, _ = query.shape
        hidden = None if key_padding_mask is None else check_padding(key_padding_mask, (batch, time))
        operands = [x.transpose(0, 1) for x in (query, key, value)]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if incremental_state is not None:
            self._check_decoding(hidden)
            qkv = torch.cat([layer(x) for layer, x in zip(layers, operands, strict=True)], -1)
            mixed = self._append(qkv, incremental_state)
        elif self._joins(hidden, *(parts := [layer(x) for layer, x in zip(layers, operands, strict=True)])):
            mixed = self._at_once(*parts)
        else:
            qkv, hidden = padded(torch.cat(parts, -1), hidden, missing_tokens(time, self.window_size))
            mixed = first_tokens(self._by_windows(qkv, hidden), time)
        return self.out_proj(mixed).transpose(0, 1), None

    def _check_decoding(self, hidden: Tensor | None) -> None:
        if not self.causal or self.chunk_size is None:
            raise MechanismError("incremental_state needs causal=True and chunk_size: else tokens depend on later ones")
        if hidden is not None:
            raise MechanismError("incremental_state knows no padding; decode sequences of one length together")

    def _summaries(self, qkv: Tensor, size: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """A key and a value for each chunk of ``size`` tokens (B, N, 3 · C), both (B, H, chunks, D)."""
        q, k, v = qkv_of(windows(qkv, (qkv.shape[1],), size), self.num_heads)
        unseen = None if hidden is None else windows(hidden.unsqueeze(-1), (qkv.shape[1],), size)
        return self._summaries_of(q, k, v, unseen)

    def _summaries_of(self, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same of chunks (B, chunks, H, size, D)."""
        pair = summarize(q, k, v, unseen, self.adaptive_mu_q, self.adaptive_mu_k, 1.0, self.training)
        return pair[0].transpose(1, 2), pair[1].transpose(1, 2)

    def _joins(self, hidden: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether keys and summaries of a whole sequence are one list: where nothing asks for gradients or hides
        tokens, and tokens see whole chunks before them alone."""
        known = self.causal and self.chunk_size is not None and hidden is None
        return known and not (self.training and self.dropout) and is_known_to(q, k, v)

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a sequence of any length, (B, N, C) → (B, N, C)."""
        size = self.chunk_size
        assert size is not None
        whole = q.shape[1] // size * size
        chunks = (heads_of(torch.unflatten(first_tokens(x, whole), 1, (-1, size)), self.num_heads) for x in (q, k, v))
        q, k, v = (heads_of(x, self.num_heads) for x in (q, k, v))
        k_bar, beta = self._summaries_of(*chunks)
        sizes = {"window": self.window_size, "before": self.extension, "chunk": size}
        out = windowed_attention(q, k, v, k_bar, beta, self._position_bias(), **sizes)
        return out.transpose(1, 2).flatten(2)

    def _by_windows(self, qkv: Tensor, hidden: Tensor | None) -> Tensor:
        """Attention of whole windows, (B, N, 3 · C) → (B, N, C)."""
        tokens, size, extension, width = qkv.shape[1], self.window_size, self.extension, self.embed_dim
        grid = (tokens,)
        chunk = self._chunk(tokens)
        k_bar, beta = self._summaries(qkv, chunk, hidden)
        q = heads_of(windows(qkv[..., :width], grid, size), self.num_heads)
        seen = windows(qkv[..., width:], grid, size, extension)
        k, v = (heads_of(part, self.num_heads) for part in seen.chunk(2, -1))
        position = torch.arange(tokens, device=qkv.device)
        unseen, beyond = None, None
        if hidden is None and extension:
            hidden = qkv.new_zeros((1, tokens)).bool()
        if hidden is not None:
            # As in the reference, queries that are padding see none of the window.
            of_queries = windows(hidden.unsqueeze(-1), grid, size)
            unseen = (of_queries | windows(hidden.unsqueeze(-1), grid, size, extension, 0, True).mT).unsqueeze(2)
        if self.causal:
            future = torch.ones(size, extension + size, dtype=torch.bool, device=qkv.device).triu(1 + extension)
            unseen = future[None, None, None] if unseen is None else unseen | future
            beyond = position[: k_bar.shape[2]] >= (position // chunk).view(-1, size, 1)
            beyond = beyond[None, :, None]
        far = Far(k_bar.unsqueeze(1), beta.unsqueeze(1), hidden=beyond)
        out = window_attention(q, k, v, unseen, self._position_bias(), far, self.dropout if self.training else 0.0)
        return out.flatten(1, 2)

    def _position_bias(self) -> Tensor | None:
        """What is added to the scores of a window, (1, W, L)."""
        if self.rel_pos_bias is None:
            return None
        bias: Tensor = self.rel_pos_bias()
        return bias

    def _chunk(self, tokens: int) -> int:
        if self.chunk_size is not None:
            return self.chunk_size
        assert self.num_chunks is not None
        size = tokens // self.num_chunks
        if size == 0:
            raise MechanismError(f"num_chunks = {self.num_chunks} are more than the {tokens} tokens of all windows")
        check_divides(size, (tokens,), f"num_chunks = {self.num_chunks}: chunks")
        return size

    def _append(self, qkv: Tensor, incremental_state: State) -> Tensor:
        """Attention of new tokens (B, T, 3 · C) to all so far.

        The state keeps, of tokens in windows that later ones see, ``window`` (B, tokens, 2 · C: keys and values), of
        those in no whole chunk ``chunk`` (B, tokens, 3 · C), and the whole chunks' ``rf_k_bar`` and ``beta`` (B, H,
        chunks, D).
        """
        assert self.chunk_size is not None
        size, width, extension = self.window_size, self.embed_dim, self.extension
        batch, new, _ = qkv.shape
        state = incremental_state.get(self._key())
        if state is None:
            nothing = qkv.new_zeros(batch, self.num_heads, 0, self.head_dim)
            state = {"window": qkv[:, :0, width:], "chunk": qkv[:, :0], "rf_k_bar": nothing, "beta": nothing}
        if state["window"].shape[0] != batch:
            raise MechanismError(f"the state is of {state['window'].shape[0]} sequences and {batch} go on")
        past = state["rf_k_bar"].shape[2] * self.chunk_size + state["chunk"].shape[1]
        kept = torch.cat([state["window"], qkv[..., width:]], 1)
        open_chunk = torch.cat([state["chunk"], qkv], 1)
        whole = open_chunk.shape[1] // self.chunk_size * self.chunk_size
        k_bar, beta = state["rf_k_bar"], state["beta"]
        if whole:
            more = self._summaries(open_chunk[:, :whole], self.chunk_size, None)
            k_bar, beta = torch.cat([k_bar, more[0]], 2), torch.cat([beta, more[1]], 2)
        total = past + new
        first = total - kept.shape[1]
        out = torch.cat(
            [
                self._decode(qkv[:, start - past : stop - past, :width], start, kept, first, k_bar, beta)
                for start, stop in _by_window(past, total, size)
            ],
            1,
        )
        keep = total - max(total // size * size - extension, 0)
        incremental_state[self._key()] = {
            "window": kept[:, kept.shape[1] - keep :],
            "chunk": open_chunk[:, whole:],
            "rf_k_bar": k_bar,
            "beta": beta,
        }
        return out

    def _decode(self, q: Tensor, start: int, kept: Tensor, first: int, k_bar: Tensor, beta: Tensor) -> Tensor:
        """Attention of queries (B, T, C) of one window, which begin with token ``start``, to the keys and values
        ``kept`` (from token ``first`` on) that the window sees, and to the chunks before."""
        assert self.chunk_size is not None
        count = q.shape[1]
        row = start % self.window_size
        base = start - row - self.extension
        lowest = max(base, 0)
        k, v = (heads_of(part, self.num_heads) for part in kept[:, lowest - first : start + count - first].chunk(2, -1))
        queries = torch.arange(start, start + count, device=q.device).unsqueeze(-1)
        chunks = (start + count - 1) // self.chunk_size
        hidden = torch.cat(
            [
                torch.arange(lowest, start + count, device=q.device) > queries,
                torch.arange(chunks, device=q.device) >= queries // self.chunk_size,
            ],
            1,
        )
        bias = self._position_bias()
        if bias is not None:
            bias = F.pad(bias[:, row : row + count, lowest - base : start + count - base], (0, chunks))
        k, v = (torch.cat([own, other[:, :, :chunks]], 2) for own, other in ((k, k_bar), (v, beta)))
        dropout = self.dropout if self.training else 0.0
        return attend(heads_of(q, self.num_heads), k, v, hidden, bias, dropout).transpose(1, 2).flatten(2)

    def _key(self) -> str:
        # The module's own place in a state that all layers of a model share, also after it was copied.
        return f"{id(self)}.attn_state"

    def reorder_incremental_state(self, incremental_state: State, new_order: Tensor) -> State:
        """Let sequences go on from others, as beams do: ``new_order`` (int64) has the old index of each new one."""
        state = incremental_state.get(self._key())
        if state is not None:
            incremental_state[self._key()] = {name: x.index_select(0, new_order) for name, x in state.items()}
        return incremental_state

    def upgrade_state_dict_named(self, state_dict: MutableMapping[str, Any], name: str) -> None:
        """Split ``in_proj_weight`` and ``in_proj_bias`` of old checkpoints of the module called ``name``, in place."""
        prefix = f"{name}." if name else ""
        for old, new in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
            joined = state_dict.pop(prefix + old, None)
            if joined is not None:
                for layer, part in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
                    state_dict[f"{prefix}{layer}.{new}"] = part

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        self.upgrade_state_dict_named(state_dict, prefix.removesuffix("."))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _by_window(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Tokens ``start`` to ``stop`` cut where windows begin."""
    cuts = [start, *range((start // size + 1) * size, stop, size), stop]
    return list(itertools.pairwise(cuts))
