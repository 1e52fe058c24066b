"""The `gemm` family against F.linear, oneDNN's prepacked linear and the machine's floor.

All arms of a shape run interleaved and the medians are compared, since the speed of a machine drifts; weights come from
memory, as they do in a model, unless they should stay ``--warm``. The floor is the larger of multiply-adds over the
measured peak and bytes over the measured bandwidth.

    python benchmarks/gemm.py --rows 128 512
    python benchmarks/gemm.py --shapes minilm --variants
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import as_record, interleave, ratios, save
from torch import Tensor
from torch.nn import functional as F

from fuser.codegen.render import header_folder, render
from fuser.ir.expression import Op, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Gemm
from fuser.ir.target import Target
from fuser.kernels.base import materialized
from fuser.kernels.gemm import CpuGemm, GemmFamily, GemmMatch, GemmParameters
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.device import cpu_target
from fuser.runtime.library import load

SHAPES = {
    "bert": [(768, 768), (2304, 768), (3072, 768), (768, 3072)],
    "minilm": [(384, 384), (1152, 384), (1536, 384), (384, 1536)],
}
_MOST_COPIES = 24
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
        Operator("dense", Gemm(transposed=True), ("x", "weight"), ("product",)),
        Operator("bias", Bias(), ("product", "b"), ("biased",)),
        Operator("gelu", Activation(unary(Op.GELU)), ("biased",), ("active",)),
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
    problem: Problem, match: GemmMatch, parameters: GemmParameters, target: Target, threads: int, copies: int
) -> Callable[[], None]:
    """A function that runs the kernel on the problem, with the next of ``copies`` copies of the weights each time."""
    call = CpuGemm().call(match, parameters, target, threads)
    source = render(call.spec)
    kernel = load(build([source], target, headers=header_folder(target))[source.symbol], source.symbol)
    named = {"x": problem.x, "weight": problem.weight, "b": problem.bias, call.outputs[0]: problem.out}
    workspace = torch.empty(call.workspace_bytes + 64, dtype=torch.uint8)
    aligned = workspace.data_ptr() + -workspace.data_ptr() % 64
    kept, arguments = [workspace], []
    for _ in range(copies):
        tensors = materialized(call.tensors, named)
        kept += tensors
        arguments.append(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, threads, aligned))
    turn = itertools.cycle(arguments)

    def run(_: Sequence[Tensor] = tuple(kept)) -> None:
        kernel(next(turn))

    return run


def in_turn(run: Callable[[Tensor], object], weights: Sequence[Tensor]) -> Callable[[], object]:
    """``run`` with the next of the weights at every call."""
    turn = itertools.cycle(weights)
    return lambda: run(next(turn))


def measure(
    n: int, k: int, rows: int, dtype: torch.dtype, target: Target, options: argparse.Namespace
) -> dict[str, Any]:
    """One shape: milliseconds and GFLOP/s of every arm, and the floor."""
    problem, threads = Problem.make(rows, n, k, dtype), options.threads
    x, weight, bias = problem.x, problem.weight, problem.bias
    # In a model other layers' weights come between two uses of one.
    copies = 1 if options.warm else min(max(-(-3 * target.cache_bytes[2] // (2 * weight.nbytes)), 2), _MOST_COPIES)
    launch = functools.partial(launcher, problem, target=target, threads=threads, copies=copies)
    plain, fused = (match_linear(problem, gelu, target) for gelu in (False, True))
    spaces = [CpuGemm().space(m, target) for m in (plain, fused)]
    weights = [weight.clone() for _ in range(copies)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
    linear = torch.ops.mkldnn._linear_pointwise
    arms: dict[str, Callable[[], object]] = {
        "ours": launch(match=plain, parameters=spaces[0][0]),
        "ours+gelu": launch(match=fused, parameters=spaces[1][0]),
        "linear": in_turn(lambda w: F.linear(x, w, bias), weights),
        "linear+gelu": in_turn(lambda w: F.gelu(F.linear(x, w, bias)), weights),
        "prepacked": in_turn(lambda w: linear(x, w, bias, "none", [], ""), packed),
        "prepacked+gelu": in_turn(lambda w: linear(x, w, bias, "gelu", [], "none"), packed),
    }
    if options.variants:
        arms |= {f"{c.mr}x{c.nr} kc={c.kc}": launch(match=plain, parameters=c) for c in spaces[0][1:]}
    for name in ("ours", "ours+gelu"):
        arms[name]()
        exact = F.linear(x.double(), weight.double(), bias.double())
        exact = F.gelu(exact) if name.endswith("gelu") else exact
        error = float((problem.out - exact).norm() / exact.norm())
        if not error <= (1e-5 if dtype is torch.float32 else 1e-2):
            raise SystemExit(f"{name} is wrong for {n}x{k} at {rows} rows: relative error {error:.2g}")
    timings = interleave(arms, options.rounds)
    flops = 2.0 * rows * n * k
    moved = sum(t.nbytes for t in (x, weight, bias, problem.out))
    # One instruction multiplies pairs of bf16 numbers, in the time of one fp32 multiply-add.
    peak = target.peak_flops * threads * (2 if spaces[0][0].pairs else 1)
    ours = timings["ours"].median_ms
    return {
        "n": n,
        "k": k,
        "rows": rows,
        "dtype": options.dtype,
        "copies": copies,
        "arms": as_record(timings),
        "gflops": {name: round(flops / t.median_ms / 1e6, 1) for name, t in timings.items()},
        "floor_ms": 1e3 * max(flops / peak, moved / target.bandwidth),
        "fraction_of_peak": flops / peak / ours * 1e3,
        "faster_than": ratios(timings, "ours"),
        "gelu_cost": timings["ours+gelu"].median_ms / ours - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 128, 512, 2048])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm", action="store_true", help="use the same weights at every call")
    parser.add_argument("--variants", action="store_true", help="also measure the other choices of the family's space")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gemm.json")
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
                row = "  ".join(f"{name} {value:.0f}" for name, value in result["gflops"].items())
                print(f"{n}x{k} rows {rows}: {row}  peak {result['fraction_of_peak']:.0%}", flush=True)
    print(save("gemm", target, results, options.output))


if __name__ == "__main__":
    main()
