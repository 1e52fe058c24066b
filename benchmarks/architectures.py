"""Warm calls of the architectures of ``transformers`` against torch.compile and eager PyTorch, than which none may be
more than 5 % slower.

Two layers with random weights, called as users call them (caches and all), on one thread.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --only llama qwen3 --hidden 512 --length 256
"""

from __future__ import annotations

import argparse
import collections
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import as_record, compile_anew, interleave, reason, save

import fuser
from fuser.architectures import ARCHITECTURES, Scale
from fuser.runtime.device import cpu_target

LIMIT = 1.05
"""Of eager's time, what a warm call may take."""
_WARMUP = 14
"""Calls after which a module has decided between its program and the original."""


def compiled_arm(model: torch.nn.Module, call: dict[str, Any]) -> Callable[[], Any] | str:
    """A call by torch.compile, or why there is none."""
    try:
        compiled = compile_anew(model)
        compiled(**call)
    except Exception as error:  # whatever torch.compile says against a model
        return reason(error)
    return lambda: compiled(**call)


def run(name: str, scale: Scale, options: argparse.Namespace) -> dict[str, Any]:
    architecture = ARCHITECTURES[name]
    model, call = architecture.build(scale), architecture.call(scale)
    start = time.perf_counter()
    fast = fuser.optimize(model, call, search=options.search)
    seconds = time.perf_counter() - start
    kernels, unfused = sum(kernel.calls for kernel in fast.kernels), len(fast.unfused) + len(fast.outside)
    left = left_in_regions(fast)
    for _ in range(_WARMUP):
        fast(**call)
    arms = {"fuser": lambda: fast(**call), "eager": lambda: model(**call)}
    peer = "not asked for" if options.no_compile else compiled_arm(architecture.build(scale), call)
    if not isinstance(peer, str):
        arms["torch.compile"] = peer
    timings = interleave(arms, options.rounds, settle=0.01, lead=0.03)
    of = {arm: round(timings["fuser"].median_ms / timings[arm].median_ms, 3) for arm in timings if arm != "fuser"}
    print(
        f"{name:<16} {of['eager']:5.2f} of eager's {timings['eager'].median_ms:7.2f} ms, "
        f"{of.get('torch.compile', peer)} of torch.compile's, {kernels:3} kernels, {unfused:3} "
        f"operators unfused{', the original runs' if not fast.programs else ''}; optimized in {seconds:.1f} s",
        flush=True,
    )
    return {
        "case": name,
        "of_eager": of["eager"],
        "of_compile": of.get("torch.compile"),
        "without_compile": peer if isinstance(peer, str) else None,
        "timings": as_record(timings),
        "kernels": kernels,
        "unfused": unfused,
        "left_in_regions": left,
        "programs": len(fast.programs),
        "fallbacks": list(fast.fallbacks),
        "optimize_seconds": round(seconds, 2),
    }


def left_in_regions(fast: Any) -> dict[str, int]:
    """How often PyTorch runs which operators between the first and the last that kernels run, in the last program."""
    if not fast.programs:
        return {}
    compiled = fast.programs[-1]
    graph = compiled.graph
    names = [str(graph.operators[graph.position[name]].semantics) for name, _ in compiled.unfused]
    short = (name.removeprefix("aten::").removeprefix("aten.").partition(".")[0] for name in names)
    return dict(collections.Counter(short).most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--search", default="model", help='"model" (quick) or "cached" (measures kernels first)')
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/architectures.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    # Reasons are in the results.
    logging.getLogger("fuser").setLevel(logging.ERROR)
    torch._logging.set_logs(dynamo=logging.ERROR)
    target = cpu_target()
    torch.set_num_threads(1)
    scale = Scale(hidden=options.hidden, length=options.length)
    with torch.inference_mode():
        results = [run(name, scale, options) for name in options.only]
    slower = [result["case"] for result in results if result["of_eager"] > LIMIT]
    print(f"slower than {LIMIT} of eager: {', '.join(slower) or 'none'}")
    print(save("architectures", target, results, options.output))


if __name__ == "__main__":
    main()
