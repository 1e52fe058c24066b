"""Few bits: `sparse_attention(quantize=…)` against the same attention in fp32 and bf16, all interleaved.

Inputs are random, normal and independent, as a model's projections lay them out, or the queries, keys and values of all
layers of the demo's pretrained encoder on 512 tokens of its text. Every arm must agree with its reference in PyTorch
before it is timed. Beside times stand the share of allowed scores that are computed in full, and the relative L2
distance of the output from exact attention in float64, both over some rows.

    python benchmarks/deq.py
    python benchmarks/deq.py --masks dense --lengths 2048 --thresholds 0.1 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import as_record, interleave, save
from torch import Tensor

import fuser
from fuser import DEQ, Int8Attention, Sanger, demo
from fuser.ir.masks import Mask
from fuser.ir.score_quantization import ScoreQuantization
from fuser.runtime.device import cpu_target

MASKS: dict[str, Mask] = {
    "dense": fuser.masks.Dense(),
    "longformer": fuser.masks.Longformer(128, 16),
    "strided": fuser.masks.Strided(),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, WIDTH, TOKENS, ROWS = 12, 64, 512, 128
AGREEMENT = 1e-2
"""Largest relative L2 distance from the reference: weights and values are rounded to bf16."""
BYTES_AGREEMENT = 3e-2
"""The same where they become bytes, as those of what prunes do not."""


def random_inputs(length: int) -> list[Tensor]:
    """q, k and v (1, heads, length, width), heads inside tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, HEADS, WIDTH, generator=generator).transpose(1, 2) for _ in range(3)]


def encoder_inputs() -> list[Tensor]:
    """q, k and v (layers, heads, tokens, width) of the encoder's layers on its text."""
    encoder = demo.load_encoder(demo.model_folder())
    encoder.tokenizer.no_truncation()
    ids = encoder.tokenizer.encode(" ".join(demo.read_sentences(demo.TEXT))).ids[:TOKENS]
    seen: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    for name, module in encoder.model.named_modules():
        if (part := name.rpartition(".")[2]) in seen:
            module.register_forward_hook(lambda _module, _inputs, output, part=part: seen[part].append(output))
    encoder.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
    heads = encoder.model.config.num_attention_heads
    return [torch.cat(layers).unflatten(2, (heads, -1)).transpose(1, 2) for layers in seen.values()]


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention in float64."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v.double()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def measure(data: str, name: str, tokens: list[Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """One case: milliseconds of all arms, and what the quantized ones compute in full and how far off they are."""
    mask, length = MASKS[name], tokens[0].shape[2]
    hows: dict[str, ScoreQuantization] = {"int8": Int8Attention(), "sanger": Sanger()}
    hows |= {f"deq_{t:g}": DEQ(threshold=t) for t in options.thresholds}
    rows = torch.arange(0, length, max(1, length // ROWS))
    allowed = mask.dense(length)[rows]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    arms: dict[str, Callable[[], Tensor]] = {}
    quality: dict[str, dict[str, float]] = {}
    for kind, dtype in DTYPES.items():
        q, k, v = (t.to(dtype) for t in tokens)
        arms[kind] = lambda q=q, k=k, v=v: fuser.sparse_attention(q, k, v, mask)
        want = exact(q[:, :, rows], k, v, allowed)
        quality[kind] = {"relative_error_to_float64": distance(arms[kind]()[:, :, rows], want)}
        for label, how in hows.items():
            arm = arms[f"{kind}_{label}"] = lambda q=q, k=k, v=v, how=how: fuser.sparse_attention(
                q, k, v, mask, quantize=how
            )
            out = arm()[:, :, rows]
            expected, chosen = how.reference(q[:, :, rows], k, v, additive_mask=additive)
            if not distance(out, expected) <= (AGREEMENT if how.prunes else BYTES_AGREEMENT):
                raise SystemExit(f"{data} {name} {length} {kind}_{label}: {distance(out, expected)} from its reference")
            quality[f"{kind}_{label}"] = {
                "computed_in_full": float(chosen.sum() / allowed.sum() / chosen.shape[0] / chosen.shape[1]),
                "relative_error_to_float64": distance(out, want),
            }
        gc.collect()
    timings = interleave(arms, options.rounds, settle=0.02, lead=0.05)
    speedups = {
        arm: {base: round(timings[base].median_ms / t.median_ms, 3) for base in DTYPES}
        for arm, t in timings.items()
        if arm not in DTYPES
    }
    print(f"{data} {name} {length}")
    for arm, t in timings.items():
        said = "".join(f", {value:.3g} {key}" for key, value in quality[arm].items())
        print(f"  {arm}: {t.median_ms:.3g} ms{said}{''.join(f', {s}x {b}' for b, s in speedups.get(arm, {}).items())}")
    return {
        "data": data,
        "mask": name,
        "length": length,
        "shape": list(tokens[0].shape),
        "timings": as_record(timings),
        "speedup_over": speedups,
        "quality": {
            arm: {key: float(f"{value:.3g}") for key, value in found.items()} for arm, found in quality.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="*", choices=[*MASKS], default=[*MASKS])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--no-encoder", action="store_true", help="leave out the pretrained encoder's inputs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/deq.json")
    options = parser.parse_args()
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(options.threads)
    results = []
    with torch.inference_mode():
        if not options.no_encoder:
            results.append(measure("minilm", "dense", encoder_inputs(), options))
        for length in options.lengths:
            tokens = random_inputs(length)
            results += [measure("random", name, tokens, options) for name in options.masks]
    print(save("deq", target, results, options.output))


if __name__ == "__main__":
    main()
