"""Attention alone: the kernel and `fuser.sparse_attention` against PyTorch's SDPA and compiled FlexAttention.

All arms of a case run interleaved, since the speed of a machine drifts; medians are compared and quartiles are kept.
The floor is the multiply-adds of the allowed pairs over the measured peak. FlexAttention gets contiguous inputs, which
it needs, and each block size that is asked for; the best counts.

    python benchmarks/attention.py --lengths 128 512 1024 2048 --masks dense causal padding
    python benchmarks/attention.py --lengths 1024 4096 --masks longformer bigbird strided --flex 32 64 128
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fuser
from fuser.codegen.render import headers, render
from fuser.ir.target import Target
from fuser.kernels.attention import AttentionParameters, extents, workspace_bytes
from fuser.kernels.base import STORAGE
from fuser.kernels.plan import AttentionPlan, Group
from fuser.kernels.planner import plan
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_name, cpu_target
from fuser.runtime.library import load

MASKS: dict[str, fuser.masks.Mask] = {
    "dense": fuser.masks.Dense(),
    "causal": fuser.masks.Causal(),
    "padding": fuser.masks.Dense(),
    "window": fuser.masks.SlidingWindow(128, 128),
    "longformer": fuser.masks.Longformer(128, 16),
    "bigbird": fuser.masks.BigBird(64, 3, 2, 3, seed=0),
    "dilated": fuser.masks.Dilated(64, 4),
    "strided": fuser.masks.Strided(),
    "fixed": fuser.masks.Fixed(),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PADDED = 0.3
"""Share of the keys that the padding case masks."""

Arm = Callable[[], Any]


def by_hand(length: int) -> AttentionPlan:
    """The strided mask as a band and residue classes, two phases of gathered rows."""
    step = math.isqrt(length)
    groups = list(plan(fuser.masks.SlidingWindow(step - 1, 0), length))
    for residue in range(step):
        rows = np.arange(residue, length, step, dtype=np.int32)
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            every = (1 << len(part)) - 1
            before = np.array([[residue, start, step]] if start else [], np.int32).reshape(-1, 3)
            lanes = np.array([every & ~((2 << i) - 1) for i in range(len(part) - 1)], np.uint64)
            groups.append(Group(part, before, part[:-1], lanes, 16 if len(part) <= 16 else 32, 1))
    return AttentionPlan.of(length, length, groups)


def launcher(
    q: Tensor, k: Tensor, v: Tensor, tiles: AttentionPlan, mask: Tensor | None, target: Target, threads: int
) -> Arm:
    """A function that runs the kernel alone, as a step of a program does."""
    batch, heads, length, dim = q.shape
    kind = None if mask is None else STORAGE[mask.dtype]
    spec = AttentionParameters(dim, v.shape[-1], STORAGE[q.dtype], kind).spec
    kernel = load(build([render(spec)], target, headers=headers(spec))[spec.symbol], spec.symbol)
    out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype).transpose(1, 2)
    whole = [] if mask is None else [mask.expand(batch, heads, length, k.shape[2])]
    tensors = [q, k, v, *whole, torch.from_numpy(tiles.array.copy()), out]
    sizes = extents(
        batch,
        heads,
        k.shape[1],
        tiles,
        dim**-0.5,
        [t.stride()[:3] for t in (q, k, v, out)],
        whole[0].stride() if whole else None,
    )
    workspace = torch.empty(workspace_bytes(batch, heads, v.shape[-1], tiles) + 64, dtype=torch.uint8)
    aligned = workspace.data_ptr() + -workspace.data_ptr() % 64
    args = KernelArgs.pack([t.data_ptr() for t in tensors], sizes, threads, aligned)

    def run(kept: tuple[Any, ...] = (*tensors, workspace)) -> Tensor:
        kernel(args)
        return out

    return run


def flex_arms(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, blocks: list[int]) -> dict[str, Arm]:
    """Compiled FlexAttention with a mask function that looks the mask up, once per block size."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every block size is a compilation, and more than eight of one function would fall back to eager.
    torch._dynamo.reset()
    length = q.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    compiled = torch.compile(flex_attention)

    def arm(block: int) -> Arm:
        tiles = create_block_mask(
            lambda b, h, i, j: allowed[i, j], None, None, length, length, device="cpu", BLOCK_SIZE=block
        )
        return lambda: compiled(q, k, v, block_mask=tiles)

    return {f"flex{block}": arm(block) for block in blocks}


