"""``generate`` of optimized decoders: the tokens of the original, by one program for all steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fuser
from fuser.ir.errors import FuserError, KernelError

transformers = pytest.importorskip("transformers")
VOCABULARY = 97
WINDOW = 8


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **changes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    config.bos_token_id = config.eos_token_id = None
    return transformers.GPT2LMHeadModel(config)


def mistral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, sliding_window=WINDOW, max_position_embeddings=64, **sizes
    )
    return transformers.MistralForCausalLM(config)


def gemma3() -> Any:
    """A layer with a window and one without."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        **sizes,
    )
    return transformers.Gemma3ForCausalLM(config)


def made(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model and an optimized one with the same weights."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # So that logits differ by more than rounding.
            parameter.mul_(4.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, fuser.optimize(copy.deepcopy(model), search="model")


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return made(request.param)


@pytest.fixture
def fresh() -> tuple[Any, Any]:
    """For tests that need a program at once: a module that has met many forms of calls lets new ones wait."""
    return made(llama)


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def same(pair: tuple[Any, Any], *args: Any, **kwargs: Any) -> None:
    """Both generate the same, and nothing is left to the original."""
    fast, found = pair[1], []
    for which in pair:
        torch.manual_seed(1)
        found.append(which.generate(*args, **kwargs))
    assert torch.equal(*found)
    assert not fast.fallbacks


def test_one_program_makes_all_tokens(pair: tuple[Any, Any]) -> None:
    fast = pair[1]
    same(pair, prompt(1, 5), max_new_tokens=4)
    programs, forms = len(fast.programs), len(list(fast._engine.forms))
    same(pair, prompt(1, 5), max_new_tokens=30)
    assert (len(fast.programs), len(list(fast._engine.forms))) == (programs, forms)
    assert programs == forms == 2


@pytest.mark.parametrize("make", [mistral, gemma3])
def test_caches_with_windows_have_a_program_before_they_are_full_and_one_after(make: Callable[[], Any]) -> None:
    pair = made(make)
    fast = pair[1]
    same(pair, prompt(1, 5), max_new_tokens=12)
    assert len(list(fast._engine.forms)) == 3
    same(pair, prompt(1, 4), max_new_tokens=16)
    assert len(list(fast._engine.forms)) == 3

    def run(model: Any) -> list[Tensor]:
        # A prompt longer than the window, and a step that appends three rows.
        cache, ids = transformers.DynamicCache(config=model.config), prompt(2, 16)
        with torch.no_grad():
            found = [
                model(ids[:, :11], past_key_values=cache).logits,
                model(ids[:, 11:14], past_key_values=cache).logits,
            ]
            cache.reorder_cache(torch.tensor([1, 1]))
            found.append(model(ids[:, 14:15], past_key_values=cache).logits)
        window = next(layer for layer in cache.layers if layer.is_sliding)
        assert window.get_seq_length() == 15
        assert window.keys.shape[2] == WINDOW - 1
        return [*found, *(t for layer in cache.layers for t in (layer.keys, layer.values))]

    close(pair, run)


def test_batches_with_padding_on_the_left(pair: tuple[Any, Any]) -> None:
    ids = prompt(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    same(pair, ids * mask, attention_mask=mask, max_new_tokens=12)


def test_beams_and_samples(pair: tuple[Any, Any]) -> None:
    same(pair, prompt(1, 4), num_beams=3, max_new_tokens=10)
    same(pair, prompt(3, 4), do_sample=True, top_k=20, max_new_tokens=10)


def steps(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    """The logits of a prompt of three tokens and of every further one."""
    with torch.no_grad():
        first = model(ids[:, :3], past_key_values=cache, use_cache=True)
        found = [first.logits]
        for i in range(3, ids.shape[1]):
            found.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return found


def close(pair: tuple[Any, Any], run: Callable[[Any], list[Tensor]]) -> None:
    for expected, actual in zip(run(pair[0]), run(pair[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_the_cache_that_is_given_is_the_one_that_grows(pair: tuple[Any, Any]) -> None:
    caches = []

    def run(model: Any) -> list[Tensor]:
        caches.append(transformers.DynamicCache(config=model.config))
        out = steps(model, caches[-1], prompt(2, 9))
        return [*out, *(t for layer in caches[-1].layers for t in (layer.keys, layer.values))]

    close(pair, run)
    assert all(cache.get_seq_length() == 9 for cache in caches)
    with torch.no_grad():
        out = pair[1](prompt(2, 1), past_key_values=caches[1])
    assert out.past_key_values is caches[1]


def test_two_continuations_of_one_cache(pair: tuple[Any, Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.DynamicCache(config=model.config), prompt(1, 12)
        steps(model, cache, ids[:, :6])
        other, kept = copy.copy(cache), copy.deepcopy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        with torch.no_grad():
            first = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (6, 7, 8)]
            second = [model(ids[:, i : i + 1], past_key_values=other).logits for i in (9, 10, 11)]
            third = [model(ids[:, i : i + 1], past_key_values=kept).logits for i in (11, 10, 9)]
        return [*first, *second, *third, *(layer.keys for c in (cache, other, kept) for layer in c.layers)]

    close(pair, run)


def test_caches_that_are_cropped_reordered_and_repeated(pair: tuple[Any, Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.DynamicCache(config=model.config), prompt(2, 12)
        found = steps(model, cache, ids[:, :8])
        before = [layer.keys for layer in cache.layers]
        cache.crop(-3)
        with torch.no_grad():
            found.append(model(ids[:, 8:9], past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([1, 1]))
            found.append(model(ids[:, 9:10], past_key_values=cache).logits)
            cache.batch_select_indices(torch.tensor([1]))
            cache.batch_repeat_interleave(2)
            found.append(model(ids[:, 10:11], past_key_values=cache).logits)
        return [*found, *before]

    close(pair, run)


def test_what_a_cache_must_not_share_is_copied(fresh: tuple[Any, Any]) -> None:
    model, fast = fresh
    cache = transformers.DynamicCache(config=model.config)
    steps(fast, cache, prompt(1, 6))
    kept = cache.layers[0].keys
    before = kept.clone()
    with torch.no_grad():
        fast(prompt(1, 1), past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() != kept.data_ptr()
    cache.layers[0].keys.zero_()
    assert torch.equal(kept, before)
    del kept
    place = cache.layers[0].keys.data_ptr()
    with torch.no_grad():
        fast(prompt(1, 1), past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == place


def test_a_cache_of_another_model_is_refused_as_the_original_refuses_it(pair: tuple[Any, Any]) -> None:
    for model in pair:
        other = transformers.DynamicCache()
        other.update(torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, 4, 16), 0)
        other.update(torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, 4, 16), 1)
        with pytest.raises(RuntimeError), torch.no_grad():
            model(prompt(1, 1), past_key_values=other)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_static_caches_of_all_lengths_have_one_program_for_prompts_and_one_for_steps(make: Callable[[], Any]) -> None:
    pair = made(make)
    for tokens in (4, 20, 9):
        same(pair, prompt(1, 5), max_new_tokens=tokens, **STATIC)
    assert len(list(pair[1]._engine.forms)) == 2


def test_static_caches_of_batches_and_beams(fresh: tuple[Any, Any]) -> None:
    ids = prompt(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    same(fresh, ids * mask, attention_mask=mask, max_new_tokens=7, **STATIC)
    found = [model.generate(prompt(1, 4), num_beams=3, max_new_tokens=7, **STATIC) for model in fresh]
    assert torch.equal(*found)


@pytest.mark.parametrize("make", [mistral, gemma3])
def test_static_caches_with_windows(make: Callable[[], Any]) -> None:
    pair = made(make)
    same(pair, prompt(1, 5), max_new_tokens=12, **STATIC)


def test_a_static_cache_is_written_in_its_place(fresh: tuple[Any, Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.StaticCache(model.config, max_cache_len=12), prompt(2, 11)
        with torch.no_grad():
            found = [model(ids[:, :4], past_key_values=cache).logits]
            held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
            places = [t.data_ptr() for t in held]
            versions = [t._version for t in held]
            # One row, several, and one once more after the cache was cropped.
            for part in (ids[:, 4:5], ids[:, 5:8], ids[:, 8:9]):
                out = model(part, past_key_values=cache)
                assert out.past_key_values is cache
                found.append(out.logits)
            assert [t._version - v for t, v in zip(held, versions, strict=True)] == [3] * len(held)
            cache.crop(-2)
            found.append(model(ids[:, 9:10], past_key_values=cache).logits)
            assert [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)] == places
            cache.reorder_cache(torch.tensor([1, 1]))
            found.append(model(ids[:, 10:11], past_key_values=cache).logits)
        assert all(int(layer.cumulative_length) == 9 - 2 + 2 for layer in cache.layers)
        return [*found, *(t for layer in cache.layers for t in (layer.keys, layer.values))]

    close(fresh, run)
    assert not fresh[1].fallbacks


@pytest.mark.parametrize("make", [llama, gemma3])
def test_steps_over_long_buffers_see_what_was_written(make: Callable[[], Any]) -> None:
    """All positions of a static cache, and few after it was reset, with padding on the left."""
    pair, length = made(make), 150

    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.StaticCache(model.config, max_cache_len=length), prompt(2, length)
        found = []
        for start in (length - 3, 4):
            mask = torch.ones(2, start, dtype=torch.int64)
            mask[0, :2] = 0
            with torch.no_grad():
                found.append(model(ids[:, :start], attention_mask=mask, past_key_values=cache).logits[1])
                for i in range(start, start + 3):
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                    found.append(model(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits)
            found += [t.clone() for layer in cache.layers for t in (layer.keys[1], layer.values[1])]
            cache.reset()
        return found

    close(pair, run)
    assert not pair[1].fallbacks


def test_a_static_cache_that_is_too_short_is_refused_and_stays_as_it_is(fresh: tuple[Any, Any]) -> None:
    for model in fresh:
        cache, ids = transformers.StaticCache(model.config, max_cache_len=4), prompt(1, 6)
        with torch.no_grad():
            for i in range(4):
                model(ids[:, i : i + 1], past_key_values=cache)
            kept = cache.layers[0].keys.clone()
            with pytest.raises((IndexError, RuntimeError)):
                model(ids[:, 4:5], past_key_values=cache)
        assert torch.equal(cache.layers[0].keys, kept)


def test_keys_that_share_memory_are_left_to_the_original(fresh: tuple[Any, Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.StaticCache(model.config, max_cache_len=8), prompt(1, 6)
        found = steps(model, cache, ids[:, :5])
        cache.layers[0].keys = cache.layers[0].values.view_as(cache.layers[0].values)
        with torch.no_grad():
            found.append(model(ids[:, 5:], past_key_values=cache).logits)
        return [*found, cache.layers[0].keys]

    close(fresh, run)
    assert any("shares its memory" in reason for reason in fresh[1].fallbacks)


def test_steps_with_static_caches_have_the_originals_gradients(fresh: tuple[Any, Any]) -> None:
    def run(model: Any) -> list[Tensor]:
        cache, ids = transformers.StaticCache(model.config, max_cache_len=8), prompt(1, 6)
        steps(model, cache, ids[:, :5])
        model.zero_grad()
        model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
        return [cache.layers[0].keys.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    close(fresh, run)
    assert any("gradients" in reason for reason in fresh[1].fallbacks)


def test_programs_with_caches_are_not_saved(fresh: tuple[Any, Any], tmp_path: Any, caplog: Any) -> None:
    model, fast = fresh
    cache = transformers.StaticCache(model.config, max_cache_len=12)
    steps(fast, cache, prompt(2, 5))
    with pytest.raises(FuserError, match="objects, such as caches"):
        fast.save(tmp_path / "program.fuser")
    with torch.no_grad():
        fast(prompt(2, 5), use_cache=False)
    with caplog.at_level(logging.WARNING, "fuser"):
        fast.save(tmp_path / "program.fuser")
    assert "objects, such as caches" in caplog.text
    loaded = fuser.load(tmp_path / "program.fuser")
    assert loaded.calls and all("use_cache=False" in call for call in loaded.calls)
    kept = cache.layers[0].keys.clone()
    with pytest.raises(KernelError, match=r"past_key_values=StaticCache.*optimize the model here"):
        loaded(prompt(2, 1), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, kept)
    assert cache.get_seq_length() == 5
