"""Transformers of fairseq with any attention, as in the experiments of EVA and LARA: a language model, and an encoder
with a decoder for translation.

``language_model("transformer_lm_wiki103", "causal_eva", window_size=128, chunk_size=8, use_t5_rpe=True)`` and
``translator("transformer_wmt_en_de", "lara", proposal_gen="adaptive-1d", num_landmarks=16)`` make them. Parameters have
the names of fairseq (Ott et al., 2019) with the attention of the reference (Zheng et al., efficient-attention), whose
checkpoints load.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuser.attention import build as build_attention
from fuser.attention import configure
from fuser.attention.mechanisms.causal_eva import CausalEvaAttention
from fuser.attention.mechanisms.features import attend
from fuser.attention.mechanisms.windows import first_tokens, heads_of, missing_tokens
from fuser.attention.windowed import attend_windows, is_known_to
from fuser.evit import resized
from fuser.ir.errors import MechanismError

PAD = 1
"""The token of padding in fairseq's dictionaries."""
_FIRST = PAD + 1
"""The position of the first token: those up to padding's have none."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """``cutoffs`` split the vocabulary into bands, of which each has embeddings of a quarter of the width of the one
    before (Baevski and Auli, Adaptive Input Representations, 2019). ``layers`` are those of encoder and decoder each.

    Raises MechanismError for sizes that no model has.
    """

    dim: int
    heads: int
    hidden: int
    layers: int
    vocabulary: int
    cutoffs: Sequence[int] = ()
    norm_first: bool = False
    final_norm: bool = False
    dropout: float = 0.1
    longest: int = 1024
    """Tokens that there are positions for."""

    def __post_init__(self) -> None:
        bands = [0, *self.cutoffs, self.vocabulary]
        if min(self.dim, self.heads, self.hidden, self.layers, self.longest) < 1 or self.dim % 2:
            raise MechanismError(f"sizes must be positive, and dim even: {self}")
        if any(b - a <= PAD for a, b in itertools.pairwise(bands)) or self.dim < 4 ** len(self.cutoffs):
            raise MechanismError(
                f"cutoffs {self.cutoffs} make no bands of {self.vocabulary} words of {self.dim} channels"
            )


LANGUAGE_MODELS: Mapping[str, Sizes] = {
    "transformer_lm_wiki103": Sizes(
        dim=1024,
        heads=8,
        hidden=4096,
        layers=16,
        vocabulary=267_744,
        cutoffs=(20_000, 60_000),
        norm_first=True,
        dropout=0.3,
        longest=8192,
    ),
    "transformer_lm": Sizes(
        dim=512, heads=8, hidden=2048, layers=6, vocabulary=50_000, norm_first=True, final_norm=True, longest=8192
    ),
}
TRANSLATORS: Mapping[str, Sizes] = {
    "transformer_wmt_en_de": Sizes(dim=512, heads=8, hidden=2048, layers=6, vocabulary=32_768),
    "transformer_iwslt_de_en": Sizes(dim=512, heads=4, hidden=1024, layers=6, vocabulary=10_152, dropout=0.3),
}


class AdaptiveInput(nn.Module):
    """Embeddings whose width depends on how frequent a word is, with a projection for each: (B, N) → (B, N, C)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bands = [0, *sizes.cutoffs, sizes.vocabulary]
        self.embeddings = nn.ModuleList()
        for i, (first, last) in enumerate(itertools.pairwise(self.bands)):
            width = sizes.dim // 4**i
            words = nn.Embedding(last - first, width, padding_idx=PAD)
            projection = nn.Linear(width, sizes.dim, bias=False)
            _initialize_embedding(words)
            nn.init.xavier_uniform_(projection.weight)
            self.embeddings.append(nn.Sequential(words, projection))

    def forward(self, tokens: Tensor) -> Tensor:
        out = None
        for first, last, band in zip(self.bands, self.bands[1:], self.embeddings, strict=False):
            own: Tensor = band((tokens - first).clamp(0, last - first - 1))
            out = own if out is None else torch.where((tokens >= first).unsqueeze(-1), own, out)
        assert out is not None
        return out