def sample(arms: Mapping[str, Arm], repeats: int, budget: float) -> dict[str, list[float]]:
    """Seconds of single calls, interleaved: at least 5 rounds, at most ``repeats``, about ``budget`` seconds."""
    for run in arms.values():
        run()
    start = time.perf_counter()
    for run in arms.values():
        run()
    rounds = min(repeats, max(5, int(budget / (time.perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return samples


def measure(name: str, length: int, target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """One case: medians and quartiles of all arms in milliseconds, ratios, and the share of the floor."""
    mask, dtype = MASKS[name], DTYPES[options.dtype]
    shape = (options.batch, length, options.heads, options.dim)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    runtime, dense = None, None
    if name == "padding":
        runtime = (torch.arange(length) < length * (1 - PADDED))[None, None, None]
    elif name != "dense":
        dense = mask.dense(length)
    tiles = plan(mask, length)
    given = runtime if runtime is not None else None if dense is None else dense[None, None]
    arms: dict[str, Arm] = {
        "kernel": launcher(q, k, v, tiles, runtime, target, options.threads),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, given),
    }
    arms["fuser"] = lambda: fuser.sparse_attention(q, k, v, mask if runtime is None else runtime)
    if name == "causal":
        arms["sdpa_causal"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if name != "dense":
        arms["sdpa_dense"] = lambda: F.scaled_dot_product_attention(q, k, v)
    if name == "strided":
        arms["by_hand"] = launcher(q, k, v, by_hand(length), runtime, target, options.threads)
    if options.flex and dense is not None:
        arms |= flex_arms(q, k, v, dense, options.flex)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), given)
    errors = {
        a: float((run().double() - expected).norm() / expected.norm()) for a, run in arms.items() if a != "sdpa_dense"
    }
    samples = sample(arms, options.repeats, options.budget)
    medians = {arm: statistics.median(s) for arm, s in samples.items()}
    allowed = mask.count(length) * (1 - PADDED if name == "padding" else 1)
    floor = 4 * options.dim * allowed * options.heads * options.batch / (target.peak_flops * options.threads)
    ours = min(medians[arm] for arm in ("kernel", "by_hand") if arm in medians)
    others = {arm: s for arm, s in medians.items() if arm not in ("kernel", "by_hand", "fuser", "sdpa_dense")}
    return {
        "mask": name,
        "length": length,
        "milliseconds": {arm: 1e3 * s for arm, s in medians.items()},
        "quartiles": {arm: [1e3 * q for q in statistics.quantiles(s)[::2]] for arm, s in samples.items()},
        "relative_error": errors,
        "work_ratio": tiles.work_ratio,
        "share_of_floor": floor / ours,
        "speedup": {arm: s / ours for arm, s in others.items()},
    }


def environment(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": cpu_name(),
        "peak_gflops_per_core": target.peak_flops / 1e9,
        "threads": options.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "shape": {"batch": options.batch, "heads": options.heads, "dim": options.dim, "dtype": options.dtype},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=[*MASKS], default=[*MASKS])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--flex", type=int, nargs="*", default=[], help="block sizes of FlexAttention to compare with")
    parser.add_argument("--repeats", type=int, default=51, help="most calls of an arm in one case")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for one case")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    options = parser.parse_args()
    target = cpu_target()
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    report = {**environment(target, options), "results": (results := [])}
    with torch.inference_mode():
        for name in options.masks:
            for length in options.lengths:
                results.append(case := measure(name, length, target, options))
                times = "  ".join(f"{arm} {ms:.3g}" for arm, ms in case["milliseconds"].items())
                ratios = "  ".join(f"{x:.2f}x {arm}" for arm, x in case["speedup"].items())
                print(f"{name} {length}: {times} ms | {ratios} | {case['share_of_floor']:.0%} of floor", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
