"""Well-known architectures of ``transformers``, small and with random weights, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fuser.zoo import transformers

_VOCABULARY = 100
_PATCH = 4


@dataclass(frozen=True)
class Scale:
    """How large the models are: ``hidden`` is a multiple of 16, ``length`` the number of tokens of a call."""

    hidden: int = 32
    layers: int = 2
    length: int = 12

    @property
    def heads(self) -> int:
        """Heads of at least 16 numbers each, in an even number."""
        return max(2, self.hidden // 64)

    @property
    def image(self) -> int:
        """Pixels along one side of an image."""
        return 8 * _PATCH


Options = Callable[[Scale], dict[str, Any]]
Call = Callable[[Scale], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Architecture:
    """A class of ``transformers`` with what its configuration is given beside the sizes, and one call's arguments."""

    model: str
    config: str
    options: Options
    call: Call

    def build(self, scale: Scale, seed: int = 0) -> nn.Module:
        """The model in evaluation mode with random weights. Raises FuserError when ``transformers`` is missing."""
        package = transformers()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = getattr(package, self.config)(**self.options(scale))
            model: nn.Module = getattr(package, self.model)(config)
        return model.eval()


def _tokens(scale: Scale) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, _VOCABULARY, (1, scale.length), generator=generator)}


def _long_tokens(scale: Scale) -> dict[str, torch.Tensor]:
    """More than a block-sparse model takes for short."""
    return _tokens(dataclasses.replace(scale, length=5 * scale.length))


def _pair(scale: Scale) -> dict[str, torch.Tensor]:
    ids = _tokens(scale)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, : max(scale.length // 2, 1)]}


def _pixels(scale: Scale) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(1, 3, scale.image, scale.image, generator=generator)}


def _image_and_text(scale: Scale) -> dict[str, torch.Tensor]:
    return {**_tokens(scale), **_pixels(scale)}


def _sound(scale: Scale) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_values": torch.randn(1, 320 * scale.length + 80, generator=generator)}


def _spectrum(scale: Scale) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 16, 2 * scale.length, generator=generator)
    return {"input_features": features, "decoder_input_ids": _tokens(scale)["input_ids"]}


