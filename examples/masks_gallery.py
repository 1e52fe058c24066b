"""Draw every kind of mask into a folder: python examples/masks_gallery.py [FOLDER] [--length 256]."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fuser.masks import (
    BigBird,
    Causal,
    Dense,
    Dilated,
    Fixed,
    Longformer,
    Mask,
    SlidingWindow,
    Strided,
    from_dense,
    from_mask_mod,
    per_head,
)


def gallery(length: int) -> dict[str, Mask]:
    """One mask of each kind, with parameters that suit pictures of ``length`` tokens."""
    width = max(1, length // 32)
    document = torch.arange(length) // max(1, length // 5)

    def same_document(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (document[q] == document[kv]) & (q >= kv)

    noise = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.1
    return {
        "dense": Dense(),
        "causal": Causal(),
        "sliding_window": SlidingWindow(2 * width, width),
        "strided": Strided(),
        "fixed": Fixed(),
        "dilated": Dilated(width, 4),
        "longformer": Longformer(width, width),
        "bigbird": BigBird(block=width, window=3, globals=1, random=2, seed=0),
        "from_dense": from_dense(noise),
        "from_mask_mod": from_mask_mod(same_document),
        "causal_longformer": Causal() & Longformer(width, width),
        "strided_or_global": Strided() | (Longformer(0, width) & Causal()),
        "everything_but_local": Causal() & ~SlidingWindow(2 * width, 0),
        "per_head": per_head([Strided(), Fixed(), SlidingWindow(2 * width, 0), Causal() & Dilated(width, 4)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/masks"))
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for title, mask in gallery(args.length).items():
        path = args.folder / f"{title}.png"
        mask.draw(path, args.length)
        print(f"{path}  {mask.density(args.length):7.2%}  {mask}")


if __name__ == "__main__":
    main()
