"""The experiment of DEQ's and Sanger's authors in one command: fine-tune a pretrained encoder on a task with dense
attention, a static sparse one, DEQ and Sanger, each from the same weights over the same batches, and compare.

Tasks are those of GLUE, SQuAD 1.1 and CLOTH, read from a folder on disk (`experiment_data.py` says how they lie there).
Nothing is fetched; without `--data`, MRPC's and CLOTH's tasks are made of Python's manual. Of every arm: the task's
metrics, the share of scores that are computed in full, and the work of attention's two products relative to dense
attention, those of codes by their bits. The arm `untrained` is dense attention before any step.

    python benchmarks/deq_experiment.py --task mrpc --data GLUE/MRPC --encoder bert-base-uncased/
    python benchmarks/deq_experiment.py --task mrpc --length 192 --epochs 1 --batch 8 --rate 1e-4
    python benchmarks/deq_experiment.py --task cloth --limit 96 --epochs 1 --length 128
    python benchmarks/deq_experiment.py --task squad --data SQuAD --arms dense longformer adamax_nb80 sanger_2e-3
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiment_arms import Arm, Attention, register
from experiment_data import (
    GLUE,
    Cloze,
    DataError,
    Labelled,
    Question,
    answer_scores,
    batches,
    manual_clozes,
    manual_paraphrases,
    metric,
    read_cloth,
    read_glue,
    read_squad,
)
from harness import save
from torch import Tensor, nn

from fuser import DEQ, Sanger, demo, masks, zoo
from fuser.runtime.device import cpu_target

STATIC = {
    "longformer": lambda: masks.BigBird(16, 3, 1, 0),
    "bigbird": lambda: masks.BigBird(16, 3, 1, 1),
}
"""The patterns of Sanger's configurations ``bert_base_longformer`` and ``bert_base_bigbird``, in blocks of 16."""
LENGTHS = {"squad": 384, "cloth": 512}
STRIDE, _LONGEST_ANSWER = 128, 30
_MASK, _LOW = "[MASK]", -1e4
ARMS = ("untrained", "dense", "longformer", "adamax_nb80", "deq", "sanger_2e-3")
MANUAL = {"mrpc": manual_paraphrases, "cloth": manual_clozes}
"""Tasks that can be made of Python's manual."""


def arm_of(name: str) -> Arm:
    """An arm by name: ``dense``, ``untrained``, a static pattern, ``deq`` with our default, or a configuration of the
    authors."""
    if name in ("dense", "untrained"):
        return Arm(name)
    if name in STATIC:
        return Arm(name, STATIC[name]())
    if name == "deq":
        return Arm(name, quantize=DEQ())
    how = Sanger if name.startswith("sanger") else DEQ
    return Arm(name, quantize=how.from_config(name))


class Task(nn.Module, ABC):
    """An encoder with what a task adds to it. The losses are means over a batch."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.length = encoder, tokenizer, length
        self.hidden = int(encoder.config.hidden_size)

    def tokens(self, texts: Sequence[Any]) -> tuple[list[Any], Tensor]:
        """Encodings of texts or pairs, padded to the longest, and hidden states (texts, tokens, hidden)."""
        encodings = self.tokenizer.encode_batch(list(texts))
        ids, mask, types = (
            torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask", "type_ids")
        )
        return encodings, self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    @abstractmethod
    def loss(self, items: list[Any]) -> Tensor: ...

    @abstractmethod
    def scores(self, items: list[Any]) -> dict[str, float]:
        """Metrics over all items."""


class GlueHead(Task):
    """A class or a number from the first token."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int, name: str) -> None:
        super().__init__(encoder, tokenizer, length)
        self.task = GLUE[name]
        self.head = nn.Linear(self.hidden, max(len(self.task.classes), 1))
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding()

    def forward(self, items: list[Labelled]) -> Tensor:
        texts = [item.sentences if len(item.sentences) == 2 else item.sentences[0] for item in items]
        return self.head(self.tokens(texts)[1][:, 0])

    def loss(self, items: list[Labelled]) -> Tensor:
        found, labels = self(items), torch.tensor([item.label for item in items])
        if not self.task.classes:
            return nn.functional.mse_loss(found[:, 0], labels)
        return nn.functional.cross_entropy(found, labels.long())

    def scores(self, items: list[Labelled]) -> dict[str, float]:
        found = torch.cat([self(batch) for batch in batches(items, 32)])
        right = torch.tensor([item.label for item in items])
        guessed = found.argmax(-1) if self.task.classes else found[:, 0]
        return {name: metric(name, guessed, right.to(guessed.dtype)) for name in self.task.metrics}


