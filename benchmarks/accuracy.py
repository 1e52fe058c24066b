"""What few bits and few scores cost: embeddings of a pretrained encoder, and the perplexity of a small language model,
in int8, with DEQ, Sanger and static masks, against the work that they leave.

The encoder is the demo's on the demo's text: cosines to embeddings in fp32, Spearman's rank correlation of the cosines
of all pairs of sentences, and how many of the ten nearest sentences stay. The language model is a causal transformer
over bytes that is trained here, on the topics of Python's manual, which every Python has (`pydoc_data`), and judged on
text that it was not trained on: as it is, and where an arm was trained on with its own attention. Work counts both
products of attention, those of codes by their bits; static masks are windows with the work of Sanger's arms.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --parts encoder --sentences 200
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import math
from pathlib import Path
from typing import Any

import torch
from experiment_arms import Arm, Attention, counting, register, sliding
from experiment_data import spearman
from harness import RESULTS, save
from torch import Tensor, nn

import fuser
from fuser import DEQ, Int8Attention, Sanger, demo, zoo
from fuser.runtime.device import cpu_target

NEAREST = 10
DEQ_THRESHOLDS, SANGER_THRESHOLDS = (0.02, 0.1, 0.3, 0.8), (2e-4, 2e-3, 2e-2)


def predicted_arms() -> list[Arm]:
    """Attention in 8 bits, DEQ and Sanger over thresholds, and the default of DEQ's authors."""
    return [
        Arm("int8 attention", quantize=Int8Attention()),
        *(Arm(f"deq {t:g}", quantize=DEQ(threshold=t)) for t in DEQ_THRESHOLDS),
        Arm("deq adamax_nb80", quantize=DEQ.from_config("adamax_nb80")),
        *(Arm(f"sanger {t:g}", quantize=Sanger(threshold=t)) for t in SANGER_THRESHOLDS),
    ]


# ---- the encoder


def agreement(got: Tensor, exact: Tensor) -> dict[str, float]:
    """Of (sentences, hidden) embeddings of length one: cosines, rank correlation of all pairs, nearest that stay."""
    alike, alike_exact = (e @ e.mT - 2 * torch.eye(len(e)) for e in (got, exact))
    upper = torch.triu_indices(len(exact), len(exact), 1)
    near, near_exact = (a.topk(min(NEAREST, len(exact) - 1)).indices for a in (alike, alike_exact))
    cosines = (got.double() * exact.double()).sum(-1)
    recall = (near[:, :, None] == near_exact[:, None]).any(-1).double().mean()
    return {
        "mean_cosine": round(float(cosines.mean()), 6),
        "min_cosine": round(float(cosines.min()), 6),
        "spearman_of_pairs": round(spearman(alike[upper[0], upper[1]], alike_exact[upper[0], upper[1]]), 6),
        f"recall_of_{NEAREST}_nearest": round(float(recall), 4),
    }


