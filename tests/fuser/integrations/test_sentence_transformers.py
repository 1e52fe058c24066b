"""Models of sentence-transformers, optimized: what ``encode`` and ``predict`` give, against the same in float64."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuser
from fuser.integrations.sentence_transformers import batches

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "from", "home", "rabbit", "time"]
TOLERANCE = 1e-5


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_batches_hold_every_row_once_and_about_as_many_tokens(lengths: list[int], budget: int) -> None:
    tokens = np.array(lengths)
    parts = batches(tokens, budget)
    order = np.concatenate(parts)
    assert sorted(order) == list(range(len(lengths)))
    assert (np.diff(tokens[order]) <= 0).all()
    assert all(len(part) and tokens[part].sum() < budget + max(lengths[0], *lengths) for part in parts)
    assert len(parts) <= -(-sum(lengths) // budget) + 1


library = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def texts(seed: int, count: int) -> list[str]:
    """Texts of 0 to 40 words, some of them twice."""
    chosen = np.random.default_rng(seed)
    return [" ".join(chosen.choice(WORDS, int(length))) for length in chosen.integers(0, 40, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights and a tokenizer of a few words."""
    path = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **special).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return library.SentenceTransformer(str(folder), device="cpu", prompts={"query": "the cat and "})


@pytest.fixture(scope="module")
def fast(model: Any) -> Any:
    served = fuser.optimize(model, search="model")
    served.batch_tokens = 200
    return served


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=TOLERANCE)


def test_embeddings_are_those_of_the_model(model: Any, fast: Any) -> None:
    exact = copy.deepcopy(model).double()
    corpus = texts(0, 70)
    got = fast.encode(corpus)
    assert got.dtype == np.float32
    assert_close(got, exact.encode(corpus))
    # Sixteen batches of two are tokenized together, whose texts fill other batches.
    assert_close(fast.encode(corpus, None, None, 2), got)
    assert_close(fast.encode(corpus[3]), got[3])
    for arguments in (
        {"normalize_embeddings": True},
        {"prompt_name": "query"},
        {"prompt": "dog "},
        {"truncate_dim": 8},
        {"convert_to_tensor": True, "normalize_embeddings": True, "truncate_dim": 8},
        {"convert_to_numpy": False},
    ):
        mine, theirs = fast.encode(corpus, **arguments), exact.encode(corpus, **arguments)
        assert type(mine) is type(theirs) and len(mine) == len(corpus)
        assert_close(*(torch.stack(list(map(torch.as_tensor, found))) for found in (mine, theirs)))
    assert len(fast.encode([])) == 0
    assert "was computed" not in fast.report() and fast[0].auto_model.fallbacks == ()


def test_embeddings_of_tokens_are_those_of_the_model(model: Any, fast: Any) -> None:
    corpus = texts(1, 9)
    got, expected = (m.encode(corpus, output_value="token_embeddings") for m in (fast, model))
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs)
    got, expected = (m.encode(corpus, output_value=None) for m in (fast, model))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys() and torch.equal(mine["input_ids"], theirs["input_ids"])
        assert_close(mine["sentence_embedding"], theirs["sentence_embedding"])


