"""Real text in batches of all lengths: whole passes over a corpus, what new lengths and their plans cost, memory, and
threads.

Sentences of Python's own manual through a MiniLM encoder (6 layers of 384) in batches of 32, padded to the longest of
each: sorted by length, and shuffled. First passes include what every arm compiles; later ones are interleaved.

    python benchmarks/any_length.py
    python benchmarks/any_length.py --sentences 200 --parts passes
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics as manual
from typing import Any

import psutil
import torch
from harness import save
from int8 import quantized_by_nncf, quantized_by_onnxruntime
from torch import Tensor, nn

import fuser
from fuser import masks
from fuser.demo import load_encoder, model_folder
from fuser.kernels.gemm import multiplies_bf16
from fuser.kernels.planner import plan
from fuser.runtime.device import cpu_target

BATCH = 32
PLANNED = {
    "sliding window": masks.SlidingWindow(128, 128),
    "causal": masks.Causal(),
    "Longformer": masks.Longformer(256, 64),
    "strided": masks.Strided(64),
    "dilated": masks.Dilated(64, 4),
    "fixed": masks.Fixed(64),
}
Batch = tuple[Tensor, Tensor]
"""Token ids and attention mask, (batch, length) int64."""
Encode = Callable[[Tensor, Tensor], Any]


class Masked(nn.Module):
    """The encoder as a function of two tensors, for exporters."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


def sentences(count: int) -> list[str]:
    """Text that every machine has: the manual that ``help()`` of Python shows."""
    text = re.sub(r"\s+", " ", " ".join(manual.topics.values()))
    found = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text) if len(part) > 20]
    return random.Random(1).sample(found, count)


def batches(rows: Sequence[list[int]]) -> list[Batch]:
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        found.append((ids, mask))
    return found


def onnxruntime_arm(path: Path, threads: int) -> Encode:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *given: session.run(None, dict(zip(names, (t.numpy() for t in given), strict=True)))[0]


def openvino_arm(path: Path, threads: int, precision: str = "f32") -> Encode:
    import openvino as ov

    # Its default on CPUs with bf16 instructions is bf16, which is another answer.
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(str(path), "CPU", hints)
    return lambda *given: compiled([t.numpy() for t in given])[0]


def arms(model: nn.Module, threads: int, folder: Path) -> dict[str, Callable[[], Encode]]:
    """How every arm is made, which is part of its first pass."""
    found: dict[str, Callable[[], Encode]] = {
        "fuser": lambda: Masked(fuser.optimize(model)),
        "fuser, padding skipped": lambda: Masked(fuser.optimize(model, padding="skip")),
        "eager": lambda: Masked(model),
        "torch.compile(dynamic=True)": lambda: torch.compile(Masked(model), dynamic=True),
    }
    path = folder / "model.onnx"
    example = (torch.ones(2, 8, dtype=torch.int64),) * 2
    axes = {0: "batch", 1: "sequence"}
    try:
        import onnx  # noqa: F401

        torch.onnx.export(
            Masked(model).eval(),
            example,
            str(path),
            dynamo=False,
            input_names=["input_ids", "attention_mask"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes},
        )
        import onnxruntime  # noqa: F401

        found["onnxruntime"] = lambda: onnxruntime_arm(path, threads)
        import openvino  # noqa: F401

        found["openvino"] = lambda: openvino_arm(path, threads)
    except ImportError as error:
        print(f"left out: {error}")
    return found