def encoder_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    folder = options.encoder or demo.model_folder()
    encoder = demo.load_encoder(folder)
    sentences = demo.read_sentences(demo.TEXT)[: options.sentences]
    batches = demo.make_batches(encoder, sentences, 32)
    some = batches[:: max(len(batches) // 4, 1)]
    inputs = [{"input_ids": b.input_ids[:8], "attention_mask": b.attention_mask[:8]} for b in some]
    exact = demo.embed(encoder, demo.encode_with(encoder.model), batches)
    attentions = {arm.name: Attention(arm) for arm in predicted_arms()}
    int8, smooth = fuser.Int8(inputs, quality=0, smooth=False), fuser.Int8(inputs)
    chosen = [("int8", None, int8), ("int8 smoothed", None, smooth)]
    chosen += [(name, name, None) for name in attentions]
    both = ("int8 attention", "deq 0.1", "deq 0.3")
    chosen += [(f"int8 smoothed, {name}", name, smooth) for name in attentions if name in both]
    found = []
    for label, name, quantize in chosen:
        if not _wanted(label, options):
            continue
        attention = None if name is None else attentions[name]
        model = encoder.model if attention is None else _with_attention(folder, register(attention))
        fast = model if quantize is None else fuser.optimize(model, quantize=quantize)
        with torch.no_grad():
            got = demo.embed(encoder, demo.encode_with(fast), batches)
        result: dict[str, Any] = {"part": "encoder", "arm": label, "sentences": len(exact), **agreement(got, exact)}
        if attention is not None:
            if not attention.counted.allowed:
                counting([attention], lambda: demo.embed(encoder, demo.encode_with(model), batches))  # noqa: B023
            result |= _shares(attention)
        if quantize is not None:
            precision = fast.snapshot().precision
            result["layers_in_int8"] = sum(layer.quantized for layer in precision.layers)
            result["layers"] = len(precision.layers)
        found.append(result)
        print(result, flush=True)
    return found


def _wanted(arm: str, options: argparse.Namespace) -> bool:
    return any(fnmatch.fnmatchcase(arm, pattern) for pattern in options.arms)


def _with_attention(folder: Path, name: str) -> nn.Module:
    model: nn.Module = zoo.transformers().AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation=name
    )
    return model.eval()


def _shares(attention: Attention) -> dict[str, float]:
    return {"scores_in_full": round(attention.counted.share, 5), "work": round(attention.counted.work, 5)}


# ---- the language model


class Block(nn.Module):
    """Attention and a MLP, norms before both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention: Attention | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.attention is None:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = self.attention(q, k, v, None, True, q.shape[-1] ** -0.5)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class LanguageModel(nn.Module):
    """A causal transformer over bytes: (B, S) int64 to logits (B, S, 256)."""

    def __init__(self, length: int, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def attend_with(self, attention: Attention | None) -> LanguageModel:
        for block in self.blocks:
            block.attention = attention
        return self

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def manual() -> Tensor:
    """The topics of Python's manual as bytes."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def train(model: LanguageModel, data: Tensor, length: int, steps: int, rate: float, seed: int) -> None:
    """AdamW over random pieces of the text, its rate falling as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps) ** 2)
        starts = torch.randint(len(data) - length - 1, (8,), generator=generator)
        pieces = torch.stack([data[s : s + length + 1] for s in starts.tolist()])
        loss = nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: {float(loss.detach()):.3f}", flush=True)
    model.eval()


def perplexity(run: Any, pieces: Tensor) -> float:
    """Of the bytes of (pieces, length + 1), each from those before it in its piece."""
    total = 0.0
    with torch.no_grad():
        for batch in pieces.split(8):
            logits = run(batch[:, :-1])
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / pieces[:, 1:].numel())


def language_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    length, data = options.length, manual()
    cut = int(0.9 * len(data))
    pieces = data[cut:][: (len(data) - cut) // (length + 1) * (length + 1)].view(-1, length + 1)[: options.pieces]
    model = LanguageModel(length)
    train(model, data[:cut], length, options.steps, 2e-3, 0)
    found: list[dict[str, Any]] = []

    def add(arm: str, value: float, attention: Attention | None = None, **more: Any) -> None:
        result = {"part": "language model", "arm": arm, "perplexity": round(value, 5), **more}
        found.append(result if attention is None else result | _shares(attention))
        print(found[-1], flush=True)

    def judge(attention: Attention | None, trained: LanguageModel, label: str) -> None:
        trained.attend_with(attention)
        value = perplexity(trained, pieces)
        if attention is not None and not attention.counted.allowed:
            counting([attention], lambda: trained(pieces[:16, :-1]))
        add(label, value, attention)

    judge(None, model, "fp32")
    calibration = [data[i * 997 : i * 997 + length].view(1, -1) for i in range(8)]
    for label, how in (
        ("int8", fuser.Int8(calibration, quality=0, smooth=False)),
        ("int8 smoothed", fuser.Int8(calibration)),
    ):
        add(label, perplexity(fuser.optimize(model, quantize=how), pieces))
    attentions = [Attention(arm) for arm in predicted_arms()]
    for attention in attentions:
        judge(attention, model, attention.arm.name)
    deq = next(a for a in attentions if a.arm.name == "deq 0.1")
    fast = fuser.optimize(model.attend_with(deq), quantize=fuser.Int8(calibration))
    add("int8 smoothed, deq 0.1", perplexity(fast, pieces), deq)
    windows = [
        Attention(Arm(f"window, work of {a.arm.name}", sliding(a.counted.work, length)))
        for a in attentions
        if a.arm.name.startswith("sanger")
    ]
    for attention in windows:
        judge(attention, model, attention.arm.name)
    # Training on: every arm as long as the others, dense attention too.
    chosen = [None, *(a for a in attentions if a.arm.name in ("deq 0.1", "deq adamax_nb80", "sanger 0.002"))]
    chosen += [a for a in windows if a.arm.name.endswith("0.002")]
    for attention in chosen if options.tune else ():
        tuned = copy.deepcopy(model.attend_with(None)).attend_with(attention)
        train(tuned, data[:cut], length, options.tune, 3e-4, 1)
        judge(attention, tuned, f"{'fp32' if attention is None else attention.arm.name}, trained on")
    model.attend_with(None)
    return found


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against work, the encoder's and the language model's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("encoder", f"recall_of_{NEAREST}_nearest", f"encoder: recall of {NEAREST} nearest", 1.0),
        (
            "language model",
            "perplexity",
            "language model: perplexity of bytes",
            next((r["perplexity"] for r in results if r["arm"] == "fp32"), None),
        ),
    )
    parts = {r["part"] for r in results if "work" in r}
    drawn = [panel for panel in panels if panel[0] in parts]
    if not drawn:
        return
    figure = Figure(figsize=(5.5 * len(drawn), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (part, key, title, exact) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        rows = [r for r in results if r.get("part") == part and "work" in r]
        families = (("deq", "deq "), ("sanger", "sanger "), ("static window", "window"), ("int8 and deq", "int8"))
        for (label, prefix), mark in zip(families, "os^D", strict=True):
            for tuned in (False, True):
                mine = [r for r in rows if r["arm"].startswith(prefix) and r["arm"].endswith("trained on") == tuned]
                points = sorted((r["work"], r[key]) for r in mine)
                if points:
                    name = f"{label}, trained on" if tuned else label
                    axes.plot(
                        *zip(*points, strict=True),
                        mark + ("" if tuned else "-"),
                        mfc="none" if tuned else None,
                        label=name,
                    )
        if exact is not None:
            axes.axhline(exact, color="black", lw=0.8, ls=":", label="fp32")
        axes.set(title=title, xlabel="work of attention's products, dense = 1")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["encoder", "lm"], default=["encoder", "lm"])
    parser.add_argument("--arms", nargs="+", default=["*"], help="patterns of the encoder's arms")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder; default: the demo's")
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--length", type=int, default=256, help="bytes that the language model sees")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--tune", type=int, default=100, help="more steps with an arm's own attention")
    parser.add_argument("--pieces", type=int, default=128, help="pieces of text that it is judged on")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/accuracy.json; a picture beside it")
    options = parser.parse_args()
    target = cpu_target()
    torch.set_num_threads(options.threads or target.cores)
    results: list[dict[str, Any]] = []
    path = options.output or RESULTS / "accuracy.json"
    if "encoder" in options.parts:
        results += encoder_part(options)
        save("accuracy", target, results, path)
    if "lm" in options.parts:
        results += language_part(options)
    save("accuracy", target, results, path)
    picture(results, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