class SquadHead(Task):
    """First and last token of the answer, in windows over the passage that overlap by a stride."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__(encoder, tokenizer, length)
        self.head = nn.Linear(self.hidden, 2)
        tokenizer.enable_truncation(length, stride=min(STRIDE, length // 4), strategy="only_second")
        tokenizer.enable_padding()

    def windows(self, item: Question) -> tuple[list[Any], Tensor]:
        """Encodings of all windows and logits (windows, tokens, 2), low outside the passage."""
        (first,) = self.tokenizer.encode_batch([(item.question, item.passage)])
        encodings = [first, *first.overflowing]
        longest = max(len(e.ids) for e in encodings)
        for e in encodings:
            e.pad(longest)
        ids, mask, types = (
            torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask", "type_ids")
        )
        logits = self.head(self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state)
        inside = torch.tensor([[s == 1 for s in e.sequence_ids] for e in encodings])
        return encodings, logits.masked_fill(~inside[..., None], _LOW)

    def loss(self, items: list[Question]) -> Tensor:
        losses = []
        for item in items:
            text, start = item.answers[0]
            encodings, logits = self.windows(item)
            for encoding, found in zip(encodings, logits, strict=True):
                ends = encoding.char_to_token(start, 1), encoding.char_to_token(start + max(len(text), 1) - 1, 1)
                # The first token stands for an answer that is not in the window.
                target = torch.tensor(ends if None not in ends else (0, 0))
                losses.append(nn.functional.cross_entropy(found.mT, target))
        return torch.stack(losses).mean()

    def answer(self, item: Question) -> str:
        encodings, logits = self.windows(item)
        best, text = -torch.inf, ""
        for encoding, found in zip(encodings, logits, strict=True):
            both = found[:, None, 0] + found[None, :, 1]
            # From the first to the last token, at most so many.
            possible = torch.ones_like(both, dtype=torch.bool).triu().tril(_LONGEST_ANSWER - 1)
            both = both.masked_fill(~possible, -torch.inf)
            value, place = both.flatten().max(0)
            if float(value) > best:
                start, end = divmod(int(place), len(found))
                if encoding.sequence_ids[start] == encoding.sequence_ids[end] == 1:
                    best = float(value)
                    text = item.passage[encoding.offsets[start][0] : encoding.offsets[end][1]]
        return text

    def scores(self, items: list[Question]) -> dict[str, float]:
        pairs = [answer_scores(self.answer(item), [text for text, _ in item.answers]) for item in items]
        exact, f1 = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return {"exact_match": exact, "f1": f1}


class ClothHead(Task):
    """The option whose words are likeliest at a blank: their mean embedding times the changed hidden state there."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int) -> None:
        super().__init__(encoder, tokenizer, length)
        self.head = nn.Sequential(nn.Linear(self.hidden, self.hidden), nn.GELU(), nn.LayerNorm(self.hidden))
        if tokenizer.token_to_id(_MASK) is None:
            raise DataError(f"CLOTH needs an encoder whose tokenizer knows {_MASK}")
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def logits(self, item: Cloze) -> tuple[Tensor, Tensor]:
        """(blanks, 4) of the blanks that fit into the length, and the numbers of the right options."""
        # Words around a blank may stand next to it, as in "went_home".
        parts = item.passage.split("_")
        text = f" {_MASK} ".join(parts)
        encoding = self.tokenizer.encode(text)
        ids = encoding.ids[: self.length]
        places = [i for i, token in enumerate(encoding.tokens[: self.length]) if token == _MASK]
        hidden = self.encoder(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
        table = self.encoder.get_input_embeddings().weight
        found = []
        for state, options in zip(self.head(hidden.last_hidden_state[0, places]), item.options, strict=False):
            words = [self.tokenizer.encode(option, add_special_tokens=False).ids for option in options]
            found.append(torch.stack([(table[w].mean(0) if w else table[0]) @ state for w in words]))
        logits = torch.stack(found) if found else torch.empty(0, 4)
        return logits, torch.tensor(item.answers[: len(found)], dtype=torch.int64)

    def loss(self, items: list[Cloze]) -> Tensor:
        pairs = [self.logits(item) for item in items]
        return nn.functional.cross_entropy(torch.cat([p for p, _ in pairs]), torch.cat([a for _, a in pairs]))

    def scores(self, items: list[Cloze]) -> dict[str, float]:
        found = [(p.argmax(-1) == a).double() for p, a in map(self.logits, items)]
        # Blanks beyond the length are wrong.
        return {"accuracy": float(torch.cat(found).sum()) / sum(len(item.answers) for item in items)}


def prepared(name: str, folder: Path, arm: Attention, length: int, seed: int = 0) -> Task:
    """The task's model on the encoder in ``folder``, with an arm's attention and no dropout, which arms would not
    share. The seed is that of the head's weights."""
    encoder = demo.load_encoder(folder)
    model = zoo.transformers().AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        attn_implementation=register(arm),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    if name == "squad":
        return SquadHead(model, encoder.tokenizer, length)
    if name == "cloth":
        return ClothHead(model, encoder.tokenizer, length)
    return GlueHead(model, encoder.tokenizer, length, name)


def read(name: str, folder: Path | None, *, train: bool) -> list[Any]:
    if folder is None:
        return MANUAL[name](train=train)
    if name == "squad":
        return read_squad(folder, train=train)
    if name == "cloth":
        return read_cloth(folder, train=train)
    return read_glue(folder, name, train=train)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and judge one arm. The seed is that of the head's weights and of the batches' order."""
    arm = Attention(arm_of(name))
    length = options.length or LENGTHS.get(options.task, 128)
    task = prepared(options.task, options.encoder or demo.model_folder(), arm, length, seed)
    learnt, judged = (read(options.task, options.data, train=train) for train in (True, False))
    learnt, judged = learnt[: options.limit], judged[: options.limit]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(task.parameters(), options.rate)
    epochs = 0 if name == "untrained" else options.epochs
    steps = epochs * -(-len(learnt) // options.batch)
    done, start = 0, time.perf_counter()
    task.train()
    for _ in range(epochs):
        for batch in batches(learnt, options.batch, generator):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * (1 - done / steps)
            loss = task.loss(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            done += 1
    seconds = time.perf_counter() - start
    task.eval()
    with torch.no_grad():
        arm.counting = True
        found = task.scores(judged)
    result = {
        "task": options.task,
        "arm": name,
        "seed": seed,
        **{key: round(value, 4) for key, value in found.items()},
        "scores_in_full": round(arm.counted.share, 5),
        "work": round(arm.counted.work, 4),
        "examples": [len(learnt), len(judged)],
        "length": length,
        "batch": options.batch,
        "rate": options.rate,
        "steps": steps,
        "seconds_of_training": round(seconds),
    }
    print(result, flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*GLUE, "squad", "cloth"], required=True)
    parser.add_argument("--data", type=Path, help="folder of the task's files; without, mrpc and cloth have the manual")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder; default: the demo's MiniLM")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"default: {' '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=0, help="tokens; default: 128, SQuAD 384, CLOTH 512")
    parser.add_argument("--limit", type=int, help="examples to learn from and to judge on; default: all")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/deq_experiment.json")
    options = parser.parse_args(arguments)
    if options.data is None and options.task not in MANUAL:
        parser.error(f"--task {options.task} needs the --data that it is distributed as")
    target = cpu_target()
    torch.set_num_threads(options.threads or target.cores)
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.arms:
            results.append(run(name, seed, options))
            path = save("deq_experiment", target, results, options.output)
    print(path)


if __name__ == "__main__":
    main()
