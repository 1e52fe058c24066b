"""Attention over documents of many lengths: `fuser.varlen_attention` against loops and padding, all interleaved.

``sdpa`` and ``fuser_loop`` attend to one document after another, ``sdpa_padded`` to all of them padded to the longest,
under a mask. ``fuser`` makes its plan once, as a model's layers do; ``fuser_planning`` is a call whose lengths were
never seen. Every arm must agree with float64 before it is timed.

    python benchmarks/packed.py
    python benchmarks/packed.py --masks causal --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from harness import as_record, interleave, ratios, save
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fuser
from fuser.attention import varlen
from fuser.runtime.device import cpu_target

CASES = {"32 of 8 to 256": (32, 8, 256), "100 of 8 to 64": (100, 8, 64), "8 of 100 to 900": (8, 100, 900)}
MASKS = {"dense": fuser.masks.Dense(), "causal": fuser.masks.Causal()}


def measure(case: str, mask_name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of all arms, and ratios."""
    count, low, high = CASES[case]
    generator, causal, mask = torch.Generator().manual_seed(0), mask_name == "causal", MASKS[mask_name]
    lengths = torch.randint(low, high + 1, (count,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    q, k, v = torch.randn(3, int(offsets[-1]), options.heads, options.dim, generator=generator).unbind()
    documents = [slice(a, b) for a, b in itertools.pairwise(offsets.tolist())]
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = [torch.zeros(*real.shape, *t.shape[1:]).masked_scatter_(real[..., None, None], t) for t in (q, k, v)]
    allowed = real[:, None, None, :] & (MASKS[mask_name].dense(real.shape[1]) if causal else True)

    def loop(attend: Any) -> Tensor:
        by_heads = ((t[one].transpose(0, 1)[None] for t in (q, k, v)) for one in documents)
        return torch.cat([attend(*one)[0].transpose(0, 1) for one in by_heads])

    def planning() -> Tensor:
        varlen._plan.cache_clear()
        return fuser.varlen_attention(q, k, v, offsets, mask=mask)  # type: ignore[return-value]

    arms = {
        "fuser": lambda: fuser.varlen_attention(q, k, v, offsets, mask=mask),
        "fuser_planning": planning,
        "fuser_loop": lambda: loop(lambda *one: fuser.sparse_attention(*one, mask)),
        "sdpa": lambda: loop(lambda *one: sdpa(*one, is_causal=causal)),
        "sdpa_padded": lambda: sdpa(*(t.transpose(1, 2) for t in padded), allowed).transpose(1, 2)[real],
    }
    want = loop(lambda *one: sdpa(*(t.double() for t in one), is_causal=causal))
    for arm, run in arms.items():
        if not (error := float((run().double() - want).norm() / want.norm())) <= 1e-5:
            raise SystemExit(f"{mask_name}, {case}: {arm} does not compute the same: {error:.2g}")
    timings = interleave(arms, options.rounds)
    speedups = ratios(timings, "fuser")
    print(f"{mask_name}, {case}: " + ", ".join(f"{arm} {t.median_ms:.3g}" for arm, t in timings.items()), flush=True)
    return {
        "mask": mask_name,
        "case": case,
        "share_of_real_tokens": round(float(real.float().mean()), 3),
        "timings": as_record(timings),
        "speedup_over": speedups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=[*MASKS], default=[*MASKS])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/packed.json")
    options = parser.parse_args()
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        results = [measure(case, mask, options) for mask, case in itertools.product(options.masks, options.cases)]
    print(save("packed", target, results, options.output))


if __name__ == "__main__":
    main()
