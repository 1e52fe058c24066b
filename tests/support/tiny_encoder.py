"""A sentence encoder with random weights in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "from", "home", "rabbit", "time"]
WORDS += ["late", "tea", "cup", "queen"]


def write_encoder(path: Path) -> Path:
    """A BERT of two layers and a tokenizer of a few words, in the folder ``path``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *WORDS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    configuration = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    transformers.BertModel(configuration).save_pretrained(path)
    return path