def _special() -> dict[str, Any]:
    return {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _encoder(scale: Scale, **more: Any) -> dict[str, Any]:
    return {
        **_special(),
        "hidden_size": scale.hidden,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "intermediate_size": 2 * scale.hidden,
        "max_position_embeddings": scale.length + 8,
        **more,
    }


def _encoder_with(**more: Any) -> Options:
    return lambda scale: _encoder(scale, **more)


def _decoder(**more: Any) -> Options:
    """Decoders with grouped heads."""
    return lambda scale: _encoder(scale, num_key_value_heads=scale.heads // 2, **more)


def _gpt(**more: Any) -> Options:
    def options(scale: Scale) -> dict[str, Any]:
        sizes = {"n_layer": scale.layers, "n_embd": scale.hidden, "n_head": scale.heads, "n_positions": scale.length}
        return {**_special(), **sizes, **more}

    return options


def _two_towers(**more: Any) -> Options:
    def options(scale: Scale) -> dict[str, Any]:
        sides = ("encoder", "decoder")
        return {
            **_special(),
            "d_model": scale.hidden,
            "decoder_start_token_id": 1,
            "max_position_embeddings": scale.length + 8,
            **{f"{side}_layers": scale.layers for side in sides},
            **{f"{side}_attention_heads": scale.heads for side in sides},
            **{f"{side}_ffn_dim": 2 * scale.hidden for side in sides},
            **more,
        }

    return options


def _t5(scale: Scale) -> dict[str, Any]:
    return {
        **_special(),
        "d_model": scale.hidden,
        "d_ff": 2 * scale.hidden,
        "d_kv": scale.hidden // scale.heads,
        "num_layers": scale.layers,
        "num_heads": scale.heads,
        "decoder_start_token_id": 0,
    }


def _whisper(scale: Scale) -> dict[str, Any]:
    more = {"num_mel_bins": 16, "max_source_positions": scale.length, "max_target_positions": scale.length + 8}
    return {**_two_towers()(scale), **more}


def _vision(**more: Any) -> Options:
    return lambda scale: {
        "hidden_size": scale.hidden,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "intermediate_size": 2 * scale.hidden,
        "image_size": scale.image,
        "patch_size": _PATCH,
        **more,
    }


def _swin(scale: Scale) -> dict[str, Any]:
    return {
        "embed_dim": scale.hidden // 2,
        "depths": [scale.layers, scale.layers],
        "num_heads": [scale.heads, scale.heads],
        "window_size": 4,
        "image_size": scale.image,
        "patch_size": _PATCH,
    }


def _clip(scale: Scale) -> dict[str, Any]:
    return {
        "text_config": _encoder(scale),
        "vision_config": _vision()(scale),
        "projection_dim": scale.hidden,
    }


def _siglip(scale: Scale) -> dict[str, Any]:
    return {"text_config": {**_encoder(scale), "projection_size": scale.hidden}, "vision_config": _vision()(scale)}


def _big_bird(scale: Scale) -> dict[str, Any]:
    return _encoder(scale, block_size=4, num_random_blocks=1, max_position_embeddings=5 * scale.length)


def _led(scale: Scale) -> dict[str, Any]:
    more = {"attention_window": 4, "max_encoder_position_embeddings": scale.length + 8}
    return {**_two_towers()(scale), **more, "max_decoder_position_embeddings": scale.length + 8}


def _experts(**more: Any) -> Options:
    """Decoders with experts in their MLPs."""
    return _decoder(num_experts_per_tok=2, head_dim=16, **more)


def _wave(scale: Scale) -> dict[str, Any]:
    return {
        **_encoder(scale),
        "conv_dim": [scale.hidden] * 3,
        "conv_kernel": [10, 8, 4],
        "conv_stride": [10, 8, 4],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    name: Architecture(*parts)
    for name, parts in {
        # Encoders of text.
        "albert": ("AlbertModel", "AlbertConfig", _encoder_with(embedding_size=16), _tokens),
        "big-bird": ("BigBirdModel", "BigBirdConfig", _big_bird, _long_tokens),
        "bert": ("BertModel", "BertConfig", _encoder_with(), _tokens),
        "camembert": ("CamembertModel", "CamembertConfig", _encoder_with(), _tokens),
        "deberta-v2": (
            "DebertaV2Model",
            "DebertaV2Config",
            _encoder_with(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
            _tokens,
        ),
        "distilbert": (
            "DistilBertModel",
            "DistilBertConfig",
            lambda s: {
                "vocab_size": _VOCABULARY,
                "dim": s.hidden,
                "hidden_dim": 2 * s.hidden,
                "n_layers": s.layers,
                "n_heads": s.heads,
            },
            _tokens,
        ),
        "electra": ("ElectraModel", "ElectraConfig", _encoder_with(embedding_size=16), _tokens),
        "ernie": ("ErnieModel", "ErnieConfig", _encoder_with(), _tokens),
        "eurobert": ("EuroBertModel", "EuroBertConfig", _encoder_with(mask_token_id=3), _tokens),
        "fnet": ("FNetModel", "FNetConfig", _encoder_with(), _tokens),
        "longformer": ("LongformerModel", "LongformerConfig", _encoder_with(attention_window=4), _tokens),
        "modernbert": (
            "ModernBertModel",
            "ModernBertConfig",
            _encoder_with(cls_token_id=1, sep_token_id=2, local_attention=8),
            _tokens,
        ),
        "mpnet": ("MPNetModel", "MPNetConfig", _encoder_with(), _tokens),
        "nomic-bert": ("NomicBertModel", "NomicBertConfig", _encoder_with(), _tokens),
        "roberta": ("RobertaModel", "RobertaConfig", _encoder_with(), _tokens),
        "roformer": ("RoFormerModel", "RoFormerConfig", _encoder_with(), _tokens),
        "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _encoder_with(), _tokens),
        # Decoders of text.
        "bloom": (
            "BloomForCausalLM",
            "BloomConfig",
            lambda s: {**_special(), "hidden_size": s.hidden, "n_layer": s.layers, "n_head": s.heads},
            _tokens,
        ),
        "cohere": ("CohereForCausalLM", "CohereConfig", _decoder(), _tokens),
        "falcon": ("FalconForCausalLM", "FalconConfig", _encoder_with(), _tokens),
        "gemma": ("GemmaForCausalLM", "GemmaConfig", _decoder(head_dim=16), _tokens),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _decoder(head_dim=16), _tokens),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _decoder(head_dim=16), _tokens),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt(), _tokens),
        "gptj": ("GPTJForCausalLM", "GPTJConfig", _gpt(rotary_dim=8), _tokens),
        "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _encoder_with(), _tokens),
        "granite": ("GraniteForCausalLM", "GraniteConfig", _decoder(), _tokens),
        "llama": ("LlamaForCausalLM", "LlamaConfig", _decoder(), _tokens),
        "mistral": ("MistralForCausalLM", "MistralConfig", _decoder(), _tokens),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", _experts(num_local_experts=4), _tokens),
        "olmo": ("OlmoForCausalLM", "OlmoConfig", _decoder(), _tokens),
        "opt": (
            "OPTForCausalLM",
            "OPTConfig",
            lambda s: {
                **_encoder(s),
                "ffn_dim": 2 * s.hidden,
                "word_embed_proj_dim": s.hidden,
            },
            _tokens,
        ),
        "phi": ("PhiForCausalLM", "PhiConfig", _decoder(), _tokens),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", _decoder(), _tokens),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _decoder(), _tokens),
        "qwen2-moe": (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            _experts(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64),
            _tokens,
        ),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=16), _tokens),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", _decoder(), _tokens),
        "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _decoder(), _tokens),
        # Both.
        "bart": ("BartModel", "BartConfig", _two_towers(), _pair),
        "led": ("LEDModel", "LEDConfig", _led, _pair),
        "mbart": ("MBartModel", "MBartConfig", _two_towers(), _pair),
        "pegasus": ("PegasusModel", "PegasusConfig", _two_towers(), _pair),
        "t5": ("T5Model", "T5Config", _t5, _pair),
        "whisper": ("WhisperModel", "WhisperConfig", _whisper, _spectrum),
        # Images and sound.
        "beit": ("BeitModel", "BeitConfig", _vision(), _pixels),
        "clip": ("CLIPModel", "CLIPConfig", _clip, _image_and_text),
        "deit": ("DeiTModel", "DeiTConfig", _vision(), _pixels),
        "dinov2": ("Dinov2Model", "Dinov2Config", _vision(), _pixels),
        "siglip": ("SiglipModel", "SiglipConfig", _siglip, _image_and_text),
        "swin": ("SwinModel", "SwinConfig", _swin, _pixels),
        "swin-v2": ("Swinv2Model", "Swinv2Config", _swin, _pixels),
        "vit": ("ViTModel", "ViTConfig", _vision(), _pixels),
        "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _wave, _sound),
    }.items()
}
"""Every architecture by name."""