def one_pass(encode: Encode, corpus: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for ids, mask in corpus:
        encode(ids, mask)
    return time.perf_counter() - start


def passes(model: nn.Module, corpus: Sequence[Batch], rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of the first pass of every arm, and of the later ones."""
    with tempfile.TemporaryDirectory() as folder:
        first, ready = {}, {}
        for name, make in arms(model, threads, Path(folder)).items():
            start = time.perf_counter()
            ready[name] = make()
            one_pass(ready[name], corpus)
            first[name] = time.perf_counter() - start
        ids, mask = corpus[len(corpus) // 2]
        expected = torch.as_tensor(ready["eager"](ids, mask))[mask.bool()]
        for name, encode in ready.items():
            error = (torch.as_tensor(encode(ids, mask))[mask.bool()] - expected).norm() / expected.norm()
            assert error < 1e-4, f"{name} computes something else ({error:.2g})"
        later: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(rounds):
            names = list(ready)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(0.1)
                later[name].append(one_pass(ready[name], corpus))
    tokens = sum(int(mask.sum()) for _, mask in corpus)
    return {
        "real_tokens": tokens,
        "share_of_real_tokens": round(tokens / sum(mask.numel() for _, mask in corpus), 3),
        "lengths": len({mask.shape for _, mask in corpus}),
        "first_seconds": {name: round(seconds, 3) for name, seconds in first.items()},
        "later_seconds": {name: round(statistics.median(seconds), 4) for name, seconds in later.items()},
        "later_quartiles": {
            name: [round(q, 4) for q in statistics.quantiles(seconds, n=4)[::2]] for name, seconds in later.items()
        },
    }


def new_lengths(layers: int, count: int) -> dict[str, Any]:
    """Milliseconds that a new length costs beyond its run, for BERT-base with so many layers, within one order of
    magnitude of tokens, for which kernels have been chosen; and those of them that making its program takes."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000), add_pooling_layer=False).eval()
    fast = fuser.optimize(model)
    extra, bound, runs = [], [], []
    for i, length in enumerate([70, *(n for n in range(66, 66 + count) if n != 70)]):
        ids = torch.randint(0, 1000, (1, length))
        start = time.perf_counter()
        fast(ids)
        first = time.perf_counter() - start
        again = []
        for _ in range(3):
            start = time.perf_counter()
            fast(ids)
            again.append(time.perf_counter() - start)
        if i > 1:
            extra.append(1e3 * (first - statistics.median(again)))
            bound.append(1e3 * sum(fast.programs[-1].seconds.values()))
            runs.append(1e3 * statistics.median(again))
    low, median, high = statistics.quantiles(extra, n=4)
    return {
        "layers": layers,
        "extra_ms": round(median, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "binding_ms": round(statistics.median(bound), 2),
        "run_ms": round(statistics.median(runs), 2),
        "captures": len(list(fast._engine.forms)),
        "specialized": list(fast.specialized),
    }


def memory(model: nn.Module, lengths: int) -> dict[str, Any]:
    """Resident memory after the first 50 of so many distinct shapes, and at the end, in MB."""
    process, fast = psutil.Process(), fuser.optimize(model, search="model")
    shapes = random.Random(0).sample(list(itertools.product(range(2, 9), range(2, 250))), lengths)
    # The largest first, since memory grows to its need once.
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    shapes = [largest, *(shape for shape in shapes if shape != largest)]
    early = 0
    for i, (batch, length) in enumerate(shapes):
        fast(torch.ones(batch, length, dtype=torch.int64))
        if i == 49:
            early = process.memory_info().rss
    return {
        "shapes": lengths,
        "mb_after_50": round(early / 1e6, 1),
        "mb_at_the_end": round(process.memory_info().rss / 1e6, 1),
        "growth": round(process.memory_info().rss / early - 1, 4),
        "programs": len(fast.programs),
    }


def many_threads(model: nn.Module, seconds: float, callers: int) -> dict[str, Any]:
    """Calls a second of one thread and of several, with random lengths: as many at once as by default, and one."""
    fast, alone = fuser.optimize(model, search="model"), fuser.optimize(model, search="model", concurrency=1)
    errors: list[str] = []

    def throughput(fast: nn.Module, count: int) -> float:
        done = [0] * count
        until = time.perf_counter() + seconds

        def work(number: int) -> None:
            draw = random.Random(number)
            with torch.inference_mode():
                while time.perf_counter() < until:
                    try:
                        fast(torch.ones(draw.randint(1, 4), draw.randint(2, 100), dtype=torch.int64))
                    except Exception as error:
                        errors.append(f"{type(error).__name__}: {error}")
                        return
                    done[number] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / seconds

    throughput(fast, 1)
    found = {"one": throughput(fast, 1), "several": throughput(fast, callers)}
    throughput(alone, 1)
    found |= {"several_one_at_a_time": throughput(alone, callers)}
    return {**{name: round(calls, 1) for name, calls in found.items()}, "callers": callers, "errors": errors}


class Session(nn.Module):
    """An exported encoder in the place of the one in PyTorch, as other backends of sentence-transformers have it."""

    def __init__(self, encode: Encode, config: Any) -> None:
        super().__init__()
        self.encode, self.config = encode, config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=torch.as_tensor(self.encode(input_ids, attention_mask)))


def encoding(folder: Path, texts: list[str], rounds: int, threads: int, *, int8: bool = False) -> dict[str, Any]:
    """Seconds of ``encode`` of sentence-transformers, tokenizer included, with its defaults (32 texts a batch, sorted):
    by PyTorch, by fuser, and by encoders that are exported as its other backends export them; with ``int8``, these and
    fuser quantized on 64 of the texts. With the mean and the least cosine of embeddings to PyTorch's."""
    from sentence_transformers import SentenceTransformer

    def made() -> Any:
        return SentenceTransformer(str(folder), device="cpu")

    with tempfile.TemporaryDirectory() as scratch:
        ready = {"torch": made()}
        encoder = ready["torch"][0].auto_model
        exported = arms(encoder, threads, Path(scratch))
        others = {name: exported[name] for name in ("onnxruntime", "openvino") if name in exported}
        if int8:
            calls = calibration(ready["torch"].tokenizer, texts[:64])
            ready["fuser int8"] = fuser.optimize(made(), quantize=fuser.Int8(calibrate=calls))
            others = int8_arms(Path(scratch) / "model.onnx", calls, threads)
        else:
            ready["fuser"] = fuser.optimize(made())
        for name, make in others.items():
            ready[name] = made()
            ready[name][0].model = Session(make(), encoder.config)
        first, cosines, expected = {}, {}, ready["torch"].encode(texts[:200])
        for name, model in ready.items():
            found = model.encode(texts[:200])
            error = abs(found - expected).max()
            assert int8 or error < 1e-4, f"{name} computes something else ({error:.2g})"
            alike = (found * expected).sum(-1)
            cosines[name] = [round(float(alike.mean()), 6), round(float(alike.min()), 6)]
            start = time.perf_counter()
            model.encode(texts)
            first[name] = time.perf_counter() - start
        later: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(rounds):
            names = list(ready)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(0.1)
                start = time.perf_counter()
                ready[name].encode(texts)
                later[name].append(time.perf_counter() - start)
    seconds = {name: round(statistics.median(found), 3) for name, found in later.items()}
    first = {name: round(seconds, 3) for name, seconds in first.items()}
    return {"texts": len(texts), "first_seconds": first, "later_seconds": seconds, "cosines": cosines}


def calibration(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Inputs of the encoder, 16 texts a batch."""
    found = [tokenizer(texts[i : i + 16], padding=True, return_tensors="pt") for i in range(0, len(texts), 16)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in found]


def int8_arms(path: Path, calls: Sequence[dict[str, Tensor]], threads: int) -> dict[str, Callable[[], Encode]]:
    """How the others of :func:`arms` are made in int8."""
    found: dict[str, Callable[[], Encode]] = {}
    try:
        small = quantized_by_onnxruntime(path)
        found["onnxruntime int8"] = lambda: onnxruntime_arm(small, threads)
        smaller = quantized_by_nncf(path, [{name: t.numpy() for name, t in call.items()} for call in calls])
        found["openvino int8"] = lambda: openvino_arm(smaller, threads)
        if multiplies_bf16(cpu_target()):
            found["openvino int8, bf16"] = lambda: openvino_arm(smaller, threads, "bf16")
    except ImportError as error:
        print(f"left out: {error}")
    return found


def planning(lengths: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of planning for lengths that were never seen, by mask."""
    target, found = cpu_target(), {}
    for name, mask in PLANNED.items():
        plan(mask, lengths[0] - 1, target=target)
        times = []
        for length in lengths:
            start = time.perf_counter()
            plan(mask, length, target=target)
            times.append(1e3 * (time.perf_counter() - start))
        found[name] = round(statistics.median(times), 2)
    return {"from": min(lengths), "to": max(lengths), "ms": found}


PARTS = ("passes", "encode", "new", "plans", "memory", "threads")
CORPORA = ("sorted", "shuffled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--corpora", nargs="*", choices=CORPORA, default=list(CORPORA), help="for passes")
    parser.add_argument("--sentences", type=int, default=800)
    parser.add_argument("--texts", type=int, default=2000, help="for encode of sentence-transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/any_length.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    target = cpu_target()
    encoder = load_encoder(model_folder())
    encoder.tokenizer.no_padding()
    texts = sentences(options.sentences)
    rows = [encoding.ids for encoding in encoder.tokenizer.encode_batch(texts)]
    shuffled = random.Random(0).sample(rows, len(rows))
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        if "passes" in options.parts:
            for case, corpus in (("sorted", sorted(rows, key=len)), ("shuffled", shuffled)):
                if case not in options.corpora:
                    continue
                found = passes(encoder.model, batches(corpus), options.rounds, torch.get_num_threads())
                results.append({"case": case, "sentences": len(rows), **found})
                print(results[-1], flush=True)
        if "encode" in options.parts:
            given = model_folder(), sentences(options.texts), options.rounds, torch.get_num_threads()
            for case in ("encode", "encode in int8"):
                results.append({"case": case, **encoding(*given, int8=case != "encode")})
                print(results[-1], flush=True)
        if "new" in options.parts:
            results.append({"case": "new lengths", **new_lengths(12, 20)})
            print(results[-1], flush=True)
        if "plans" in options.parts:
            results.append({"case": "plans", **planning(range(3980, 4097, 3))})
            print(results[-1], flush=True)
        if "memory" in options.parts:
            results.append({"case": "memory", **memory(encoder.model, options.shapes)})
            print(results[-1], flush=True)
    if "threads" in options.parts:
        results.append({"case": "threads", **many_threads(encoder.model, options.seconds, 8)})
        print(results[-1], flush=True)
    print(save("any_length", target, results, options.output))


if __name__ == "__main__":
    main()
