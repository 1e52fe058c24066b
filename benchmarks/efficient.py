"""Efficient attention: modules under fuser.optimize against PyTorch and torch.compile, and against exact attention.

    python benchmarks/efficient.py [--lengths 196 784 3136 7056] [--rounds 7] [--write] [--long]
    python benchmarks/efficient.py --models [NAME ...] [--rounds 7] [--write] [--shallow]

Every mechanism is one module of 6 heads of 64 on one sequence in fp32. “eager” and “compile” run the modules by
operators of PyTorch alone. “softmax” and “local” are exact attention by our own kernels, over all keys and windows.
--write stores benchmarks/results/efficient.json and its picture; --long measures 65,536 tokens of causal EVA, in a
process that does nothing else, and what memory that needs. --models measures whole models on one image, and --write
stores them in efficient_models.json; --shallow tries all of it on models with one layer of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RESULTS, as_record, compile_anew, interleave, ratios, save

import fuser
from fuser import evit, pvt
from fuser.attention import build
from fuser.attention.mechanisms import causal_eva, eva, local, performer
from fuser.ir.linear_attention import Recurrence
from fuser.runtime.device import cpu_target

DIM, HEADS = 384, 6
GRID = {"attn_2d": True, "window_size": 7, "use_rpe": True}
EVA = {**GRID, "num_landmarks": 49}
LARA = {"mis_type": "mis-opt", "proposal_gen": "pool-mixed", "alpha_coeff": 2.0, "num_landmarks": 49}
EXACT: Mapping[str, tuple[str, dict[str, Any]]] = {"softmax": ("softmax", {}), "local": ("local", GRID)}
MECHANISMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "eva": ("eva", EVA),
    "causal_eva": (
        "causal_eva",
        {"window_size": 128, "chunk_size": 8, "causal": True, "use_t5_rpe": True, "self_attention": True},
    ),
    "lara": ("lara", LARA),
    "performer": ("performer", {"approx_attn_dim": 64}),
    "scatterbrain": ("scatterbrain", {**GRID, "approx_attn_dim": 64}),
    "ra": ("ra", {"num_samples": -1}),
    **EXACT,
}
"""All of ``fuser.attention.names()``."""
MODELS: Mapping[str, tuple[Callable[..., nn.Module], str, str, Mapping[str, Any], Mapping[str, Any]]] = {
    "DeiT-small-p8, eva": (evit.build, "evit_small_p8", "eva", EVA, {"depth": 1}),
    "DeiT-small-p8, lara": (evit.build, "evit_small_p8", "lara", LARA, {"depth": 1}),
    "PVTv2-B3, eva": (pvt.build, "pvt_medium", "eva", EVA, {"depths": (1, 1, 1, 1)}),
}
"""How models are built, and the sizes of shallow ones."""
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
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(performer, "linear_attention", _by_products))
        for mechanism in (local, eva, causal_eva):
            patches.enter_context(mock.patch.object(mechanism, "is_known_to", lambda *_: False))
        yield


def module(named: tuple[str, dict[str, Any]]) -> Square:
    torch.manual_seed(0)
    return Square(*named).eval()


def compared(make: Callable[[], nn.Module], x: Tensor, rounds: int, others: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Times of what ``make`` makes under fuser.optimize, in PyTorch, by torch.compile, and of optimized ``others``."""
    model, compiled, fused = make(), compile_anew(make(), dynamic=False), fuser.optimize(make())

    def alone(run: nn.Module) -> Tensor:
        with pytorch_alone():
            out: Tensor = run(x)
        return out

    arms = {"fuser": lambda: fused(x), "eager": lambda: alone(model), "compile": lambda: alone(compiled)}
    arms |= {other: (lambda run=run: run(x)) for other, run in others.items()}
    with torch.no_grad():
        torch.testing.assert_close(fused(x), alone(model), rtol=1e-3, atol=1e-4)
        timings = interleave(arms, rounds)
    if fused.fallbacks:
        raise SystemExit(f"the original ran: {', '.join(fused.fallbacks)}")
    return {"times": as_record(timings), "faster_than": ratios(timings, "fuser")}


