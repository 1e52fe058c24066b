"""MLPs of few rows, where reading weights is the work: fp32, int8, and int8 weights alone, interleaved.

Of every arm the bytes of its weights a second beside the bandwidth that was measured, and the mean cosine of the MLPs'
sum to that of eager PyTorch.

    python benchmarks/few_rows.py --rows 1 4 32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import as_record, interleave, save
from torch import Tensor, nn

import fuser
from fuser.runtime.device import cpu_target


class Mlps(nn.Module):
    """Residual MLPs, one after the other."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def run(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Mlps(options.width, options.hidden, options.depth).eval()
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    x = torch.randn(rows, options.width)
    int8 = fuser.Int8(quality=0, smooth=False)
    fast = {
        "fuser fp32": fuser.optimize(model, (x,)),
        "fuser int8": fuser.optimize(model, (x,), quantize=int8),
        "fuser int8 weights": fuser.optimize(model, (x,), quantize=fuser.Int8(quality=0, weights_only=True)),
    }
    arms: dict[str, Callable[[], Tensor]] = {"eager fp32": lambda: model(x)}
    arms |= {name: lambda m=m: m(x) for name, m in fast.items()}
    timings = interleave(arms, options.rounds, settle=0.02, lead=0.05)
    exact = model(x) - x
    result: dict[str, Any] = {"rows": rows, "timings": as_record(timings), "gb_s": {}, "cosine": {}}
    for name, call in arms.items():
        stored = weights * (1 if "int8" in name else 4)
        result["gb_s"][name] = round(stored / timings[name].median_ms / 1e6, 2)
        result["cosine"][name] = round(float(nn.functional.cosine_similarity(call() - x, exact).mean()), 6)
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/few_rows.json")
    options = parser.parse_args()
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(options.threads or target.cores)
    with torch.inference_mode():
        results = [run(rows, options) for rows in options.rows]
    print(save("few_rows", target, results, options.output))


if __name__ == "__main__":
    main()
