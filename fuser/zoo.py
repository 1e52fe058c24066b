"""Built-in model configurations: well-known architectures with random weights from a seed, for trying things out."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuser.ir.errors import FuserError


@dataclass(frozen=True)
class Sizes:
    """What can be chosen about a configuration. ``vocabulary`` is 0 for models that read no tokens, ``seq`` the number
    of tokens of the example input (of image patches, without the class token, for a ViT)."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    seq: int
    batch: int = 1

    def check(self, name: str) -> None:
        """Raise FuserError for sizes that no model can have."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < (0 if field.name == "vocabulary" else 1):
                raise FuserError(f"{name}: {field.name} is {value}; it must be positive")
        if self.hidden % self.heads:
            raise FuserError(f"{name}: hidden = {self.hidden} is not a multiple of heads = {self.heads}")


@dataclass(frozen=True)
class Configuration:
    """An architecture with its published sizes; ``make`` builds it, ``example`` the keyword arguments of one call."""

    name: str
    summary: str
    sizes: Sizes
    make: Callable[[Sizes], nn.Module]
    example: Callable[[Sizes, bool], dict[str, Tensor]]

    def build(self, seed: int = 0, **sizes: int) -> tuple[nn.Module, Sizes]:
        """The model in evaluation mode with random weights, and its sizes. Raises FuserError for impossible sizes or
        when ``transformers`` is missing."""
        chosen = dataclasses.replace(self.sizes, **sizes)
        chosen.check(self.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(chosen).eval(), chosen


def padding_mask(batch: int, seq: int) -> Tensor:
    """(batch, seq) int64: 1 for tokens, 0 for padding; lengths fall evenly from ``seq`` to half of it."""
    lengths = torch.tensor([seq - i * seq // (2 * batch) for i in range(batch)])
    return (torch.arange(seq) < lengths[:, None]).long()


def transformers() -> Any:
    """The ``transformers`` package. Raises FuserError when it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise FuserError(f"this needs the package transformers ({error}): pip install 'sparse-fuser[demo]'") from error


def _bert(sizes: Sizes) -> nn.Module:
    package = transformers()
    model: nn.Module = package.BertModel(
        package.BertConfig(
            vocab_size=sizes.vocabulary,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.intermediate,
            max_position_embeddings=max(512, sizes.seq),
        )
    )
    return model


def _gpt2(sizes: Sizes) -> nn.Module:
    package = transformers()
    model: nn.Module = package.GPT2Model(
        package.GPT2Config(
            vocab_size=sizes.vocabulary,
            n_layer=sizes.layers,
            n_embd=sizes.hidden,
            n_head=sizes.heads,
            n_inner=sizes.intermediate,
            n_positions=max(1024, sizes.seq),
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )
    return model


_PATCH = 16


def _patches(sizes: Sizes) -> int:
    """Patches along one side of the image."""
    side = math.isqrt(sizes.seq)
    if side * side != sizes.seq:
        raise FuserError(f"vit-b16: {sizes.seq} patches do not make a square image; choose 196, 256, 576, …")
    return side


def _vit(sizes: Sizes) -> nn.Module:
    package = transformers()
    model: nn.Module = package.ViTModel(
        package.ViTConfig(
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.intermediate,
            image_size=_PATCH * _patches(sizes),
            patch_size=_PATCH,
        )
    )
    return model


def _encoder(sizes: Sizes) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        sizes.hidden, sizes.heads, sizes.intermediate, activation="gelu", batch_first=True
    )
    return nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)


def _tokens(sizes: Sizes, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    call = {"input_ids": torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.seq), generator=generator)}
    return {**call, "attention_mask": padding_mask(sizes.batch, sizes.seq)} if padded else call


def _vectors(sizes: Sizes, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    call = {"src": torch.randn(sizes.batch, sizes.seq, sizes.hidden, generator=generator)}
    return {**call, "src_key_padding_mask": padding_mask(sizes.batch, sizes.seq) == 0} if padded else call


def _pixels(sizes: Sizes, padded: bool) -> dict[str, Tensor]:
    if padded:
        raise FuserError("vit-b16 has no padding: every image has the same number of patches")
    side = _PATCH * _patches(sizes)
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(sizes.batch, 3, side, side, generator=generator)}


CONFIGURATIONS: Mapping[str, Configuration] = {
    configuration.name: configuration
    for configuration in (
        Configuration(
            "bert-base",
            "BERT base encoder (transformers.BertModel)",
            Sizes(layers=12, hidden=768, heads=12, intermediate=3072, vocabulary=30522, seq=128),
            _bert,
            _tokens,
        ),
        Configuration(
            "minilm",
            "MiniLM-L6 sentence encoder (transformers.BertModel)",
            Sizes(layers=6, hidden=384, heads=12, intermediate=1536, vocabulary=30522, seq=128),
            _bert,
            _tokens,
        ),
        Configuration(
            "vit-b16",
            "Vision Transformer, base, 16 × 16 patches of a 224 × 224 image (transformers.ViTModel)",
            Sizes(layers=12, hidden=768, heads=12, intermediate=3072, vocabulary=0, seq=196),
            _vit,
            _pixels,
        ),
        Configuration(
            "gpt2",
            "GPT-2 small, prefill without a cache (transformers.GPT2Model)",
            Sizes(layers=12, hidden=768, heads=12, intermediate=3072, vocabulary=50257, seq=128),
            _gpt2,
            _tokens,
        ),
        Configuration(
            "transformer-encoder",
            "PyTorch's own torch.nn.TransformerEncoder",
            Sizes(layers=6, hidden=512, heads=8, intermediate=2048, vocabulary=0, seq=128),
            _encoder,
            _vectors,
        ),
    )
}
"""Every built-in configuration by name."""


def configuration(name: str) -> Configuration:
    """The built-in configuration called ``name``. Raises FuserError for an unknown one."""
    try:
        return CONFIGURATIONS[name]
    except KeyError:
        raise FuserError(
            f"there is no built-in configuration {name!r}; choose one of {', '.join(CONFIGURATIONS)}, "
            "or name a model of your own as module:callable"
        ) from None