def test_wrong_arguments_raise_what_the_model_raises(model: Any, fast: Any) -> None:
    for arguments in ({"batch_size": 0}, {"batch_size": -3}, {"prompt_name": "none"}, {"precision": "int3"}):
        with pytest.raises((ValueError, IndexError)) as theirs:
            model.encode(["a"], **arguments)
        with pytest.raises((ValueError, IndexError)) as ours:
            fast.encode(["a"], **arguments)
        assert repr(ours.value) == repr(theirs.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_pooling_leaves_padding_out(folder: Path, side: str) -> None:
    modules = pytest.importorskip("sentence_transformers.models")
    first = modules.Transformer(str(folder), tokenizer_args={"padding_side": side})
    size = first.get_word_embedding_dimension()
    pooling = modules.Pooling(
        size,
        pooling_mode_cls_token=True,
        pooling_mode_max_tokens=True,
        pooling_mode_mean_tokens=True,
        pooling_mode_mean_sqrt_len_tokens=True,
        pooling_mode_weightedmean_tokens=True,
        pooling_mode_lasttoken=True,
        include_prompt=False,
    )
    chain = [first, pooling, modules.Dense(6 * size, 16), modules.Normalize()]
    model = library.SentenceTransformer(modules=chain, device="cpu")
    corpus = [text for text in texts(2, 40) if text]
    fast = fuser.optimize(model, search="model")
    fast.batch_tokens = 150
    # With padding on the left, positions in a batch, and so embeddings, depend on its longest text.
    size = len(corpus) if side == "right" else 1
    for prompt in ("", "the dog "):
        expected = copy.deepcopy(model).double().encode(corpus, prompt=prompt, batch_size=size)
        got = np.stack([fast.encode(text, prompt=prompt) for text in corpus]) if size == 1 else None
        assert_close(fast.encode(corpus, prompt=prompt) if got is None else got, expected)
    assert "rows were padding" in fast.report() or side == "left"


def test_padding_is_computed_where_later_modules_mix_it_in(folder: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.models")
    first = modules.Transformer(str(folder))
    size = first.get_word_embedding_dimension()
    torch.manual_seed(0)
    convolution = modules.CNN(size, out_channels=8, kernel_sizes=[3])
    model = library.SentenceTransformer(modules=[first, convolution, modules.Pooling(8)], device="cpu")
    corpus = texts(3, 8)
    fast = fuser.optimize(model, search="model")
    features = model.tokenize(corpus)
    with torch.inference_mode():
        got, expected = (m(copy.deepcopy(features))["sentence_embedding"] for m in (fast, model))
    assert_close(got, expected)


def test_pairs_are_scored_and_ranked_as_by_the_model(folder: Path, tmp_path: Path) -> None:
    if not issubclass(library.CrossEncoder, torch.nn.Module):
        pytest.skip("this version's cross encoders are no modules")
    torch.manual_seed(0)
    encoder = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=1)
    encoder.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = library.CrossEncoder(str(tmp_path), device="cpu")
    fast = fuser.optimize(model, search="model")
    assert isinstance(fast, library.CrossEncoder)
    fast.batch_tokens = 200
    exact = copy.deepcopy(model).double()
    documents = texts(4, 40)
    pairs = [("the cat", document) for document in documents]
    scores = fast.predict(pairs)
    assert scores.dtype == np.float32
    assert_close(scores, exact.predict(pairs))
    assert_close(fast.predict(pairs[7]), scores[7])
    plain = {"activation_fn": torch.nn.Identity()}
    assert_close(fast.predict(pairs, batch_size=2, **plain), exact.predict(pairs, **plain))
    ranked, expected = (m.rank("the cat", documents, return_documents=True) for m in (fast, exact))
    assert_close([found["score"] for found in ranked], [found["score"] for found in expected])
    right = {found["corpus_id"]: found["score"] for found in expected}
    for found in ranked:
        assert found["text"] == documents[found["corpus_id"]]
        assert_close(found["score"], right[found["corpus_id"]])
    assert "was computed" not in fast.report()


def test_what_comes_back_is_a_model_of_the_library(model: Any, fast: Any, tmp_path: Path) -> None:
    corpus = texts(5, 12)
    before = list(model.named_parameters())
    assert isinstance(fast, library.SentenceTransformer) and type(fast).__name__ == "SentenceTransformer"
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in before]
    assert type(model[0].auto_model) is transformers.BertModel
    assert isinstance(fast[0].auto_model, fuser.OptimizedModule)
    assert fast.state_dict().keys() == model.state_dict().keys()
    expected = fast.encode(corpus)
    again = fuser.optimize(fast, search="model")
    copies = (again, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))
    for copied in copies:
        assert isinstance(copied[0].auto_model, fuser.OptimizedModule)
        assert_close(copied.encode(corpus), expected)
    at_once = fuser.optimize(model, (model.tokenize(corpus),), search="model")[0].auto_model
    assert at_once.programs and not at_once.fallbacks
    fast.save(str(tmp_path))
    assert_close(library.SentenceTransformer(str(tmp_path), device="cpu").encode(corpus), expected)


def test_new_weights_are_followed(model: Any) -> None:
    own = copy.deepcopy(model)
    fast = fuser.optimize(own, search="model")
    corpus = texts(6, 10)
    fast.encode(corpus)
    with torch.no_grad():
        own[0].auto_model.encoder.layer[0].output.dense.weight.mul_(-3)
    assert_close(fast.encode(corpus), copy.deepcopy(own).double().encode(corpus))


def test_the_progress_bar_counts_larger_batches(
    fast: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fast.encode(texts(7, 40), batch_size=2, show_progress_bar=True)
    shown = capfd.readouterr().err
    assert "Batches" in shown and "2/2" in shown
    fast.encode(texts(7, 40), batch_size=2)
    assert capfd.readouterr().err == ""


def test_processes_get_the_batches_of_the_caller(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def run(inputs: list[str], **arguments: Any) -> torch.Tensor:
        given.update(arguments)
        return torch.zeros(len(inputs), 32)

    name = next((name for name in ("_multi_process", "_encode_multi_process") if hasattr(fast, name)), None)
    if name is None:
        pytest.skip("this version's encode takes no list of devices")
    monkeypatch.setattr(fast, name, run, raising=True)
    fast.encode(["a"], device=["cpu", "cpu"])
    assert given["batch_size"] == 32


def test_threads_encode_at_once(model: Any) -> None:
    fast = fuser.optimize(model, search="model", concurrency=2)
    corpora = [texts(seed, 30) for seed in range(8, 11)]
    expected = [model.encode(corpus) for corpus in corpora]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, corpus=corpus: found.update({i: fast.encode(corpus)}))  # type: ignore[misc]
        for i, corpus in enumerate(corpora)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, embeddings in enumerate(expected):
        assert_close(found[i], embeddings)
