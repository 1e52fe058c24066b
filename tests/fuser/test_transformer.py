"""Language models and translators with any attention, at tiny sizes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import fuser
from fuser import transformer
from fuser.ir.errors import MechanismError
from fuser.transformer import PAD

SIZES = {"dim": 32, "heads": 2, "hidden": 64, "layers": 2, "vocabulary": 120, "longest": 64}
CAUSAL_EVA = {"window_size": 8, "chunk_size": 4, "use_t5_rpe": True}
ENCODERS: dict[str, dict[str, Any]] = {
    "eva": {
        "window_size": 8,
        "num_landmarks": 8,
        "adaptive_proj": "no-ln",
        "use_t5_rpe": True,
        "overlap_window": True,
    },
    "lara": {"num_landmarks": 8, "proposal_gen": "adaptive-1d"},
}
CUTOFFS = (20, 60)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(PAD + 1, 120, shape, generator=torch.Generator().manual_seed(0))


def language(attention: str, cutoffs: tuple[int, ...] = (), **arguments: Any) -> transformer.LanguageModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "cutoffs": cutoffs}
    return transformer.language_model("transformer_lm_wiki103", attention, sizes=sizes, **arguments)


def translating(encoder: str, **given: Any) -> transformer.Translator:
    torch.manual_seed(0)
    return transformer.translator("transformer_wmt_en_de", encoder, sizes=SIZES, **ENCODERS[encoder], **given)


def compare(model: nn.Module, *inputs: torch.Tensor) -> fuser.OptimizedModule:
    fast = fuser.optimize(model.eval(), search="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=2e-5)
    assert fast.fallbacks == ()
    return fast


def test_an_optimized_language_model_runs_causal_eva_in_fused_kernels() -> None:
    fast = compare(language("causal_eva", CUTOFFS, **CAUSAL_EVA), words(2, 40))
    # A layer's chunks, which stay where they are, and its tokens.
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "attention") >= 2


@pytest.mark.parametrize(("attention", "arguments"), [("local", {"window_size": 8}), ("causal_eva", CAUSAL_EVA)])
def test_one_capture_of_a_language_model_serves_all_lengths(
    attention: str, arguments: dict[str, Any], captures: list[str]
) -> None:
    model = language(attention, **arguments).eval()
    fast, exact = fuser.optimize(model, search="model"), copy.deepcopy(model).double()
    for tokens in (37, 40, 64, 21):
        given = words(2, tokens)
        with torch.no_grad():
            torch.testing.assert_close(fast(given).double(), exact(given), rtol=1e-5, atol=2e-5)
    assert captures == ["all"] and fast.fallbacks == ()


def test_one_capture_of_a_translator_serves_all_lengths(captures: list[str]) -> None:
    model = translating("eva").eval()
    fast, exact = fuser.optimize(model, search="model"), copy.deepcopy(model).double()
    for source, target in ((37, 30), (40, 41), (64, 17)):
        given = words(2, source), words(2, target)
        given[0][1, -5:] = PAD
        with torch.no_grad():
            torch.testing.assert_close(fast(*given).double(), exact(*given), rtol=1e-5, atol=2e-5)
    assert captures == ["all"] and fast.fallbacks == ()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_optimized_translator_runs_its_attention_in_fused_kernels(encoder: str) -> None:
    source = words(2, 24)
    source[1, 20:] = PAD
    fast = compare(translating(encoder), source, words(2, 9))
    # Of each layer two in the encoder, and two in the decoder.
    assert sum(kernel.calls for kernel in fast.kernels if kernel.family == "attention") >= 6


@pytest.mark.parametrize(
    ("attention", "arguments"), [("softmax", {}), ("local", {"window_size": 8}), ("causal_eva", CAUSAL_EVA)]
)
def test_tokens_depend_on_no_later_ones(attention: str, arguments: dict[str, Any]) -> None:
    model, tokens = language(attention, **arguments).eval(), words(2, 30)
    other = tokens.clone()
    other[:, 19:] = words(2, 11).flip(1)
    torch.testing.assert_close(model(tokens)[:, :19], model(other)[:, :19], rtol=1e-6, atol=1e-6)
    assert not torch.equal(model(tokens)[:, 19], model(other)[:, 19])
    # Words before a local window do not matter to it.
    other = tokens.clone()
    other[:, :8] = words(2, 8).flip(1)
    same = torch.allclose(model(tokens)[:, 8:], model(other)[:, 8:], atol=1e-6)
    assert same == (attention == "local")


def test_bands_of_words_have_embeddings_and_probabilities_of_their_own() -> None:
    model, tokens = language("softmax", CUTOFFS).eval(), torch.tensor([[5, 19, 20, 59, 60, 119]])
    embed = model.decoder.embed_tokens
    for token, found in zip(tokens[0].tolist(), embed(tokens)[0], strict=True):
        band = sum(token >= cut for cut in CUTOFFS)
        table, projection = (layer.weight for layer in embed.embeddings[band].children())
        assert table.shape[1] == 32 // 4**band
        torch.testing.assert_close(found, projection @ table[token - (0, *CUTOFFS)[band]])
    torch.testing.assert_close(model(tokens).exp().sum(-1), torch.ones(1, 6))


def test_padding_changes_no_translation() -> None:
    model, target = translating("lara", decoder="causal_eva", decoder_arguments=CAUSAL_EVA).eval(), words(1, 6)
    source = words(1, 16)
    padded = torch.cat([source, torch.full((1, 8), PAD)], 1)
    # Landmarks of LARA depend on the length, exact attention does not.
    assert model(padded, target).isfinite().all()
    exact = transformer.translator("transformer_wmt_en_de", sizes=SIZES).eval()
    torch.testing.assert_close(exact(source, target), exact(padded, target), rtol=1e-5, atol=1e-5)


def linears(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_checkpoints_of_language_models_have_the_names_of_the_reference() -> None:
    model = language("causal_eva", CUTOFFS, **CAUSAL_EVA)
    attention = [
        *(f"{x}_proj" for x in ("k", "v", "q", "out")),
        *(f"adaptive_mu_{x}.{i}" for x in "qk" for i in (0, 1)),
    ]
    layer = linears("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm", *(f"self_attn.{n}" for n in attention))
    layer |= {"self_attn.rel_pos_bias.relative_attention_bias.weight"}
    names = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    names |= {f"embed_tokens.embeddings.{i}.{j}.weight" for i, j in itertools.product(range(3), range(2))}
    names |= {f"adaptive_softmax.head.{name}.weight" for name in ("word_proj", "class_proj")}
    names |= {f"adaptive_softmax.tail.{i}.{j}.weight" for i, j in itertools.product(range(2), (0, 2))}
    own = model.state_dict()
    assert {*own} == {f"decoder.{name}" for name in names}
    given = {name: torch.randn_like(x) for name, x in own.items()}
    for i in range(3):
        table = given[f"decoder.embed_tokens.embeddings.{i}.0.weight"]
        given[
            "decoder.adaptive_softmax.head.word_proj.weight"
            if not i
            else f"decoder.adaptive_softmax.tail.{i - 1}.2.weight"
        ] = table
        if i:
            projection = given[f"decoder.embed_tokens.embeddings.{i}.1.weight"]
            given[f"decoder.adaptive_softmax.tail.{i - 1}.0.weight"] = projection
    given |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    count = len(given)
    model.load_state_dict(given)
    assert len(given) == count
    assert all(torch.equal(found, given[name]) for name, found in model.state_dict().items())


def test_checkpoints_of_translators_have_the_names_of_the_reference() -> None:
    model = translating("eva")
    projections = [f"{x}_proj" for x in ("k", "v", "q", "out")]
    both = linears("fc1", "fc2", "self_attn_layer_norm", "final_layer_norm")
    mu = linears("qkv", "proj", "adaptive_mu_q.0", "adaptive_mu_k.0")
    encoder = both | {f"self_attn.attn.{name}" for name in mu}
    encoder |= {"self_attn.attn.rel_pos_bias.relative_attention_bias.weight"}
    decoder = both | linears(
        "encoder_attn_layer_norm", *(f"{x}.{n}" for x in ("self_attn", "encoder_attn") for n in projections)
    )
    names = {f"encoder.layers.{i}.{name}" for i in range(2) for name in encoder}
    names |= {f"decoder.layers.{i}.{name}" for i in range(2) for name in decoder}
    names |= {f"{x}.weight" for x in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")}
    own = model.state_dict()
    assert {*own} == names
    assert len({own[name].data_ptr() for name in names if "embed" in name or "output" in name}) == 1
    given = {name: torch.randn_like(x) for name, x in own.items()}
    shared = given["decoder.output_projection.weight"]
    given |= {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared}
    model.load_state_dict(given)
    assert all(torch.equal(found, given[name]) for name, found in model.state_dict().items())


def test_sizes_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        model = transformer.language_model("transformer_lm_wiki103", "causal_eva", window_size=128, chunk_size=8)
        translator = transformer.translator("transformer_wmt_en_de", "lara", **ENCODERS["lara"])
    assert len(model.decoder.layers) == 16
    # Baevski and Auli's 247 million, and the 61 of the base model with a joined vocabulary of 32 768.
    assert (
        sum(p.numel() for p in model.parameters()) // 10**6,
        sum(p.numel() for p in translator.parameters()) // 10**6,
    ) == (247, 60)


@pytest.mark.parametrize(
    ("attention", "given", "message"),
    [
        ("lara", {}, "lara has no causal form; a decoder has causal_eva, softmax or local"),
        ("eva", {}, "eva has no causal form"),
        ("causal_eva", {"chunk_size": 4, "causal": False}, "a decoder needs causal=True"),
        ("softmax", {"window_size": 8}, "softmax attention of a decoder has no argument window_size"),
        ("local", {"window_size": 0}, "window_size is 0; it must be at least 1"),
        ("softmax", {"sizes": {"heads": 3}}, "cannot be divided among num_heads = 3"),
        ("softmax", {"sizes": {"cutoffs": (300_000,)}}, "make no bands"),
        ("softmax", {"sizes": {"dim": 33}}, "dim even"),
    ],
)
def test_what_cannot_be_built_is_refused(attention: str, given: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(MechanismError, match=message):
        transformer.language_model("transformer_lm_wiki103", attention, **given)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(MechanismError, match="65 tokens are more than the 64"):
        language("softmax")(words(1, 65))
    with pytest.raises(MechanismError, match="there is no translator 'transformer_wmt'"):
        transformer.translator("transformer_wmt")
