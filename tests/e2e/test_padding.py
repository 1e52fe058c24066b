"""Encoders of Hugging Face without their padding: rows of tokens as eager has them, rows of padding zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuser

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 1}
MODERN |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bert, eager": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, attn_implementation="eager")),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTIL)),
    "modernbert": lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES, **MODERN)),
    "classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
}
# Its pooler takes the first position, between which and tokens there is padding on the left.
REFUSED = {"mpnet": "distance"}


def batch(seed: int, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (3, 24), generator=generator)
    at, length = torch.arange(24), torch.randint(2, 23, (3, 1), generator=generator)
    mask = at >= 24 - length if left else at < length
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("name", MODELS)
def test_encoders_without_padding(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fast = fuser.optimize(model, padding="skip", search="model")
    exact = copy.deepcopy(model).double()
    for given in (batch(0), batch(1, left=True)):
        keep = given["attention_mask"].bool()
        with torch.inference_mode():
            got, expected = fast(**given), exact(**given)
        assert type(got).__name__ == type(expected).__name__ and got.keys() == expected.keys()
        for output, reference in zip(got.values(), expected.values(), strict=True):
            of_rows = output.shape[:2] == keep.shape
            chosen: Any = keep if of_rows else ...
            torch.testing.assert_close(output[chosen].double(), reference[chosen], rtol=0, atol=1e-5)
            if of_rows and name not in REFUSED:
                assert not output[~keep].any()
    why = [line for line in fast.snapshot().padding if "was computed" in line]
    assert [REFUSED[name] in line for line in why] == [True] if name in REFUSED else not why
    assert name in REFUSED or "rows were padding" in fast.snapshot().padding[0]
