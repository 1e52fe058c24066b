"""Train small language models with exact, local and causal EVA attention on the documentation that Python ships.

    python examples/train_lm.py [--steps 300] [--attention softmax local causal_eva] [--out FOLDER]

Models read bytes. Each is optimized when it is trained, and must have the perplexity that it had. Writes train_lm.json
and train_lm.png.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import train, write

import fuser
from fuser import transformer

ATTENTION: Mapping[str, Mapping[str, Any]] = {
    "softmax": {},
    "local": {"window_size": 32},
    "causal_eva": {"window_size": 32, "chunk_size": 8, "use_t5_rpe": True},
}
SIZES = {"dim": 128, "heads": 4, "hidden": 384, "layers": 2, "vocabulary": 256, "dropout": 0.0}
BATCH = 8
TOLERANCE = 1e-4


def text() -> Tensor:
    """Python's documentation of its language as bytes, int64."""
    joined = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean cross-entropy of the next tokens of blocks (B, N + 1)."""
    losses = []
    with torch.no_grad():
        for block in tokens.split(BATCH):
            losses.append(
                nn.functional.cross_entropy(model(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(float(torch.stack(losses).sum()) / tokens[:, 1:].numel())


def run(attention: str, tokens: Tensor, steps: int, length: int) -> dict[str, Any]:
    """The curve of one attention's training, and the perplexities of the trained and of the optimized model."""
    torch.manual_seed(0)
    model = transformer.language_model("transformer_lm", attention, sizes=SIZES, **ATTENTION[attention])
    held = len(tokens) // 20
    # Whole batches, so that there is one shape.
    blocks = tokens[-held:].unfold(0, length + 1, length)
    blocks = blocks[: len(blocks) // BATCH * BATCH]
    if not len(blocks):
        raise SystemExit(f"{held} bytes are held out, too few for {BATCH} blocks of {length}")
    where = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(tokens) - held - length, (BATCH, 1), generator=where)
        taken = tokens[starts + torch.arange(length + 1)]
        return taken[:, :-1], taken[:, 1:]

    few = blocks[:: max(1, len(blocks) // (2 * BATCH))][: 2 * BATCH]
    curve = train(attention, model, batch, lambda m: perplexity(m, few), steps=steps, rate=3e-3)
    fast = fuser.optimize(model.eval(), search="model")
    found = {"perplexity": perplexity(model, blocks), "optimized": perplexity(fast, blocks)}
    if abs(found["optimized"] / found["perplexity"] - 1) > TOLERANCE or fast.fallbacks:
        raise SystemExit(f"{attention}: the optimized model is another one: {found} {fast.fallbacks}")
    print(f"{attention:12}perplexity {found['perplexity']:.5f}, optimized {found['optimized']:.5f}", flush=True)
    return {**found, "curve": curve, "arguments": ATTENTION[attention]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block, a multiple of 32")
    parser.add_argument("--attention", nargs="+", default=[*ATTENTION], choices=[*ATTENTION])
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args(arguments)
    tokens = text()
    results = {name: run(name, tokens, args.steps, args.length) for name in args.attention}
    write(args.out, "train_lm", "perplexity", results, {"sizes": SIZES, "length": args.length, "bytes": len(tokens)})


if __name__ == "__main__":
    main()
