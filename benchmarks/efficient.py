"""Efficient attention: modules under fuser.optimize against PyTorch and torch.compile, and against exact attention.

    python benchmarks/efficient.py [--lengths 784 3136 7056] [--rounds 7] [--write] [--long]

Every mechanism is one module of 6 heads of 64 on one sequence in fp32. “eager” and “compile” run the modules by
operators of PyTorch alone. “softmax” and “local” are exact attention by our own kernels, over all keys and windows.
--write stores benchmarks/results/efficient.json and its picture; --long measures 65,536 tokens of causal EVA, in a
process that does nothing else, and what memory that needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RESULTS, as_record, interleave, ratios, save

import fuser
from fuser.attention import build
from fuser.attention.mechanisms import causal_eva, local, performer
from fuser.ir.linear_attention import Recurrence
from fuser.runtime.device import cpu_target

DIM, HEADS = 384, 6
GRID = {"attn_2d": True, "window_size": 7, "use_rpe": True}
MECHANISMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "eva": ("eva", {**GRID, "num_landmarks": 49}),
    "causal_eva": (
        "causal_eva",
        {"window_size": 128, "chunk_size": 8, "causal": True, "use_t5_rpe": True, "self_attention": True},
    ),
    "lara": ("lara", {"mis_type": "mis-opt", "proposal_gen": "pool-mixed", "alpha_coeff": 2.0, "num_landmarks": 49}),
    "performer": ("performer", {"approx_attn_dim": 64}),
}
EXACT: Mapping[str, tuple[str, dict[str, Any]]] = {"softmax": ("softmax", {}), "local": ("local", GRID)}
LONG = 65_536


class Square(nn.Module):
    """A mechanism on a sequence (1, N, C), which is a square grid for all that know grids."""

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.causal = name == "causal_eva"
        width = {"embed_dim" if self.causal else "dim": DIM}
        self.attention = build(name, **width, num_heads=HEADS, **arguments)
        self.grid = name == "lara"

    def forward(self, x: Tensor) -> Tensor:
        if self.causal:
            causal: Tensor = self.attention(x.transpose(0, 1))[0].transpose(0, 1)
            return causal
        side = int(x.shape[1] ** 0.5)
        out: Tensor = self.attention(x.unflatten(1, (side, side)) if self.grid else x)
        return out.flatten(1, -2)


def _by_products(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, normalize: float) -> Tensor:
    return Recurrence(1.0, causal, floor=normalize).evaluate(q, k, v)[0]


@contextlib.contextmanager
def pytorch_alone() -> Iterator[None]:
    """Modules run no kernel of ours."""
    never = lambda *_: False  # noqa: E731
    with (
        mock.patch.object(performer, "linear_attention", _by_products),
        mock.patch.object(local, "is_known_to", never),
        mock.patch.object(causal_eva, "is_known_to", never),
    ):
        yield


def module(named: tuple[str, dict[str, Any]]) -> Square:
    torch.manual_seed(0)
    return Square(*named).eval()


def measured(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of one mechanism and of exact attention for one length."""
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(tokens))
    model = module(MECHANISMS[name])
    compiled = torch.compile(module(MECHANISMS[name]), dynamic=False)
    fused = fuser.optimize(module(MECHANISMS[name]))
    exact = {other: fuser.optimize(module(named)) for other, named in EXACT.items()}

    def alone(run: nn.Module) -> Tensor:
        with pytorch_alone():
            out: Tensor = run(x)
        return out

    arms = {"fuser": lambda: fused(x), "eager": lambda: alone(model), "compile": lambda: alone(compiled)}
    arms |= {other: (lambda run=run: run(x)) for other, run in exact.items()}
    with torch.no_grad():
        torch.testing.assert_close(fused(x), alone(model), rtol=1e-3, atol=1e-4)
        timings = interleave(arms, rounds)
    assert fused.fallbacks == ()
    return {"mechanism": name, "tokens": tokens, "times": as_record(timings), "faster_than": ratios(timings, "fuser")}


def longest() -> dict[str, Any]:
    """Causal EVA on :data:`LONG` tokens of 512 channels and 8 heads: seconds of a second call, and all memory that the
    process ever had."""
    named = "causal_eva", {**MECHANISMS["causal_eva"][1], "embed_dim": 512, "num_heads": 8}
    torch.manual_seed(0)
    fused = fuser.optimize(build(named[0], **named[1]).eval(), search="model")
    x = torch.randn(LONG, 1, 512)
    with torch.no_grad():
        fused(x)
        start = time.perf_counter()
        fused(x)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"mechanism": "causal_eva", "tokens": LONG, "seconds": round(seconds, 2), "peak_gb": round(peak, 2)}


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Milliseconds over the length, for every mechanism and exact attention."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        times = {name: t["median_ms"] for name, t in result["times"].items()}
        lines.setdefault(result["mechanism"], {})[result["tokens"]] = times["fuser"]
        for exact in EXACT:
            lines.setdefault(f"exact: {exact}", {})[result["tokens"]] = times[exact]
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), "--o" if name.startswith("exact") else "-o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="attention modules under fuser.optimize")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[784, 3136, 7056], help="squares of multiples of 7")
    parser.add_argument("--mechanisms", nargs="+", default=[*MECHANISMS], choices=[*MECHANISMS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="store results and picture")
    parser.add_argument("--long", action="store_true", help=f"{LONG} tokens of causal EVA alone")
    args = parser.parse_args()
    if args.long:
        print(json.dumps(longest()))
        return
    results: list[dict[str, Any]] = []
    for name in args.mechanisms:
        for tokens in args.lengths:
            results.append(measured(name, tokens, args.rounds))
            own = results[-1]["times"]["fuser"]["median_ms"]
            print(f"{name:12}{tokens:7} tokens{own:10.2f} ms, faster than {results[-1]['faster_than']}", flush=True)
    if args.write:
        out = subprocess.run([sys.executable, __file__, "--long"], capture_output=True, text=True, check=True).stdout
        draw(results, RESULTS / "efficient.png")
        save("efficient", cpu_target(), [*results, json.loads(out)])
        print(out)


if __name__ == "__main__":
    main()
