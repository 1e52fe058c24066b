"""The demo on a tiny encoder with real files: loading, batching, agreement, neighbours, and the whole command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fuser.cli
from fuser import demo
from fuser.ir.errors import FuserError

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from tiny_encoder import WORDS, write_encoder

TEXT = ["The cat sat on a mat.", "A dog ran far away from home and away.", "Late rabbit time!", "Tea, a cup, the queen"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder with random weights in Hugging Face's layout."""
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> demo.Encoder:
    return demo.load_encoder(folder)


def test_the_text_is_shipped_with_its_source() -> None:
    sentences = demo.read_sentences(demo.TEXT)
    assert 100 <= len(sentences) <= 300
    assert sentences[0].startswith("Alice was beginning to get very tired")
    header = demo.TEXT.read_text(encoding="utf-8").splitlines()[:2]
    assert "Lewis Carroll" in header[0] and "public domain" in header[1]
    assert not any(sentence.startswith("#") for sentence in sentences)


def test_batches_are_sorted_padded_and_complete(encoder: demo.Encoder) -> None:
    sentences = [" ".join(WORDS[: 1 + i % 19] * (1 + i % 4)) for i in range(21)]
    batches = demo.make_batches(encoder, sentences, 4)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(21))
    lengths = [int(mask.sum()) for batch in batches for mask in batch.attention_mask]
    assert lengths == sorted(lengths)
    for batch in batches:
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.input_ids.shape[1] % 32 == 0
        for row, ids, mask in zip(batch.rows, batch.input_ids, batch.attention_mask, strict=True):
            words = sentences[row].split()
            assert int(mask.sum()) == len(words) + 2
            assert [encoder.tokenizer.id_to_token(int(i)) for i in ids[1 : len(words) + 1]] == words


def test_padding_does_not_change_embeddings(encoder: demo.Encoder) -> None:
    eager = demo.encode_with(encoder.model)
    together = demo.embed(encoder, eager, demo.make_batches(encoder, TEXT, 4))
    alone = torch.cat([demo.embed(encoder, eager, demo.make_batches(encoder, [text], 1)) for text in TEXT])
    assert demo.agreement(together, alone).relative_error < 1e-6
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(TEXT)))


def test_agreement_is_what_it_says() -> None:
    theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    ours = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    found = demo.agreement(ours, theirs)
    assert found.max_error == pytest.approx(0.6)
    assert found.relative_error == pytest.approx((0.36 + 0.04) ** 0.5 / 2**0.5)
    assert found.min_cosine == pytest.approx(0.8)


def test_a_sentence_is_nearest_to_itself(encoder: demo.Encoder) -> None:
    eager = demo.encode_with(encoder.model)
    embeddings = demo.embed(encoder, eager, demo.make_batches(encoder, TEXT, 2))
    for i, text in enumerate(TEXT):
        best, *others = demo.nearest(encoder, eager, text, embeddings, 3)
        assert best == (i, pytest.approx(1.0, abs=1e-5))
        assert all(cosine < best[1] for _, cosine in others)


def test_race_counts_every_arm_in_every_round() -> None:
    calls = {"eager": 0, "other": 0}

    def call(name: str) -> Any:
        def run() -> None:
            calls[name] += 1

        return run

    found = demo.race({name: call(name) for name in calls}, "eager", 0.0)
    assert calls == {"eager": 6, "other": 6}  # one to warm up, five rounds at least
    assert found["eager"].ratio == 1.0
    assert all(timing.low <= timing.median <= timing.high for timing in found.values())


def test_typical_batch_has_the_most_frequent_shape() -> None:
    def batch(rows: int, length: int) -> demo.Batch:
        return demo.Batch(tuple(range(rows)), torch.zeros(rows, length), torch.zeros(rows, length))

    found = demo.typical_batch([batch(4, 32), batch(4, 64), batch(4, 64), batch(2, 96)])
    assert found.input_ids.shape == (4, 64)


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json"])
def test_a_folder_that_lacks_files(folder: Path, tmp_path: Path, broken: str) -> None:
    for path in folder.iterdir():
        if path.name != broken:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(FuserError, match=broken):
        demo.load_encoder(tmp_path)


