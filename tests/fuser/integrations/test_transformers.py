"""``attn_implementation="fuser"`` against Hugging Face's eager attention, in float64 for the truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import rounding_of
from torch import Tensor

import fuser
from fuser import masks
from fuser.integrations import transformers as hook
from fuser.ir.errors import MaskError, ScoreError
from fuser.runtime.device import cpu_target

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
IDS = torch.randint(2, 100, (2, 21), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(2, 21, dtype=torch.long)
PADDING[1, 13:] = 0
CONFIGURATIONS = {
    "bert": lambda: transformers.BertConfig(vocab_size=100, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=1, use_cache=False
    ),
    "vit": lambda: transformers.ViTConfig(image_size=32, patch_size=8, **SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        vocab_size=100,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=7,
        attn_logit_softcapping=1e-3,
        use_cache=False,
        **SIZES,
    ),
    "llama": lambda: transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **SIZES),
}
FUSED = ("bert", "gpt2", "vit")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    hook.register()
    yield
    hook.register()


def model_of(name: str, implementation: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(CONFIGURATIONS[name](), attn_implementation=implementation).eval()


def inputs_of(name: str) -> list[dict[str, Tensor]]:
    if name == "vit":
        return [{"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}]
    plain = {"input_ids": IDS}
    # Eager Gemma in float64 gives NaN for rows of padding, whose window holds nothing else.
    return [plain] if name == "gemma2" else [plain, {**plain, "attention_mask": PADDING}]


def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states of the tokens that are not padding."""
    with torch.no_grad():
        states: Tensor = model(**inputs).last_hidden_state
    return states[inputs["attention_mask"].bool()] if "attention_mask" in inputs else states


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_same_as_eager(name: str) -> None:
    eager, ours = model_of(name, "eager"), model_of(name, "fuser")
    assert ours.config._attn_implementation == "fuser"
    double = copy.deepcopy(eager).double()
    for inputs in inputs_of(name):
        right = hidden(double, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        assert relative(hidden(ours, inputs), right) <= 2 * relative(hidden(eager, inputs), right)


@pytest.mark.parametrize("name", FUSED)
def test_optimize_fuses_everything(name: str) -> None:
    eager, ours = model_of(name, "eager"), model_of(name, "fuser")
    double = copy.deepcopy(eager).double()
    for inputs in inputs_of(name):
        fast = fuser.optimize(ours, inputs, search="model")
        assert fast.unfused == () and fast.fallbacks == ()
        assert "attention" in {kernel.family for kernel in fast.kernels}
        right = hidden(double, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        assert relative(hidden(fast, inputs), right) <= 2 * relative(hidden(eager, inputs), right)


def test_predicted_scores() -> None:
    how = fuser.DEQ(threshold=1.0, bits=2)
    hook.register(quantize=how, name="deq")
    exact, ours = model_of("bert", "eager"), model_of("bert", "deq")
    seen: list[Tensor] = []
    attention = ours.encoder.layer[0].attention.self
    for part in ("query", "key", "value"):
        getattr(attention, part).register_forward_hook(lambda _m, _i, out: seen.append(out))
    attention.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    inputs = {"input_ids": IDS, "attention_mask": PADDING}
    got = hidden(ours, inputs)
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in seen[:3])
    added = torch.zeros(2, 1, 1, 21).masked_fill(PADDING[:, None, None] == 0, -torch.inf)
    want = how.reference(q, k, v, additive_mask=added)[0].transpose(1, 2).flatten(2)
    rounding = 2.0**-6 if "avx512_bf16" in cpu_target().features else 1e-5
    torch.testing.assert_close(seen[3], want, rtol=0, atol=rounding)
    assert relative(got, hidden(exact, inputs).double()) > 1e-5
    with pytest.raises(ValueError, match="no dropout"):
        ours.train()(**inputs)
    with pytest.raises(ScoreError, match=r"fuser\.DEQ"):
        hook.register(quantize="deq")  # type: ignore[arg-type]


def test_predicted_scores_of_documents_in_one_row() -> None:
    how = fuser.DEQ(threshold=0.3, bits=2)
    q, k, v = torch.randn(3, 1, 4, 12, 16, generator=torch.Generator().manual_seed(3)).unbind(0)
    starts, module = torch.tensor([0, 5, 12]), torch.nn.Module()
    given: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "is_causal": True}
    out, _ = hook._forward_with(None, how)(module, q, k, v, None, **given)
    rounding = max(1e-5, rounding_of(how))
    for start, stop in ((0, 5), (5, 12)):
        one = (t[:, :, start:stop] for t in (q, k, v))
        added = torch.full((stop - start, stop - start), -torch.inf).triu(1)
        want = how.reference(*one, additive_mask=added)[0].transpose(1, 2)
        torch.testing.assert_close(out[:, start:stop], want, rtol=0, atol=rounding)
    with pytest.raises(ValueError, match="compares within rows"):
        hook._forward_with(None, fuser.DEQ(granularity="head"))(module, q, k, v, None, **given)


