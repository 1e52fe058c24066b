"""The `gemm` family against F.linear, oneDNN's prepacked linear and the machine's floor.

All arms of a shape run interleaved and the medians are compared, since the speed of a machine drifts. The floor is the
larger of multiply-adds over the measured peak and bytes over the measured bandwidth (weights may come from cache, and
then a small product can beat it).

    python benchmarks/gemm.py --rows 128 512 --json gemm.json
    python benchmarks/gemm.py --shapes minilm --variants
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuser.codegen.render import headers, render
from fuser.ir.expression import Op, binary, unary
from fuser.ir.graph import Constant, Kind, Operator, OperatorGraph, TensorSpec
from fuser.ir.target import Target
from fuser.kernels.base import KernelCall, Packed
from fuser.kernels.gemm import GemmFamily, GemmMatch, GemmParameters, pack
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

SHAPES = {
    "bert": [(768, 768), (2304, 768), (3072, 768), (768, 3072)],
    "minilm": [(384, 384), (1152, 384), (1536, 384), (384, 1536)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """x (rows, K), weight (N, K), bias (N), out (rows, N), all of one dtype."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    out: Tensor

    @classmethod
    def make(cls, rows: int, n: int, k: int, dtype: torch.dtype) -> Problem:
        g = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, k), (n, k), (n,)))
        return cls(x, weight / k**0.5, bias, torch.empty(rows, n, dtype=dtype))


def match_linear(problem: Problem, gelu: bool, target: Target) -> GemmMatch:
    """The family's match of x · weightᵀ + bias, with or without gelu."""
    operators = [
        Operator("dense", Kind.GEMM, ("x", "weight"), ("product",), attributes={"transposed": True}),
        Operator("bias", Kind.BIAS, ("product", "b"), ("biased",), binary(Op.ADD)),
        Operator("gelu", Kind.ACTIVATION, ("biased",), ("active",), unary(Op.GELU)),
    ][: 3 if gelu else 2]
    tensors = {"x": problem.x, "weight": problem.weight, "b": problem.bias}
    values = {name: TensorSpec.contiguous(t.shape, t.dtype) for name, t in tensors.items()}
    values |= {op.output: TensorSpec.contiguous(problem.out.shape, problem.out.dtype) for op in operators}
    constants = {name: Constant(name) for name in ("weight", "b")}
    graph = OperatorGraph(tuple(operators), values, ("x",), (operators[-1].output,), constants)
    match = GemmFamily().match(graph.group(operators), target)
    if match is None:
        raise SystemExit("the gemm family does not match a linear layer")
    return match


def launcher(
    problem: Problem, match: GemmMatch, parameters: GemmParameters, target: Target, threads: int
) -> Callable[[], None]:
    """A function that runs the kernel on the problem."""
    call = GemmFamily().call(match, parameters, target, threads)
    assert isinstance(call, KernelCall)
    source = render(call.spec)
    kernel = load(build([source], target, headers=headers(call.spec))[source.symbol], source.symbol)
    named = {"x": problem.x, "b": problem.bias, call.outputs[0]: problem.out}
    tensors = []
    for ref in call.tensors:
        if isinstance(ref, Packed):
            layout: tuple[Any, ...] = ref.layout
            tensors.append(pack(problem.weight, *layout[1:]))
        else:
            tensors.append(named[str(ref)])
    workspace = torch.empty(call.workspace_bytes + 64, dtype=torch.uint8)
    aligned = workspace.data_ptr() + -workspace.data_ptr() % 64
    args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, threads, aligned)

    def run(kept: Sequence[Tensor] = (*tensors, workspace)) -> None:
        kernel(args)

    return run


def medians(arms: Mapping[str, Callable[[], object]], repeats: int, slice_seconds: float) -> dict[str, float]:
    """Median seconds of one call of every arm; each repeat gives every arm a slice of time in turn."""
    calls = {}
    for name, run in arms.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(slice_seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(s) for name, s in samples.items()}


def measure(
    n: int, k: int, rows: int, dtype: torch.dtype, target: Target, options: argparse.Namespace
) -> dict[str, object]:
    """One shape: seconds and GFLOP/s of every arm, and the floor."""
    problem, threads = Problem.make(rows, n, k, dtype), options.threads
    launch = functools.partial(launcher, problem, target=target, threads=threads)
    plain, fused = (match_linear(problem, gelu, target) for gelu in (False, True))
    spaces = [[c for c in GemmFamily().space(m, target) if isinstance(c, GemmParameters)] for m in (plain, fused)]
    x, weight, bias = problem.x, problem.weight, problem.bias
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    arms: dict[str, Callable[[], object]] = {
        "ours": launch(match=plain, parameters=spaces[0][0]),
        "ours+gelu": launch(match=fused, parameters=spaces[1][0]),
        "linear": lambda: F.linear(x, weight, bias),
        "linear+gelu": lambda: F.gelu(F.linear(x, weight, bias)),
        "prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
        "prepacked+gelu": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none"),
    }
    if options.variants:
        arms |= {f"{c.mr}x{c.nr} kc={c.kc}": launch(match=plain, parameters=c) for c in spaces[0][1:]}
    seconds = medians(arms, options.repeats, options.slice)
    flops = 2.0 * rows * n * k
    moved = sum(t.nbytes for t in (x, weight, bias, problem.out))
    # One instruction multiplies pairs of bf16 numbers, in the time of one fp32 multiply-add.
    peak = target.peak_flops * threads * (2 if spaces[0][0].pairs else 1)
    floor = max(flops / peak, moved / target.bandwidth)
    best = min(seconds[name] for name in ("linear", "prepacked"))
    return {
        "n": n,
        "k": k,
        "rows": rows,
        "seconds": seconds,
        "gflops": {name: flops / s / 1e9 for name, s in seconds.items()},
        "floor_seconds": floor,
        "fraction_of_peak": flops / peak / seconds["ours"],
        "speedup_over_linear": seconds["linear"] / seconds["ours"],
        "speedup_over_best": best / seconds["ours"],
        "gelu_cost": seconds["ours+gelu"] / seconds["ours"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 128, 512, 2048])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--slice", type=float, default=0.01, help="seconds that an arm runs in one repeat")
    parser.add_argument("--variants", action="store_true", help="also measure the other choices of the family's space")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    target = cpu_target(recalibrate=True)
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    peak = target.peak_flops * options.threads
    print(f"peak {peak / 1e9:.0f} GFLOP/s on {options.threads} threads, {target.bandwidth / 1e9:.0f} GB/s")
    names = SHAPES if options.shapes == "all" else [options.shapes]
    results = []
    with torch.inference_mode():
        for n, k in (shape for name in names for shape in SHAPES[name]):
            for rows in options.rows:
                result = measure(n, k, rows, DTYPES[options.dtype], target, options)
                results.append(result)
                gflops = result["gflops"]
                assert isinstance(gflops, dict)
                row = "  ".join(f"{name} {value:.0f}" for name, value in gflops.items())
                print(f"{n}x{k} rows {rows}: {row}  peak {result['fraction_of_peak']:.0%}", flush=True)
    if options.json:
        machine = {"peak_flops": peak, "bandwidth": target.bandwidth, "threads": options.threads, "arch": target.arch}
        options.json.write_text(json.dumps({"machine": machine, "dtype": options.dtype, "results": results}, indent=1))


if __name__ == "__main__":
    main()
