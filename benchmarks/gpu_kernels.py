"""What is known of the CUDA kernels of real models without a GPU: registers, shared memory and spills as ptxas reports
them, occupancy by calculation, flops and bytes against the floor, and instructions by disassembly; and the registers of
every tile that products can choose from. Needs nvcc and a C++ compiler, and for instructions nvdisasm.

    python benchmarks/gpu_kernels.py --write                # docs/cuda-kernels.md; minutes
    python benchmarks/gpu_kernels.py --cases bert-base:1x128:float16 --archs sm_90a --tiles
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fuser
from fuser.codegen.assemble import Assembly, assemble
from fuser.codegen.render import header_folder, render
from fuser.frontend.calls import flatten_call
from fuser.frontend.capture import capture
from fuser.frontend.graphs import raise_graph
from fuser.ir.attention import AttentionSpec
from fuser.ir.expression import Builder, Op
from fuser.ir.masks import Mask
from fuser.ir.target import Target, cuda_target, emulated_target
from fuser.kernels import gemm_cuda
from fuser.kernels.base import Access, Cost, DType, KernelSpec, Operand, floating
from fuser.module.compiler import choose_all
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.runtime.nvcc import Resources, find_disassembler, find_nvcc, resources
from fuser.runtime.occupancy import Occupancy, occupancy
from fuser.runtime.program import NativeStep

DOCUMENT = Path(__file__).parent.parent / "docs" / "cuda-kernels.md"
ARCHS = ("sm_80", "sm_90", "sm_90a")
CASES = ("bert-base:8x512:float16", "bert-base:8x512:float32", "bert-base:1x4096:float16:longformer")
MODELS = {
    "bert-base": {},
    "bert-large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
    "bert-tiny": {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
}
MASKS: dict[str, Mask | None] = {
    "dense": None,
    "longformer": fuser.masks.Longformer(window=128, global_tokens=16),
    "strided": fuser.masks.Strided(),
    "window": fuser.masks.SlidingWindow(64, 64),
}
# Kinds of products: type of storage, and whether tensor cores multiply.
PRODUCTS = {"fp16": (DType.F16, True), "TF32": (DType.F32, True), "exact fp32": (DType.F32, False)}
TILED = (768, 3072)
"""Columns and depth of the product that every tile is compiled for."""
# Where tensors are pretended to be: aligned as those of PyTorch's allocator are.
_ADDRESS = 1 << 32


@dataclass(frozen=True)
class Row:
    """One ``__global__`` function of one kernel of a model on one architecture.

    ``cost`` is that of the whole kernel, of which a function may be only a part; ``floor`` and ``predicted`` are
    seconds of it on the architecture's reference GPU.
    """

    case: str
    arch: str
    family: str
    operators: str
    calls: int
    resources: Resources
    launch: emulator.Launch
    occupancy: Occupancy
    cost: Cost
    floor: float
    predicted: float


def encoder(case: str) -> tuple[nn.Module, dict[str, Tensor], Mask | None]:
    """Two layers (all are equal) of the encoder of a case MODEL:BATCHxLENGTH:DTYPE[:MASK], its inputs and its mask."""
    from transformers import BertConfig, BertModel

    name, shape, dtype, *mask = case.split(":")
    batch, length = map(int, shape.split("x"))
    config = BertConfig(num_hidden_layers=2, max_position_embeddings=max(512, length), **MODELS[name])
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval().to(getattr(torch, dtype))
    inputs = {"input_ids": torch.zeros(batch, length, dtype=torch.int64)}
    return model, inputs, MASKS[mask[0]] if mask else None


def compiled(case: str, target: Target) -> Assembly:
    """The steps that a case becomes on ``target``; needs no GPU."""
    model, inputs, mask = encoder(case)
    with torch.no_grad():
        graph = raise_graph(capture(model, flatten_call((), inputs)), mask and AttentionSpec(mask), floating(target))
    choices, _ = choose_all(graph, target)
    return assemble(graph, choices, target, 1)


def rows_of(case: str, arch: str) -> list[Row]:
    """One row for every distinct kernel function of a case, in the order of the program."""
    target = cuda_target(arch)
    assembly = compiled(case, target)
    records = {record.name: record for record in assembly.kernels}
    sources = {source.symbol: source for source in assembly.sources}
    steps: dict[str, tuple[NativeStep, str]] = {}
    for step, label in zip(assembly.plan.steps, assembly.labels, strict=True):
        if isinstance(step, NativeStep):
            steps.setdefault(step.symbol, (step, label))
    costs = {"+".join(op.name for op in choice.group.operators): choice.cost for choice in assembly.choices}
    used = [sources[symbol] for symbol in steps]
    paths = build(used, emulated_target(), headers=header_folder(emulated_target()))
    tool = find_disassembler(find_nvcc(target))
    reports = dict(zip(steps, _compile([source.text for source in used], target, tool), strict=True))
    itemsize = getattr(torch, case.split(":")[2]).itemsize
    rows = []
    for symbol, (step, label) in steps.items():
        addresses = [_ADDRESS] * len(step.tensors)
        launches = emulator.launches(paths[symbol], symbol, addresses, step.extents, workspace=_ADDRESS)
        cost, record = costs[label], records[symbol]
        for launch in dict.fromkeys(dataclasses.replace(one, grid=(1, 1, 1)) for one in launches):
            grid = next(one.grid for one in launches if dataclasses.replace(one, grid=(1, 1, 1)) == launch)
            need = _of(launch.function, reports[symbol])
            found = occupancy(
                arch,
                threads=launch.threads,
                registers=need.registers,
                shared_bytes=need.shared_bytes + launch.shared_bytes,
            )
            rows.append(
                Row(
                    case,
                    arch,
                    record.family,
                    "+".join(record.operators),
                    record.calls,
                    need,
                    dataclasses.replace(launch, grid=grid),
                    found,
                    cost,
                    floor(cost, target, itemsize),
                    cost.seconds(target),
                )
            )
    return rows


def floor(cost: Cost, target: Target, itemsize: int) -> float:
    """Seconds that the arithmetic or the traffic takes at the peak of ``target``, whichever is more."""
    peak = target.tensor_flops if itemsize == 2 else target.peak_flops
    return max(cost.flops / (peak * target.cores), cost.bytes / target.bandwidth)


def _compile(texts: Sequence[str], target: Target, disassembler: Path | None = None) -> list[tuple[Resources, ...]]:
    """What the kernels of every source need, compiled on all cores."""
    count = len(texts)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_resources, texts, [target] * count, [disassembler] * count))


@functools.lru_cache(maxsize=256)
def _resources(text: str, target: Target, disassembler: Path | None) -> tuple[Resources, ...]:
    return resources(text, target, headers=header_folder(target), disassembler=disassembler)


def tile_spec(dtype: DType, tensor_cores: bool, tile: gemm_cuda.Tile) -> KernelSpec:
    """A product with bias and GELU on a tile."""
    b = Builder()
    epilogue = b.build(b.apply(Op.GELU, b.apply(Op.ADD, b.input(0), b.input(1))))
    bias = Operand(Access.MATRIX, dtype)
    n, k = TILED
    parameters = gemm_cuda.parameters(n, k, dtype, epilogue, [bias], [dtype], tile, tensor_cores)
    return KernelSpec("gemm", "cuda/gemm.cu.j2", parameters)


def tile_table(archs: Sequence[str]) -> str:
    """For every kind of product, what all of its tiles need: with one block for a sum and with several."""
    names = ["architecture", "product", "tiles", "kernels", "most registers", "kernels that spill", "spills B"]
    words = {"architecture", "product"}
    lines = [_line(names), _line("---" if name in words else "---:" for name in names)]
    for arch in archs:
        target = cuda_target(arch)
        for product, (dtype, tensor_cores) in PRODUCTS.items():
            tiles = [t for t in gemm_cuda.legal_tiles(*TILED, dtype, tensor_cores, target) if t.split <= 2]
            texts = [render(tile_spec(dtype, tensor_cores, tile)).text for tile in tiles]
            found = [one for report in _compile(texts, target) for one in report]
            spills = [one.spill_store_bytes + one.spill_load_bytes for one in found]
            shapes = len({dataclasses.replace(tile, split=1) for tile in tiles})
            most = max(one.registers for one in found)
            lines.append(_line([arch, product, shapes, len(found), most, sum(s > 0 for s in spills), sum(spills)]))
    return "\n".join(lines)


def _of(function: str, reports: Sequence[Resources]) -> Resources:
    """The report of a function: nvcc and g++ mangle names alike, but for unnamed namespaces."""
    found = [report for report in reports if _unnamed(report.function) == _unnamed(function)]
    if len(found) != 1:
        raise LookupError(f"{function} is {len(found)} of the functions {[report.function for report in reports]}")
    return found[0]


def _unnamed(function: str) -> str:
    """A mangled name without what compilers call unnamed namespaces: ``<length>_GLOBAL__N_<anything>``."""
    while match := re.search(r"(\d+)_GLOBAL__N_", function):
        # Digits in front of the length may belong to a name before it: the length is what fits.
        for start in range(match.start(1), match.end(1)):
            end = match.end(1) + int(function[start : match.end(1)])
            if end <= len(function):
                function = f"{function[:start]}*{function[end:]}"
                break
        else:
            return function
    return function


def plain_name(function: str) -> str:
    """``attend`` for a mangled name of ``void attend<...>(...)``."""
    tool = subprocess.run(["c++filt", function], capture_output=True, text=True, check=False)
    name = (tool.stdout.strip() or function).replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name.removeprefix("void "))[0].rpartition("::")[2]


def table(rows: Iterable[Row]) -> str:
    """Rows as a table in Markdown."""
    names = ["kernel", "function", "calls", "threads", "registers", "shared KiB", "spills B", "blocks/SM", "occupancy"]
    names += ["limited by", "GFLOP", "MB", "floor µs", "predicted µs"]
    words = {"kernel", "function", "limited by"}
    lines = [_line(names), _line("---" if name in words else "---:" for name in names)]
    for row in rows:
        need = row.resources
        cells = [
            f"{row.family}: {_short(row.operators)}",
            f"`{plain_name(row.launch.function)}`",
            row.calls,
            row.launch.threads,
            need.registers,
            f"{(need.shared_bytes + row.launch.shared_bytes) / 1024:.1f}",
            need.spill_store_bytes + need.spill_load_bytes,
            row.occupancy.blocks,
            f"{100 * row.occupancy.share:.0f} %",
            row.occupancy.limit,
            f"{row.cost.flops / 1e9:.2f}",
            f"{row.cost.bytes / 1e6:.1f}",
            f"{1e6 * row.floor:.1f}",
            f"{1e6 * row.predicted:.1f}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def mix_table(rows: Iterable[Row]) -> str:
    """The instructions of every function by kind, as a table in Markdown; empty where no disassembler was found."""
    kinds = ["tensor", "FFMA", "other ALU", "shared", "global", "barriers", "local", "control"]
    names = ["kernel", "function", "instructions", *kinds]
    lines = [_line(names), _line("---" if name in names[:2] else "---:" for name in names)]
    for row in rows:
        mix = row.resources.instructions
        if mix is None:
            return ""
        function = f"`{plain_name(row.launch.function)}`"
        lines.append(_line([f"{row.family}: {_short(row.operators)}", function, mix.total, *dataclasses.astuple(mix)]))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _short(operators: str) -> str:
    """Operators without prefixes of their module and numbers, repeated ones once."""
    kinds = (re.sub(r"scaled_dot_product_attention_|_?\d+", "", name) for name in operators.split("+"))
    return " + ".join(dict.fromkeys(kind.replace("linear_", "").replace("linear", "bias") for kind in kinds))


def document(cases: Sequence[str], archs: Sequence[str], tiles: bool) -> str:
    """The page: tables for every case and architecture, and one of all tiles."""
    nvcc = find_nvcc(cuda_target(archs[0]))
    parts = [
        "# CUDA kernels, without a GPU",
        "",
        "Made by `python benchmarks/gpu_kernels.py --write`; nothing here is measured. Registers, shared memory and",
        f"spills are ptxas's ({nvcc.name}).",
        "Occupancy is calculated from them and the launch (`runtime/occupancy.py`). Work is the cost model's, for one",
        "call of a kernel with all of its functions; the floor is its arithmetic or its traffic, whichever takes more",
        "time at the peak of the architecture's reference GPU (`fuser/ir/target.py`), and the prediction is what the",
        "cost model chooses kernels by, with launch overhead. Steps that run a library (cuBLASLt) have no rows.",
        "",
    ]
    if find_disassembler(nvcc) is None:
        parts.append(
            "**No disassembler was found** (`nvdisasm`, of the CUDA toolkit, or PyPI's `nvidia-cuda-nvdisasm` or "
            "`triton`): this page has no tables of instructions."
        )
    else:
        parts += [
            "The second table of a case counts the instructions of the machine code, where they stand, not how often",
            "they run: tensor cores (HMMA …), FFMA, other arithmetic and moves, shared memory (LDS, LDSM, STS …),",
            "global memory (LDG, STG, LDGSTS …), barriers, local memory, and control with constants. Code for tensors",
            "that are not aligned to 16 bytes is among them.",
        ]
    for case in cases:
        name, shape, dtype, *mask = case.split(":")
        batch, length = shape.split("x")
        shown = f"{name}, {batch} × {length} tokens, {dtype}, {mask[0] if mask else 'dense'} attention"
        for arch in archs:
            rows = rows_of(case, arch)
            parts += ["", f"## {shown}, {arch}", "", table(rows)]
            if mix := mix_table(rows):
                parts += ["", mix]
    if tiles:
        n, k = TILED
        parts += [
            "",
            "## Every tile of `gemm`",
            "",
            f"All tiles of a product with bias and GELU, N = {n} and K = {k}, with the sum of a tile in one block and",
            "in two (the kernel that adds them up counts, too). Those of bf16 are those of fp16.",
            "",
            # What differs between both kinds of sm_90 is not used here.
            tile_table([arch for arch in archs if arch != "sm_90"]),
        ]
    return "\n".join([*parts, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="MODEL:BATCHxLENGTH:DTYPE[:MASK]")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--tiles", action="store_true", help="also compile every tile; --write does")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name} instead of printing")
    chosen = parser.parse_args()
    text = document(chosen.cases, chosen.archs, chosen.tiles or chosen.write)
    if chosen.write:
        DOCUMENT.write_text(text, encoding="utf-8")
        print(f"wrote {DOCUMENT}")
    else:
        print(text)


if __name__ == "__main__":
    main()
