"""Data sets of the experiments of DEQ and Sanger, as they lie on disk when they are unpacked: GLUE, SQuAD and CLOTH.

- GLUE: a folder of a task with ``train.tsv`` and ``dev.tsv``, MRPC also ``msr_paraphrase_train.txt`` and
  ``msr_paraphrase_test.txt``; MNLI has ``dev_matched.tsv``.
- SQuAD 1.1: a folder with ``train-v1.1.json`` and ``dev-v1.1.json``.
- CLOTH: a folder with ``train``, ``valid`` and ``test``, and files ``*.json`` anywhere in them.
"""

from __future__ import annotations

import csv
import json
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GlueTask:
    """Columns of the sentences and the label (by name, or by number where files have no header), its classes in order,
    none for a number, and metrics; the first is the one that arms are compared by."""

    sentences: tuple[str | int, ...]
    label: str | int
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[tuple[str, ...], tuple[str, ...]] = (("train.tsv",), ("dev.tsv",))


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "cola": GlueTask((3,), 1, _BINARY, ("matthews",)),
    "sst2": GlueTask(("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": GlueTask(
        ("#1 String", "#2 String"),
        "Quality",
        _BINARY,
        ("accuracy", "f1"),
        (("train.tsv", "msr_paraphrase_train.txt"), ("dev.tsv", "msr_paraphrase_test.txt")),
    ),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate", _BINARY, ("accuracy", "f1")),
    "mnli": GlueTask(
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "entailment", "neutral"),
        ("accuracy",),
        (("train.tsv",), ("dev_matched.tsv", "dev.tsv")),
    ),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), "label", _BINARY, ("accuracy",)),
}


@dataclass(frozen=True)
class Labelled:
    """One or two sentences, and their class or number."""

    sentences: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Question:
    """A question about a passage, and its answers as (text, first character); the first is learnt."""

    key: str
    question: str
    passage: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cloze:
    """A passage whose blanks are underscores, and for each blank four words and the number of the right one."""

    passage: str
    options: tuple[tuple[str, ...], ...]
    answers: tuple[int, ...]


class DataError(ValueError):
    """A folder or file is not what its format says."""