def measured(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of one mechanism and of exact attention for one length."""
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(tokens))
    exact = {other: fuser.optimize(module(named)) for other, named in EXACT.items() if other != name}
    found = compared(lambda: module(MECHANISMS[name]), x, rounds, exact)
    return {"mechanism": name, "tokens": tokens, **found}


def measured_model(name: str, rounds: int, shallow: bool) -> dict[str, Any]:
    """Times of one model on one image."""
    build_model, size, attention, arguments, shallower = MODELS[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return build_model(size, attention, sizes=shallower if shallow else None, **arguments).eval()

    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return {"model": name, **compared(make, x, rounds, {})}


def crossings(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each mechanism and exact attention the length from which the mechanism is faster at all longer ones, between
    measured lengths by the straight line through logarithms; None: it is slower at the longest."""
    found = []
    for name in dict.fromkeys(result["mechanism"] for result in results):
        own = sorted((r for r in results if r["mechanism"] == name), key=lambda r: int(r["tokens"]))
        first: dict[str, int | None] = {}
        for exact in EXACT:
            points = [(r["tokens"], math.log(r["faster_than"][exact])) for r in own if exact in r["faster_than"]]
            if not points:
                continue
            first[exact] = points[-1][0] if points[-1][1] > 0 else None
            for (shorter, less), (longer, more) in reversed(list(itertools.pairwise(points))):
                if more <= 0:
                    break
                where = max(0.0, -less / (more - less)) if less <= 0 else 0.0
                first[exact] = round(shorter * (longer / shorter) ** where)
        found.append({"mechanism": name, "faster_from": first})
    return found


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
    """Over the length: milliseconds of every mechanism, and how many times faster than exact attention each is, with
    the length from which it is."""
    from matplotlib import pyplot

    figure, (times, gains) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for color, (name, first) in enumerate((r["mechanism"], r["faster_from"]) for r in crossings(results)):
        own = sorted((r for r in results if r["mechanism"] == name), key=lambda r: int(r["tokens"]))
        lengths = [r["tokens"] for r in own]
        style = "--" if name in EXACT else "-"
        times.plot(lengths, [r["times"]["fuser"]["median_ms"] for r in own], f"{style}oC{color}", label=name)
        for exact, line in (("softmax", "-"), ("local", ":")):
            if name in EXACT or exact not in first:
                continue
            since = "slower" if first[exact] is None else f"from {first[exact]}"
            gains.plot(
                lengths, [r["faster_than"][exact] for r in own], f"{line}oC{color}", label=f"{name}, {exact}: {since}"
            )
    gains.axhline(1, color="black", linewidth=0.8)
    times.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="attention modules under fuser.optimize")
    gains.set(xscale="log", yscale="log", xlabel="tokens", title="times as fast as exact attention by our kernels")
    for axes in (times, gains):
        axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[196, 784, 3136, 7056], help="squares of 7, 14, …")
    parser.add_argument("--mechanisms", nargs="+", default=[*MECHANISMS], choices=[*MECHANISMS])
    parser.add_argument("--models", nargs="*", choices=[*MODELS], help="whole models instead; all without names")
    parser.add_argument("--shallow", action="store_true", help="models with one layer of each kind")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="store results and picture")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where they are stored")
    parser.add_argument("--long", action="store_true", help=f"{LONG} tokens of causal EVA alone")
    args = parser.parse_args()
    if args.long:
        print(json.dumps(longest()))
        return
    results: list[dict[str, Any]] = []
    if args.models is not None:
        for name in args.models or MODELS:
            results.append(measured_model(name, args.rounds, args.shallow))
            own = results[-1]["times"]["fuser"]["median_ms"]
            print(f"{name:20}{own:10.2f} ms, faster than {results[-1]['faster_than']}", flush=True)
            if args.write:
                # What is measured is not lost if a later model fails.
                save("efficient_models", cpu_target(), results, args.out / "efficient_models.json")
        return
    for name in args.mechanisms:
        for tokens in args.lengths:
            results.append(measured(name, tokens, args.rounds))
            own = results[-1]["times"]["fuser"]["median_ms"]
            print(f"{name:12}{tokens:7} tokens{own:10.2f} ms, faster than {results[-1]['faster_than']}", flush=True)
    if args.write:
        out = subprocess.run([sys.executable, __file__, "--long"], capture_output=True, text=True, check=True).stdout
        args.out.mkdir(parents=True, exist_ok=True)
        draw(results, args.out / "efficient.png")
        save("efficient", cpu_target(), [*results, *crossings(results), json.loads(out)], args.out / "efficient.json")
        print(out)


if __name__ == "__main__":
    main()