class Tied(nn.Module):
    """x · weightᵀ, or x · weight if ``transposed``, with the weight of another module."""

    def __init__(self, weight: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T if self.transposed else self.weight)


class AdaptiveHead(nn.Module):
    """Scores of the most frequent words, and of each other band as a whole."""

    def __init__(self, words: nn.Parameter, bands: int) -> None:
        super().__init__()
        self.word_proj = Tied(words)
        self.class_proj = nn.Linear(words.shape[1], bands, bias=False)
        nn.init.xavier_uniform_(self.class_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.word_proj(x), self.class_proj(x)], -1)


class AdaptiveSoftmax(nn.Module):
    """Logarithms of probabilities (B, N, vocabulary) by the embeddings of an :class:`AdaptiveInput` (Grave et al.,
    Efficient softmax approximation for GPUs, 2017)."""

    def __init__(self, words: AdaptiveInput, dropout: float) -> None:
        super().__init__()
        (common, _), *rare = (list(band.parameters()) for band in words.embeddings)
        self.common = common.shape[0]
        self.head = AdaptiveHead(common, len(words.embeddings) - 1)
        self.tail = nn.ModuleList()
        for embedding, projection in rare:
            self.tail.append(nn.Sequential(Tied(projection, True), nn.Dropout(dropout), Tied(embedding)))

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(x).log_softmax(-1)
        parts = [head[..., : self.common]]
        for i, band in enumerate(self.tail):
            parts.append(band(x).log_softmax(-1) + head[..., self.common + i, None])
        return torch.cat(parts, -1)


class Positions(nn.Module):
    """Sines and cosines (Vaswani et al., 2017) for tokens (B, N), counted without padding, which has none."""

    table: Tensor

    def __init__(self, dim: int, longest: int) -> None:
        super().__init__()
        half = dim // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10_000) / max(half - 1, 1)))
        angles = torch.arange(_FIRST + longest).unsqueeze(1) * rates
        table = torch.cat([angles.sin(), angles.cos()], 1)
        table[PAD] = 0
        self.register_buffer("table", table, persistent=False)
        self.longest = longest

    def forward(self, tokens: Tensor, padded: bool) -> Tensor:
        if tokens.shape[1] > self.longest:
            raise MechanismError(f"{tokens.shape[1]} tokens are more than the {self.longest} with positions (longest=)")
        if not padded:
            return self.table[_FIRST : _FIRST + tokens.shape[1]]
        seen = tokens.ne(PAD)
        return F.embedding(seen.cumsum(1) * seen + PAD, self.table)


