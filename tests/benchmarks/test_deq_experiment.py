"""The experiments of DEQ's and Sanger's authors: formats on disk, metrics, and the whole command on small files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from tiny_encoder import write_encoder


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return load_script("experiment_data")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_script("deq_experiment")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


PAIRS = [("the cat sat", "a cat sat on the mat", 1), ("the dog ran", 'tea "time', 0), ("a cup", "the queen", 0)]


def write_mrpc(folder: Path) -> Path:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    lines = [f"{label}\t1\t2\t{a}\t{b}" for a, b, label in PAIRS]
    # MRPC and QQP have rows that lack their end.
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (folder / name).write_text("\n".join([head, *lines, "1\t7"]) + "\n", encoding="utf-8")
    return folder


def write_squad(folder: Path) -> Path:
    passage = "The cat sat on a mat. " * 6 + "The rabbit ran far away."
    answers = [{"text": "far away", "answer_start": passage.index("far away")}]
    qas = [{"id": "1", "question": "The rabbit ran?", "answers": answers}]
    found = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": passage, "qas": qas}]}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (folder / name).write_text(json.dumps(found), encoding="utf-8")
    return folder


def write_cloth(folder: Path) -> Path:
    given = {
        "article": "The cat _ on a mat and the dog _away.",
        "options": [["sat", "tea", "cup", "queen"], ["home", "ran", "time", "far away"]],
        "answers": ["A", "B"],
        "source": "middle1.txt",
    }
    for part in ("train", "valid"):
        (folder / part / "middle").mkdir(parents=True)
        (folder / part / "middle" / "middle1.json").write_text(json.dumps(given), encoding="utf-8")
    return folder


WRITERS = {"mrpc": write_mrpc, "squad": write_squad, "cloth": write_cloth}


def test_glue(data: ModuleType, tmp_path: Path) -> None:
    found = data.read_glue(write_mrpc(tmp_path), "mrpc", train=True)
    assert [(*item.sentences, int(item.label)) for item in found] == PAIRS
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tThe cat sat.\ngj04\t0\t*\tCat the sat.\n", encoding="utf-8")
    assert [item.label for item in data.read_glue(tmp_path, "cola", train=False)] == [1.0, 0.0]
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    (tmp_path / "dev.tsv").write_text(f"{head}\n0\tg\tf\ty\t0\ts\ts\ta cat\tthe cat\t4.250\n", encoding="utf-8")
    assert data.read_glue(tmp_path, "stsb", train=False) == [data.Labelled(("a cat", "the cat"), 4.25)]
    (tmp_path / "train.tsv").write_text("index\tquestion\tsentence\tlabel\n0\tcat?\ta cat\tnot_entailment\n")
    assert data.read_glue(tmp_path, "qnli", train=True) == [data.Labelled(("cat?", "a cat"), 1.0)]


def test_clozes_of_the_manual(data: ModuleType) -> None:
    learnt, judged = (data.manual_clozes(train=train) for train in (True, False))
    assert len(learnt) > 100 and 9 <= len(learnt) / len(judged) <= 10
    assert not {c.passage for c in learnt} & {c.passage for c in judged}
    for cloze in (*learnt[:50], *judged):
        assert cloze.passage.count("_") == len(cloze.options) == len(cloze.answers) == 8
        assert all(len(set(offered)) == 4 for offered in cloze.options)


def test_paraphrases_of_the_manual(data: ModuleType) -> None:
    learnt, judged = (data.manual_paraphrases(train=train) for train in (True, False))
    assert len(learnt) > 500 and 0.15 < len(judged) / (len(learnt) + len(judged)) < 0.3
    assert not {item.sentences[0] for item in learnt} & {item.sentences[0] for item in judged}
    for items in (learnt, judged):
        assert len({item.sentences[0] for item in items}) == len(items) / 2
        for same, other in zip(items[::2], items[1::2], strict=True):
            assert (same.label, other.label) == (1, 0) and same.sentences[0] == other.sentences[0]
            assert [len(text.split()) for text in same.sentences] == [56, 48]
            assert [len(text.split()) for text in other.sentences] == [56, 48]
            # A shorter text whose words are all of the passage, in its order; or not.
            words = iter(same.sentences[0].split())
            assert all(word in words for word in same.sentences[1].split())
            words = iter(other.sentences[0].split())
            assert not all(word in words for word in other.sentences[1].split())


def test_squad_and_cloth(data: ModuleType, tmp_path: Path) -> None:
    (question,) = data.read_squad(write_squad(tmp_path), train=False)
    (text, start), *_ = question.answers
    assert question.passage[start : start + len(text)] == text == "far away"
    (cloze,) = data.read_cloth(write_cloth(tmp_path), train=True)
    assert cloze.answers == (0, 1) and cloze.options[1][3] == "far away"


def test_what_is_not_of_a_format(data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"has no file train\.tsv or msr_paraphrase_train\.txt"):
        data.read_glue(tmp_path, "mrpc", train=True)
    with pytest.raises(data.DataError, match="GLUE has no task 'imdb'"):
        data.read_glue(tmp_path, "imdb", train=True)
    (tmp_path / "train.tsv").write_text("sentence\nfine\n")
    with pytest.raises(data.DataError, match="has no column label"):
        data.read_glue(tmp_path, "sst2", train=True)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t7\n")
    with pytest.raises(data.DataError, match="no rows with a label"):
        data.read_glue(tmp_path, "sst2", train=True)
    (tmp_path / "dev-v1.1.json").write_text('{"data": [{}]}')
    with pytest.raises(data.DataError, match=r"not a file of SQuAD 1\.1"):
        data.read_squad(tmp_path, train=False)
    with pytest.raises(data.DataError, match="has no files of CLOTH"):
        data.read_cloth(tmp_path, train=True)
    write_cloth(tmp_path)
    path = tmp_path / "train" / "middle" / "middle1.json"
    path.write_text(path.read_text().replace('"answers": ["A", "B"]', '"answers": ["A"]'))
    with pytest.raises(data.DataError, match="2 blanks, 2 options, 1 answers"):
        data.read_cloth(tmp_path, train=True)


def test_metrics(data: ModuleType) -> None:
    guessed, right = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert data.metric("accuracy", guessed, right) == pytest.approx(0.6)
    assert data.metric("f1", guessed, right) == pytest.approx(2 / 3)
    # (2·1 − 1·1) / sqrt(3·3·2·2)
    assert data.metric("matthews", guessed, right) == pytest.approx(1 / 6)
    assert data.metric("matthews", torch.ones(3), torch.ones(3)) == 0.0
    assert data.ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert data.metric("spearman", a.exp(), a) == pytest.approx(1.0)
    assert data.metric("pearson", a.exp(), a) < 0.95
    assert data.answer_scores("The Far, away", ["home", "far away"]) == (1.0, 1.0)
    assert data.answer_scores("so far", ["far away"]) == (0.0, 0.5)


def test_work_is_what_arms_compute(experiment: ModuleType) -> None:
    arms = load_script("experiment_arms")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 32, 8).unbind()
    found = {}
    for name in ("dense", "bigbird", "deq", "sanger_2e-2"):
        attention = arms.Attention(experiment.arm_of(name))
        attention.count(q, k, v, None, True, 8**-0.5)
        assert attention.counted.allowed == 2 * 32 * 33 // 2
        found[name] = attention.counted
    assert found["dense"].work == 1.0
    # Two blocks of 16 see everything.
    assert found["bigbird"].work == 1.0
    assert found["deq"].work == pytest.approx((4 / 32 + found["deq"].share * 8 / 32 + 1) / 2)
    assert found["sanger_2e-2"].work == pytest.approx(4 / 64 + found["sanger_2e-2"].share)
    assert 0 < found["deq"].share < 1
    window = arms.sliding(0.25, 64).dense(64)
    assert int(window.sum()) / (64 * 65 / 2) == pytest.approx(0.25, abs=0.03) and not window.triu(1).any()


@pytest.mark.parametrize("task", WRITERS)
def test_the_command(experiment: ModuleType, encoder: Path, tmp_path: Path, task: str) -> None:
    folder, out = WRITERS[task](tmp_path), tmp_path / "out.json"
    given: list[Any] = ["--task", task, "--data", folder, "--encoder", encoder, "--output", out, "--length", 48]
    arms = ["dense", "longformer", "adamax_nb80"] if task == "mrpc" else ["dense"]
    given += ["--epochs", 1, "--batch", 2, "--threads", 1, "--arms", *arms]
    experiment.main([str(x) for x in given])
    results = json.loads(out.read_text())["results"]
    assert [r["arm"] for r in results] == arms
    key = {"mrpc": "accuracy", "squad": "f1", "cloth": "accuracy"}[task]
    assert all(0 <= r[key] <= 1 and math.isfinite(r[key]) for r in results)
    assert results[0]["work"] == 1.0
    assert all(r["scores_in_full"] < 0.1 and 0.5 < r["work"] < 1 for r in results[2:])


def test_training_learns(experiment: ModuleType, encoder: Path, tmp_path: Path) -> None:
    folder = write_mrpc(tmp_path)
    attention = load_script("experiment_arms").Attention(experiment.arm_of("adamax_nb80"))
    task = experiment.prepared("mrpc", encoder, attention, 32)
    items = experiment.read("mrpc", folder, train=True)
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    first = float(task.loss(items).detach())
    for _ in range(20):
        loss = task.loss(items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(task.loss(items).detach()) < 0.1 * first
    assert task.encoder.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0


def test_the_manual_is_the_data(experiment: ModuleType, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given: list[Any] = ["--task", "mrpc", "--encoder", encoder, "--output", out, "--length", 48, "--limit", 6]
    given += ["--epochs", 1, "--batch", 4, "--threads", 1, "--arms", "untrained", "deq", "--seeds", 0, 1]
    experiment.main([str(x) for x in given])
    results = json.loads(out.read_text())["results"]
    assert [(r["arm"], r["seed"], r["steps"]) for r in results] == [
        ("untrained", 0, 0),
        ("deq", 0, 2),
        ("untrained", 1, 0),
        ("deq", 1, 2),
    ]
    assert all(r["examples"] == [6, 6] for r in results)
    with pytest.raises(SystemExit):
        experiment.main(["--task", "qnli"])


def test_a_seed_is_a_start(experiment: ModuleType, encoder: Path) -> None:
    heads = []
    for seed, name in ((0, "dense"), (0, "deq"), (1, "dense")):
        attention = load_script("experiment_arms").Attention(experiment.arm_of(name))
        heads.append(experiment.prepared("mrpc", encoder, attention, 32, seed).head.weight)
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])