def test_four_dimensional_masks() -> None:
    eager, ours = model_of("bert", "eager"), model_of("bert", "fuser")
    allowed = torch.rand(2, 1, 21, 21, generator=torch.Generator().manual_seed(2)) > 0.4
    additive = torch.zeros(2, 1, 21, 21).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = eager(input_ids=IDS, attention_mask=additive).last_hidden_state
        for mask in (allowed, additive):
            got = ours(input_ids=IDS, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_mask_restricts_self_attention(name: str) -> None:
    window = masks.SlidingWindow(3, 3)
    hook.register(window, name="fuser_window")
    ours, eager = model_of(name, "fuser_window"), model_of(name, "eager")
    pattern = window & masks.Causal() if name == "gpt2" else window
    dense = pattern.dense(21)[None, None] & PADDING.bool()[:, None, None, :]
    additive = torch.zeros(2, 1, 21, 21).masked_fill(~dense, torch.finfo(torch.float32).min)
    # Rows that see nothing give zeros here and an average there, and nobody sees them.
    inputs = {"input_ids": IDS, "attention_mask": PADDING}
    want = hidden(lambda **_: eager(input_ids=IDS, attention_mask=additive), inputs)
    torch.testing.assert_close(hidden(ours, inputs), want, rtol=0, atol=5e-6)
    assert float((hidden(model_of(name, "fuser"), inputs) - want).abs().max()) > 1e-2
    fast = fuser.optimize(ours, inputs, search="model")
    torch.testing.assert_close(hidden(fast, inputs), want, rtol=0, atol=5e-6)
    assert fast.unfused == ()


def test_generation_with_a_cache() -> None:
    hook.register(masks.SlidingWindow(3, 3), name="fuser_window")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=2, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fuser").eval()

    def generate(implementation: str, cache: bool) -> Tensor:
        model.set_attn_implementation(implementation)
        tokens: Tensor = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0
        )
        return tokens

    assert torch.equal(generate("fuser", True), generate("eager", True))
    windowed = generate("fuser_window", True)
    assert torch.equal(windowed, generate("fuser_window", False))
    assert not torch.equal(windowed, generate("eager", True))


def test_encoder_and_decoder_with_position_biases() -> None:
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)
    outputs = []
    for implementation in ("eager", "fuser"):
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        with torch.no_grad():
            outputs.append(model(input_ids=IDS, attention_mask=PADDING, decoder_input_ids=IDS[:, :6]).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, masks.SlidingWindow(3, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_dropout_sees_the_same_mask(pattern: masks.Mask | None, padded: bool) -> None:
    """With all probabilities dropped or scaled, an average over many runs comes close to the result without dropout."""
    hook.register(pattern, name="fuser_dropout")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    forward = ALL_ATTENTION_FUNCTIONS["fuser_dropout"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in range(3))
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool).expand(2, 1, 12, 12).tril() if padded else None
    module = torch.nn.Module()
    want, _ = forward(module, q, k, v, mask, is_causal=True)
    many = [t.repeat(2000, 1, 1, 1) for t in (q, k, v)]
    wide = None if mask is None else mask.repeat(2000, 1, 1, 1)
    got, _ = forward(module, *many, wide, dropout=0.1, is_causal=True)
    # The first query sees one key, dropped with probability 0.1: a deviation of |v| / 3 a sample, of 2,000.
    torch.testing.assert_close(got.unflatten(0, (2000, 2)).mean(0), want, rtol=0, atol=6 * 3 / 3 / 2000**0.5)


def test_training_computes_gradients() -> None:
    losses, gradients = [], []
    for implementation in ("eager", "fuser"):
        model = model_of("bert", implementation)
        loss = model(input_ids=IDS, attention_mask=PADDING).last_hidden_state[0].square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-8)


PACKED_LENGTHS = (5, 1, 9, 3)


def packed_inputs(lengths: tuple[int, ...] = PACKED_LENGTHS) -> tuple[dict[str, Any], list[Tensor]]:
    """Documents in one row, with what Hugging Face's flash-attention takes, and each by itself."""
    ids = torch.randint(2, 100, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    offsets, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    told = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, **told}, list(ids.split(lengths, 1))


def padded(model: Any, documents: list[Tensor]) -> Tensor:
    """What a model makes of the documents as a padded batch, one behind the other."""
    width = max(PACKED_LENGTHS)
    ids = torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1]), value=1) for one in documents])
    mask = torch.arange(width) < torch.tensor(PACKED_LENGTHS)[:, None]
    return hidden(model, {"input_ids": ids, "attention_mask": mask.long()})


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_packed_documents_are_as_if_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = model_of(name, "eager"), model_of(name, "fuser")
    given, documents = packed_inputs()
    right = padded(copy.deepcopy(eager).double(), documents)
    error = relative(padded(eager, documents), right)
    calls = counted(monkeypatch)
    assert relative(hidden(ours, given)[0], right) <= 2 * error
    assert len(calls) == SIZES["num_hidden_layers"]
    with torch.no_grad():
        assert relative(eager(**{**given, "use_cache": True}).last_hidden_state[0], right) > 1e-3