def _file(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(f"{folder} has no file {' or '.join(names)}")
    return found


def read_glue(folder: Path, name: str, *, train: bool) -> list[Labelled]:
    """The rows of a task of GLUE that are complete and labelled; MRPC and QQP have a few that are not.

    Raises DataError for a task or file that there is not, or that lacks a column.
    """
    if name not in GLUE:
        raise DataError(f"GLUE has no task {name!r}; it has {', '.join(GLUE)}")
    task = GLUE[name]
    path = _file(folder, task.files[0 if train else 1])
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns: list[int] = []
    wanted = (*task.sentences, task.label)
    if any(isinstance(column, str) for column in wanted):
        header = rows.pop(0) if rows else []
        if missing := [str(column) for column in wanted if column not in header]:
            raise DataError(f"{path} has no column {', '.join(missing)}")
        columns = [header.index(str(column)) for column in wanted]
    else:
        columns = [int(column) for column in wanted]
    found = []
    for row in rows:
        if len(row) <= max(columns):
            continue
        *sentences, label = (row[c] for c in columns)
        if task.classes and label not in task.classes:
            continue
        found.append(Labelled(tuple(sentences), float(task.classes.index(label) if task.classes else label)))
    if not found:
        raise DataError(f"{path} has no rows with a label of {name}")
    return found


def _answer(given: dict[str, Any]) -> tuple[str, int]:
    return given["text"], given["answer_start"]


def read_squad(folder: Path, *, train: bool) -> list[Question]:
    """The questions of SQuAD 1.1. Raises DataError."""
    path = _file(folder, ["train-v1.1.json" if train else "dev-v1.1.json"])
    try:
        found = [
            Question(q["id"], q["question"], part["context"], tuple(map(_answer, q["answers"])))
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]
            for part in article["paragraphs"]
            for q in part["qas"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not a file of SQuAD 1.1: {error!r}") from error
    if not found:
        raise DataError(f"{path} has no questions")
    return found


def read_cloth(folder: Path, *, train: bool) -> list[Cloze]:
    """The passages of CLOTH's training or validation part. Raises DataError."""
    part = folder / ("train" if train else "valid")
    found = []
    for path in sorted(part.rglob("*.json")):
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            answers = tuple("ABCD".index(answer) for answer in given["answers"])
            cloze = Cloze(given["article"], tuple(map(tuple, given["options"])), answers)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a file of CLOTH: {error!r}") from error
        blanks = cloze.passage.count("_")
        if not blanks == len(cloze.options) == len(cloze.answers) or any(len(o) != 4 for o in cloze.options):
            raise DataError(f"{path}: {blanks} blanks, {len(cloze.options)} options, {len(cloze.answers)} answers")
        found.append(cloze)
    if not found:
        raise DataError(f"{part} has no files of CLOTH")
    return found


def manual_clozes(*, train: bool, words: int = 80, blanks: int = 8) -> list[Cloze]:
    """Clozes in the form of CLOTH of the topics of Python's manual, which every Python has: passages of so many words,
    some of which are left out, each offered beside three others of the passage. One in ten is for validation."""
    from pydoc_data import topics

    generator = random.Random(0)
    found = []
    for name in sorted(topics.topics):
        text = re.sub(r"[^A-Za-z0-9.,;:()' ]+", " ", topics.topics[name]).split()
        for start in range(0, len(text) - words, words):
            passage = text[start : start + words]
            plain = [i for i, word in enumerate(passage) if word.isalpha() and len(word) > 3]
            distinct = sorted({passage[i] for i in plain})
            if len(plain) < blanks or len(distinct) < 4:
                continue
            options, answers = [], []
            for place in sorted(generator.sample(plain, blanks)):
                right = passage[place]
                offered = [right, *generator.sample([word for word in distinct if word != right], 3)]
                generator.shuffle(offered)
                options.append(tuple(offered))
                answers.append(offered.index(right))
                passage[place] = "_"
            found.append(Cloze(" ".join(passage), tuple(options), tuple(answers)))
    generator.shuffle(found)
    cut = len(found) // 10
    return found[cut:] if train else found[:cut]


def manual_paraphrases(*, train: bool, words: int = 56, changed: int = 8) -> list[Labelled]:
    """Pairs in the form of MRPC of the prose of Python's manual: a passage of so many words, and the same where one
    word in seven is left out (1), and before that ``changed`` words became those of another passage (0).

    Every passage is there with both labels, one behind the other, so that the passage says nothing of the label.
    Passages of a fifth of the text, whole topics, are for validation.
    """
    from pydoc_data import topics

    generator = random.Random(0)
    seen: set[str] = set()
    by_topic = []
    for name in sorted(topics.topics):
        # Topics repeat paragraphs of others; code and grammar are no prose.
        paragraphs = dict.fromkeys(" ".join(p.split()) for p in topics.topics[name].split("\n\n"))
        new = [p for p in paragraphs if p not in seen and p.count(" ") > 10 and "::=" not in p and ">>>" not in p]
        seen.update(new)
        text = " ".join(new).split()
        by_topic.append([text[i : i + words] for i in range(0, len(text) - words + 1, words)])
    generator.shuffle(by_topic)
    fifth, part = sum(map(len, by_topic)) // 5, []
    for passages in by_topic:
        # The first topics are for validation, until there are enough.
        judged, fifth = fifth > 0, fifth - len(passages)
        if judged != train:
            part += passages
    generator.shuffle(part)
    found = []
    for i, passage in enumerate(part):
        other = part[i - 1]
        places = set(generator.sample(range(words), changed))
        for label, text in ((1.0, passage), (0.0, [other[j] if j in places else w for j, w in enumerate(passage)])):
            left = sorted(generator.sample(range(words), words - words // 7))
            found.append(Labelled((" ".join(passage), " ".join(text[j] for j in left)), label))
    return found


# ---- metrics


def ranks(values: Tensor) -> Tensor:
    """Ranks of (n,) values from 0 on, equal ones at the mean of theirs, float64."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[places]


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; NaN for a constant."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def spearman(a: Tensor, b: Tensor) -> float:
    return correlation(ranks(a), ranks(b))


def metric(name: str, guessed: Tensor, right: Tensor) -> float:
    """A metric of GLUE over (n,) classes, or numbers for correlations."""
    if name == "accuracy":
        return float((guessed == right).double().mean())
    if name in ("pearson", "spearman"):
        return (correlation if name == "pearson" else spearman)(guessed, right)
    both, neither = float(((guessed == 1) & (right == 1)).sum()), float(((guessed == 0) & (right == 0)).sum())
    wrongly, missed = float(((guessed == 1) & (right == 0)).sum()), float(((guessed == 0) & (right == 1)).sum())
    if name == "f1":
        return 2 * both / max(2 * both + wrongly + missed, 1)
    if name != "matthews":
        raise ValueError(f"there is no metric {name!r}")
    product = (both + wrongly) * (both + missed) * (neither + wrongly) * (neither + missed)
    return (both * neither - wrongly * missed) / product**0.5 if product else 0.0


def _normal(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def answer_scores(guess: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer to a question of SQuAD, the best over all right ones."""

    def f1(right: str) -> float:
        ours, theirs = _normal(guess), _normal(right)
        same = sum((Counter(ours) & Counter(theirs)).values())
        if not ours or not theirs:
            return float(ours == theirs)
        return 2 * same / (len(ours) + len(theirs))

    return max(float(_normal(guess) == _normal(a)) for a in answers), max(f1(a) for a in answers)


def batches(items: Sequence[Any], size: int, generator: torch.Generator | None = None) -> list[list[Any]]:
    """Items by so many, shuffled where there is a generator."""
    order = list(range(len(items))) if generator is None else torch.randperm(len(items), generator=generator).tolist()
    return [[items[i] for i in order[start : start + size]] for start in range(0, len(items), size)]