class ProjectedAttention(nn.Module):
    """Exact attention with a projection each for queries, keys and values, of tokens (B, N, C).

    ``causal`` tokens see those before them; with a ``window`` only those of their own window. Else they see what is
    given as ``memory`` (B, S, C) and not ``hidden`` (B, S).
    """

    def __init__(self, dim: int, heads: int, dropout: float, causal: bool = True, window: int = 0) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal, self.window = heads, dropout, causal, window
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(layer.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, memory: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        dropout = self.dropout if self.training else 0.0
        count, joined = x.shape[1], not self.window or (not dropout and is_known_to(q, k, v))
        if not joined:
            # Windows are entries of the batch.
            padding = (0, 0, 0, missing_tokens(count, self.window))
            q, k, v = (torch.unflatten(F.pad(t, padding), 1, (-1, self.window)).flatten(0, 1) for t in (q, k, v))
        q, k, v = (heads_of(t, self.heads) for t in (q, k, v))
        if self.window and joined:
            out = attend_windows(q, k, v, window=self.window, causal=True)
        elif self.causal:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            out = attend(q, k, v, None if hidden is None else hidden[:, None, None], dropout=dropout)
        mixed = out.transpose(1, 2).flatten(2)
        if not joined:
            mixed = first_tokens(torch.unflatten(mixed, 0, (x.shape[0], -1)).flatten(1, 2), count)
        projected: Tensor = self.out_proj(mixed)
        return projected


class MixedTokens(nn.Module):
    """An attention of tokens to themselves, under the name that the reference's checkpoints have for it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        out: Tensor = self.attn(x, hidden)
        return out


class Layer(nn.Module):
    """Attention to tokens themselves, to a ``memory`` where there is one, and an MLP, each with a residual around it
    and a norm before or behind it, of tokens (B, N, C)."""

    def __init__(self, sizes: Sizes, self_attention: nn.Module, remembers: bool = False) -> None:
        super().__init__()
        self.norm_first, self.dropout = sizes.norm_first, nn.Dropout(sizes.dropout)
        self.self_attn = self_attention
        self.self_attn_layer_norm = nn.LayerNorm(sizes.dim)
        if remembers:
            self.encoder_attn = ProjectedAttention(sizes.dim, sizes.heads, sizes.dropout, causal=False)
            self.encoder_attn_layer_norm = nn.LayerNorm(sizes.dim)
        self.fc1, self.fc2 = nn.Linear(sizes.dim, sizes.hidden), nn.Linear(sizes.hidden, sizes.dim)
        self.final_layer_norm = nn.LayerNorm(sizes.dim)

    def forward(self, x: Tensor, memory: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        x = self._around(self.self_attn_layer_norm, lambda y: self._attend(y, memory, hidden), x)
        if memory is not None:
            x = self._around(self.encoder_attn_layer_norm, lambda y: self.encoder_attn(y, memory, hidden), x)
        return self._around(self.final_layer_norm, lambda y: self.fc2(F.relu(self.fc1(y))), x)

    def _attend(self, x: Tensor, memory: Tensor | None, hidden: Tensor | None) -> Tensor:
        if isinstance(self.self_attn, CausalEvaAttention):
            # Time comes first there, as everywhere in fairseq.
            causal: Tensor = self.self_attn(x.transpose(0, 1))[0]
            return causal.transpose(0, 1)
        # What is hidden belongs to the memory, if there is one.
        out: Tensor = self.self_attn(x, hidden) if isinstance(self.self_attn, MixedTokens) else self.self_attn(x)
        return out

    def _around(self, norm: nn.Module, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.norm_first:
            added: Tensor = x + self.dropout(part(norm(x)))
            return added
        normed: Tensor = norm(x + self.dropout(part(x)))
        return normed


class Stack(nn.Module):
    """Embeddings, positions and layers of an encoder or a decoder: tokens (B, N), int64, → (B, N, C)."""

    adaptive_softmax: nn.Module
    output_projection: nn.Module

    def __init__(self, sizes: Sizes, words: nn.Module, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.embed_tokens = words
        self.embed_positions = Positions(sizes.dim, sizes.longest)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(sizes.dim) if sizes.final_norm else None
        self.scale, self.dropout = math.sqrt(sizes.dim), nn.Dropout(sizes.dropout)

    def forward(
        self, tokens: Tensor, memory: Tensor | None = None, hidden: Tensor | None = None, padded: bool = False
    ) -> Tensor:
        x = self.dropout(self.embed_tokens(tokens) * self.scale + self.embed_positions(tokens, padded))
        for layer in self.layers:
            x = layer(x, memory, hidden)
        out: Tensor = x if self.layer_norm is None else self.layer_norm(x)
        return out


class _Checkpointed(nn.Module):
    """A model that loads fairseq's checkpoints, which also hold versions and empty tensors."""

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        for name in [n for n in state_dict if n.rpartition(".")[2] in ("version", "_float_tensor")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


class LanguageModel(_Checkpointed):
    """Scores (B, N, vocabulary) of the next token after each of the tokens (B, N), int64. With ``cutoffs`` they are
    logarithms of probabilities. The weights of words are shared.

    Raises MechanismError for an attention that is not causal, and for more tokens than there are positions.
    """

    def __init__(self, sizes: Sizes, attention: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        words = AdaptiveInput(sizes) if sizes.cutoffs else _embedding(sizes)
        layers = (Layer(sizes, _causal(sizes, attention, arguments)) for _ in range(sizes.layers))
        self.decoder = Stack(sizes, words, layers)
        # Where fairseq has them.
        if isinstance(words, AdaptiveInput):
            self.decoder.adaptive_softmax = AdaptiveSoftmax(words, sizes.dropout)
        else:
            self.decoder.output_projection = _tied_to(words)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.decoder(tokens)
        last = self.decoder.adaptive_softmax if hasattr(self.decoder, "adaptive_softmax") else None
        scores: Tensor = (self.decoder.output_projection if last is None else last)(out)
        return scores


class Translator(_Checkpointed):
    """Scores (B, T, vocabulary) of the next token after each of ``target`` (B, T), given ``source`` (B, S), both int64.

    An encoder with any attention, and a decoder with a causal one; :data:`PAD` fills short sources. One table of words
    serves both and the scores. Raises MechanismError as :class:`LanguageModel` does.
    """

    def __init__(self, sizes: Sizes, attention: str, arguments: Mapping[str, Any], decoder: tuple[str, Any]) -> None:
        super().__init__()
        words = _embedding(sizes)
        self.encoder = Stack(
            sizes,
            words,
            (
                Layer(sizes, MixedTokens(build_attention(attention, dim=sizes.dim, num_heads=sizes.heads, **arguments)))
                for _ in range(sizes.layers)
            ),
        )
        layers = (Layer(sizes, _causal(sizes, *decoder), remembers=True) for _ in range(sizes.layers))
        self.decoder = Stack(sizes, words, layers)
        self.decoder.output_projection = _tied_to(words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = source.eq(PAD)
        memory = self.encoder(source, hidden=hidden, padded=True)
        scores: Tensor = self.decoder.output_projection(self.decoder(target, memory, hidden))
        return scores


def _initialize_embedding(words: nn.Embedding) -> None:
    nn.init.normal_(words.weight, std=words.embedding_dim**-0.5)
    with torch.no_grad():
        words.weight[PAD] = 0


def _embedding(sizes: Sizes) -> nn.Embedding:
    words = nn.Embedding(sizes.vocabulary, sizes.dim, padding_idx=PAD)
    _initialize_embedding(words)
    return words


def _tied_to(words: nn.Embedding) -> nn.Linear:
    scores = nn.Linear(words.embedding_dim, words.num_embeddings, bias=False)
    scores.weight = words.weight
    return scores


def _causal(sizes: Sizes, attention: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The attention of a decoder: ``softmax``, ``local`` (``window_size`` tokens) or ``causal_eva``."""
    if attention == "causal_eva":
        given = {"dropout": sizes.dropout, "causal": True, "self_attention": True, **arguments}
        module = build_attention(attention, embed_dim=sizes.dim, num_heads=sizes.heads, **given)
        if not module.causal:
            raise MechanismError("a decoder needs causal=True")
        return module
    if attention not in ("softmax", "local"):
        raise MechanismError(f"{attention} has no causal form; a decoder has causal_eva, softmax or local attention")
    known = {"window_size"} if attention == "local" else set()
    if unknown := {*arguments} - known:
        raise MechanismError(f"{attention} attention of a decoder has no argument {', '.join(sorted(unknown))}")
    window = arguments.get("window_size", 4) if known else 0
    if known and window < 1:
        raise MechanismError(f"window_size is {window}; it must be at least 1")
    configure("softmax", dim=sizes.dim, num_heads=sizes.heads)
    return ProjectedAttention(sizes.dim, sizes.heads, sizes.dropout, window=window)


def language_model(
    name: str, attention: str = "softmax", *, sizes: Mapping[str, Any] | None = None, **arguments: Any
) -> LanguageModel:
    """A model of :data:`LANGUAGE_MODELS`, with other ``sizes`` if given, in training mode; ``arguments`` are the
    attention's: ``softmax``, ``local`` (``window_size``) or ``causal_eva``.

    Raises MechanismError for an unknown name, impossible sizes, attention that is not causal, and arguments that it
    does not have.
    """
    return LanguageModel(resized(LANGUAGE_MODELS, name, sizes, "language model"), attention, arguments)


def translator(
    name: str,
    attention: str = "softmax",
    *,
    decoder: str = "softmax",
    decoder_arguments: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Translator:
    """A model of :data:`TRANSLATORS` with an ``attention`` of its encoder and one of its ``decoder``, in training mode.

    Raises MechanismError as :func:`language_model` does.
    """
    chosen = resized(TRANSLATORS, name, sizes, "translator")
    return Translator(chosen, attention, arguments, (decoder, decoder_arguments or {}))