def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for every call of the attention of packed documents."""
    calls: list[None] = []
    run = hook.varlen_attention
    monkeypatch.setattr(hook, "varlen_attention", lambda *args, **more: (calls.append(None), run(*args, **more))[1])
    return calls


def test_positions_that_start_again_pack_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model masks other documents itself, so that packing saves work and changes nothing."""
    eager, ours = model_of("llama", "eager"), model_of("llama", "fuser")
    given, _ = packed_inputs()
    given = {name: given[name] for name in ("input_ids", "position_ids")}
    calls = counted(monkeypatch)
    torch.testing.assert_close(hidden(ours, given), hidden(eager, given), rtol=0, atol=5e-6)
    assert len(calls) == SIZES["num_hidden_layers"]
    jumping = {**given, "position_ids": given["position_ids"] + (torch.arange(18) > 15)}
    torch.testing.assert_close(hidden(ours, jumping), hidden(eager, jumping), rtol=0, atol=5e-6)


def test_a_mask_restricts_each_document() -> None:
    window = masks.SlidingWindow(2, 1)
    hook.register(window, name="fuser_window")
    given, documents = packed_inputs()
    ours = model_of("bert", "fuser_window")
    got = hidden(ours, given)[0]
    want = torch.cat([hidden(ours, {"input_ids": one})[0] for one in documents])
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
    assert relative(got, hidden(model_of("bert", "fuser"), given)[0].double()) > 1e-2


def test_a_window_of_the_model_stays_within_documents() -> None:
    """Its mask is more than documents say, so that both hold."""
    given, documents = packed_inputs()
    ours, eager = model_of("gemma2", "fuser"), model_of("gemma2", "eager")
    want = torch.cat([hidden(eager, {"input_ids": one})[0] for one in documents])
    torch.testing.assert_close(hidden(ours, given)[0], want, rtol=0, atol=1e-5)


def test_one_compilation_takes_packed_documents_of_all_lengths() -> None:
    ours = model_of("bert", "fuser")
    given, _ = packed_inputs()
    fast = fuser.optimize(ours, given, search="model")
    torch.testing.assert_close(hidden(fast, given), hidden(ours, given), rtol=0, atol=5e-6)
    other = {**given, **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 9, 10, 12, 18]).int())}
    torch.testing.assert_close(hidden(fast, other), hidden(ours, other), rtol=0, atol=5e-6)
    assert len(fast.programs) == 1 and fast.fallbacks == ()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_capture_takes_packed_documents_of_all_numbers_and_lengths(name: str) -> None:
    """The longest of each batch, too, which flash-attention wants to be told as plain numbers."""
    eager, ours = model_of(name, "eager"), model_of(name, "fuser")
    fast = fuser.optimize(ours, search="model")
    for lengths in ((5, 1, 9), (4, 6), (1, 1, 2, 30), (21, 22)):
        given, documents = packed_inputs(lengths)
        right = torch.cat([hidden(eager, {"input_ids": one})[0] for one in documents])
        torch.testing.assert_close(hidden(fast, given)[0], right, rtol=0, atol=5e-6)
    assert len(list(fast._engine.forms)) == 1 and fast.fallbacks == () and fast.specialized == ()


def test_lengths_of_documents_are_told_to_models_that_take_them() -> None:
    """Their own parameter, or attention that is not ours."""
    given = {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3, "max_length_k": 3}

    class Taking(torch.nn.Module):
        config = transformers.BertConfig(attn_implementation="fuser")

        def forward(self, cu_seq_lens_q: Tensor, max_length_q: int = 0, **more: Any) -> Tensor:
            return cu_seq_lens_q * max_length_q

    assert hook.without_hints(Taking(), given) == given
    assert hook.without_hints(model_of("bert", "eager"), given) == given
    ours = model_of("bert", "fuser")
    assert hook.without_hints(ours, given).keys() == {"cu_seq_lens_q"}
    assert hook.without_hints(ours, {"max_length_q": 3}) == {"max_length_q": 3}


def test_packed_documents_are_one_row() -> None:
    given, _ = packed_inputs()
    two = {name: value.expand(2, -1) if name.endswith("ids") else value for name, value in given.items()}
    with pytest.raises(ValueError, match="one row of documents"):
        hidden(model_of("bert", "fuser"), two)


def test_what_it_does_not_support() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    forward = ALL_ATTENTION_FUNCTIONS["fuser"]
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="soft-capped"):
        forward(torch.nn.Module(), q, q, q, None, softcap=30.0, dropout=0.5)
    with pytest.raises(ValueError, match="sinks"):
        forward(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(1))
    with pytest.raises(MaskError, match="Tensor"):
        hook.register(torch.ones(2, 2))  # type: ignore[arg-type]


def test_import_of_fuser_leaves_transformers_alone() -> None:
    import subprocess
    import sys

    code = "import sys, fuser; fuser.integrations, fuser.sparse_attention; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
