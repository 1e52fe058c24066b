"""Train small vision transformers with exact, local, EVA and LARA attention on scikit-learn's digits.

    python examples/train_vit.py [--steps 300] [--attention softmax local eva lara] [--out FOLDER]

An image has 8 × 8 pixels, each a token. Each model is optimized when it is trained, and must give the scores that it
gave. Writes train_vit.json and train_vit.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import train, write

import fuser
from fuser import evit

ATTENTION: Mapping[str, Mapping[str, Any]] = {
    "softmax": {},
    "local": {"attn_2d": True, "window_size": 4, "use_rpe": True},
    "eva": {"attn_2d": True, "window_size": 4, "num_landmarks": 16, "use_rpe": True},
    "lara": {"num_landmarks": 16, "proposal_gen": "pool-mixed", "alpha_coeff": 2.0},
}
SIZES = {"dim": 64, "heads": 4, "depth": 2, "image": 8, "patch": 1, "classes": 10, "channels": 1}
BATCH = 32
HELD_OUT = 297


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) of mean 0 and deviation 1 in random order, and what they show, int64."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(found.images).float()[order].unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.from_numpy(found.target).long()[order]


def accuracy(scores: Tensor, classes: Tensor) -> float:
    return float((scores.argmax(-1) == classes).float().mean())


def run(attention: str, images: Tensor, classes: Tensor, steps: int) -> dict[str, Any]:
    """The curve of one attention's training, and accuracies on what was held out before and after it is optimized."""
    torch.manual_seed(0)
    model = evit.build("evit_tiny_p16", attention, sizes=SIZES, **ATTENTION[attention])
    # A pixel says little without its place, and the weights of the large models are too small for few channels.
    nn.init.normal_(model.pos_embed, std=0.5)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    order = torch.Generator().manual_seed(1)
    unseen, answers = images[-HELD_OUT:], classes[-HELD_OUT:]

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(0, len(images) - HELD_OUT, (BATCH,), generator=order)
        return images[chosen], classes[chosen]

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return accuracy(model(unseen), answers)

    curve = train(attention, model, batch, evaluate, steps=steps, rate=2e-3)
    fast = fuser.optimize(model.eval(), search="model")
    with torch.no_grad():
        want, scores = model(unseen), fast(unseen)
    error = float((scores - want).abs().max() / want.abs().max())
    found = {"accuracy": accuracy(want, answers), "optimized": accuracy(scores, answers), "error": error}
    if error > 1e-4 or fast.fallbacks:
        raise SystemExit(f"{attention}: the optimized model is another one: {found} {fast.fallbacks}")
    print(f"{attention:12}accuracy {found['accuracy']:.4f}, optimized {found['optimized']:.4f}", flush=True)
    return {**found, "curve": curve, "arguments": ATTENTION[attention]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--attention", nargs="+", default=[*ATTENTION], choices=[*ATTENTION])
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args(arguments)
    images, classes = digits()
    results = {name: run(name, images, classes, args.steps) for name in args.attention}
    write(args.out, "train_vit", "accuracy", results, {"sizes": SIZES, "images": len(images)})


if __name__ == "__main__":
    main()