def test_a_folder_without_weights_is_one_error(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FuserError, match="cannot be loaded"):
        demo.load_encoder(tmp_path)


def test_the_package_of_the_model_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package_of_a_model")
    with pytest.raises(FuserError, match="make demo"):
        demo.model_folder()


def test_the_demo_without_a_compiler_says_so_and_is_right(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("FUSER_CACHE_DIR", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    arguments = ["demo", "--model", folder, "--text", text, "--out", tmp_path / "out", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["fuserc", *map(str, arguments), "--no-torch-compile", "--json"])
    with pytest.raises(SystemExit) as stop:
        fuser.cli.main()
    assert stop.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert any("g++" in reason for reason in found["fallbacks"])
    assert found["agreement"]["max_error"] == 0.0
    assert found["files"] == [str(tmp_path / "out" / "report.html")]


def test_the_whole_demo(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("# a header\n" + "\n".join(TEXT) + "\n")
    out = tmp_path / "out"
    arguments = ["demo", "--model", folder, "--text", text, "--out", out, "--seconds", "0.1", "--batch", "2"]
    common = [*map(str, arguments), "--no-torch-compile", "--query", TEXT[2]]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fuserc", *common, *more])
        with pytest.raises(SystemExit) as stop:
            fuser.cli.main()
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    found = json.loads(run("--json"))
    # Two fp32 runs of two layers that sum in other orders; unit vectors.
    assert found["agreement"]["relative_error"] < 1e-5
    assert found["agreement"]["min_cosine"] > 1 - 1e-6
    assert found["nearest"][TEXT[2]][0]["sentence"] == TEXT[2]
    assert found["sentences"] == len(TEXT)
    assert set(found["timings"]) == {"eager", "fuser"}
    assert found["unfused"] == [] and found["fallbacks"] == []
    assert (out / "report.html").is_file()
    assert any(path.suffix == ".svg" for path in out.iterdir())
    assert all(Path(path).is_file() for path in found["files"])

    assert "leaves them out" in (out / "report.html").read_text()
    printed = run("--padding", "skip")
    report = (out / "report.html").read_text()
    assert "of the rows were padding" in report and "leaves them out" not in report
    for expected in ("7. write the report", "smallest cosine", TEXT[2], "eager", "operators of the regions unfused"):
        assert expected in printed


def test_an_encoder_is_quantized_and_saved(folder: Path, tmp_path: Path, run: Any) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "small.fuser"
    text.write_text("\n".join(TEXT))
    command = ("quantize", str(folder), "--calibrate", str(text), "--exclude", "*.layer.1.*", "--out", str(file))
    code, out, _ = run(*command, "--json")
    found = json.loads(out)
    assert code == 0 and found["file"] == str(file)
    assert found["cosine"] > 0.999 and found["min_cosine_of_embeddings"] > 0.995
    for layer in found["layers"][:-1]:
        if layer["modules"][0].split(".")[2] == "1":
            assert layer["precision"] == "kept" and "exclude" in layer["reason"]
        else:
            # How fast layers of this size are is measured.
            assert layer["precision"] == "int8" or "no faster" in layer["reason"]
    (batch,) = demo.make_batches(demo.load_encoder(folder), TEXT, 16)
    assert (
        fuser.load(file)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        .last_hidden_state.isfinite()
        .all()
    )
    code, out, _ = run(*command[:4], "--no-smooth", "--scores", "deq", "--out", str(file))
    assert code == 0 and "mean cosine" in out and "smoothed" not in out
    loaded = fuser.load(file)
    loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert "DEQ 4 bits" in loaded.report()
