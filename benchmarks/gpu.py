"""Encoders and attention alone on an NVIDIA GPU: fuser against eager PyTorch with SDPA, torch.compile (default,
reduce-overhead, max-autotune), compiled FlexAttention and, for dense attention, cuDNN and FlashAttention through SDPA.

Every arm must agree with float32 before it is timed; all arms of a case are timed in turn. Results are written after
every case, so that a budget of time may end the run anywhere.

    python benchmarks/gpu.py --budget 400
    python benchmarks/gpu.py --parts attention --masks longformer --lengths 4096 --dtypes fp16
    python benchmarks/gpu.py --emulated               # a dry run of everything on the CPU, with tiny sizes
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Timing, as_record, machine, ratios
from torch import Tensor, nn
from torch.nn import functional as F

import fuser
from fuser.compiler import named_target
from fuser.ir.target import Target

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
AGREEMENT = {"fp16": 1e-2, "bf16": 5e-2, "fp32": 2e-4}
"""Largest relative L2 distance from the same computation in float32 (attention: float64) that counts as the same."""
MODES = {"compile": None, "compile reduce-overhead": "reduce-overhead", "compile max-autotune": "max-autotune"}
PEERS = ("eager", *MODES, "flex", "cudnn", "flash")
SAMPLE_SECONDS = 2e-3
"""A sample is as many calls as take this long: shorter ones measure the clock."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Layers, width, heads and inner width of an encoder."""

    layers: int
    width: int
    heads: int
    inner: int


SIZES = {"bert-base": Size(12, 768, 12, 3072), "bert-large": Size(24, 1024, 16, 4096), "tiny": Size(1, 32, 2, 64)}


def masks(length: int) -> dict[str, fuser.masks.Mask]:
    """The masks of the benchmark, which narrow ones shrink for dry runs."""
    wide = length >= 512
    window, tokens = (128, 16) if wide else (4, 2)
    return {
        "dense": fuser.masks.Dense(),
        "causal": fuser.masks.Causal(),
        "window": fuser.masks.SlidingWindow(window, window),
        "dilated": fuser.masks.Dilated(64 if wide else 2, 4),
        "longformer": fuser.masks.Longformer(window, tokens),
        "bigbird": fuser.masks.BigBird(64 if wide else 8, 3, 2, 3 if wide else 1, seed=0),
        "strided": fuser.masks.Strided(),
        "fixed": fuser.masks.Fixed(),
    }


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """One post-norm layer as BERT has it, with attention as a parameter: what the arms differ in."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = size.heads, attend
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, size.inner), nn.Linear(size.inner, size.width)
        self.first, self.second = nn.LayerNorm(size.width), nn.LayerNorm(size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        merged = self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = self.first(x + self.out(merged))
        y: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return y


def encoder(size: Size, attend: Attend, dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(size, attend) for _ in range(size.layers))).eval().to(device, dtype)


def sdpa(mask: Tensor | None, causal: bool = False) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def flex(mask: fuser.masks.Mask, length: int, device: torch.device) -> Attend:
    """FlexAttention with the mask's entries as its rule; without one where the mask is dense."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if isinstance(mask, fuser.masks.Dense):
        return lambda q, k, v: flex_attention(q, k, v)  # type: ignore[return-value]
    entries = mask.dense(length).to(device)
    blocks = create_block_mask(lambda b, h, i, j: entries[i, j], None, None, length, length, device=str(device))
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks)  # type: ignore[return-value]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION):
        yield


def entries(mask: fuser.masks.Mask, length: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """What SDPA gets for a mask: a bool matrix, or its own flag where that says all."""
    if isinstance(mask, fuser.masks.Dense):
        return None, False
    if isinstance(mask, fuser.masks.Causal):
        return None, True
    return mask.dense(length).to(device), False


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the results; ``model`` is None for attention alone with ``heads`` heads of 64 or ``head_dim``."""

    model: str | None
    batch: int
    length: int
    mask: str
    dtype: str
    heads: int = 16
    head_dim: int = 64

    def __str__(self) -> str:
        name = self.model or f"attention {self.heads}x{self.head_dim}"
        return f"{name} {self.batch}x{self.length} {self.mask} {self.dtype}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arms_of(
    case: Case, peers: tuple[str, ...], device: torch.device, target: str
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """For every arm what makes it, once it is its turn: compiling or planning one may fail on its own."""
    dtype = DTYPES[case.dtype]
    mask = masks(case.length)[case.mask]
    allowed, causal = entries(mask, case.length, device)
    generator = torch.Generator().manual_seed(1)
    plain = sdpa(allowed, causal)
    if case.model is None:
        shape = (case.batch, case.heads, case.length, case.head_dim)
        inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

        def module(attend: Attend) -> nn.Module:
            return _Attention(attend).eval()
    else:
        size = SIZES[case.model]
        inputs = [torch.randn(case.batch, case.length, size.width, generator=generator).to(device, dtype)]

        def module(attend: Attend) -> nn.Module:
            return encoder(size, attend, dtype, device)

    def bound(call: Callable[..., Any]) -> Callable[[], Tensor]:
        return lambda: call(*inputs)

    def ours() -> Callable[[], Tensor]:
        if case.model is None and device.type == "cuda":
            return bound(lambda q, k, v: fuser.sparse_attention(q, k, v, mask))
        search = "model" if device.type == "cpu" else "cached"
        fast = fuser.optimize(module(sdpa(None)), tuple(inputs), attention=mask, target=target, search=search)
        if fast.fallbacks or not fast.kernels:
            raise RuntimeError(f"the original model would run: {fast.fallbacks}")
        return bound(fast)

    def through(name: str) -> Callable[[], Tensor]:
        def call(*given: Tensor) -> Tensor:
            with backend(name):
                return plain(given[0], given[1], given[2])

        return bound(call)

    arms: dict[str, Callable[[], Callable[[], Tensor]]] = {"fuser": ours}
    if "eager" in peers:
        arms["eager"] = lambda: bound(module(plain))
    for name, mode in MODES.items():
        if name in peers:
            arms[name] = lambda mode=mode: bound(torch.compile(module(plain), mode=mode))  # type: ignore[misc]
    if "flex" in peers:
        arms["flex"] = lambda: bound(torch.compile(module(flex(mask, case.length, device))))
    if case.model is None and allowed is None:
        arms |= {name: lambda name=name: through(name) for name in ("cudnn", "flash") if name in peers}  # type: ignore[misc]
    return arms


class _Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def reference(case: Case, device: torch.device) -> Tensor:
    """The same computation by plain PyTorch: encoders in float32, attention in float64 (its first heads only)."""
    mask = masks(case.length)[case.mask]
    generator = torch.Generator().manual_seed(1)
    dtype = DTYPES[case.dtype]
    allowed = mask.dense(case.length).to(device)
    if case.model is None:
        shape = (case.batch, case.heads, case.length, case.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype)[:1, :2].to(device).double() for _ in range(3))
        return _explicit(q, k, v, allowed)
    size = SIZES[case.model]
    x = torch.randn(case.batch, case.length, size.width, generator=generator).to(dtype)[:1].to(device).float()
    model = encoder(size, lambda q, k, v: _explicit(q, k, v, allowed), dtype, device).float()
    result: Tensor = model(x)
    return result


def _explicit(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def distance(result: Tensor, expected: Tensor) -> float:
    """Relative L2 distance of what both have."""
    part = result[tuple(slice(0, n) for n in expected.shape)].to(expected.dtype)
    return float((part - expected).norm() / expected.norm())


def measure(arms: Mapping[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Milliseconds of one call of every arm, all in turn; a sample is the mean of enough calls."""
    calls = {}
    for name, run in arms.items():
        for _ in range(3):
            run()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        calls[name] = max(1, min(200, round(SAMPLE_SECONDS / (time.perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            run()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronize(device)
            samples[name].append(1e3 * (time.perf_counter() - start) / calls[name])
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    ordered = torch.tensor(values, dtype=torch.float64)
    low, middle, high = (float(ordered.quantile(p)) for p in (0.25, 0.5, 0.75))
    return Timing(middle, low, high, len(values))


def run(case: Case, options: argparse.Namespace, device: torch.device, target: str) -> dict[str, Any]:
    """One line of the results: times, distances from the reference and why arms are missing."""
    expected = reference(case, device)
    arms: dict[str, Callable[[], Tensor]] = {}
    distances: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in arms_of(case, options.peers, device, target).items():
        started = time.perf_counter()
        try:
            arm = make()
            found = distance(arm(), expected)
        except Exception as error:  # whatever an arm raises is a result of it
            missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: {missing[name][:150]}", flush=True)
            continue
        distances[name] = found
        print(f"  {name}: distance {found:.1e}, ready after {time.perf_counter() - started:.1f} s", flush=True)
        if found <= AGREEMENT[case.dtype]:
            arms[name] = arm
        else:
            missing[name] = f"disagrees by {found:.1e}"
    timings = measure(arms, device, options.rounds)
    return {
        "case": dataclasses.asdict(case),
        "name": str(case),
        "times": as_record(timings),
        "speedup": ratios(timings, "fuser") if "fuser" in timings else {},
        "distance": distances,
        "missing": missing,
    }


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The most telling ones first: a budget may cut the rest."""
    if "encoders" in options.parts:
        shapes = itertools.product(options.dtypes, options.models, options.shapes, options.masks)
        for dtype, model, (batch, length), mask in shapes:
            yield Case(model, batch, length, mask, dtype)
    if "attention" in options.parts:
        for dtype, length, mask in itertools.product(options.dtypes, options.lengths, options.masks):
            yield Case(None, max(1, options.tokens // length), length, mask, dtype, options.heads, options.head_dim)


def gpu(device: torch.device, target: Target) -> dict[str, Any]:
    """The machine that results belong to."""
    values = machine(target)
    if device.type == "cuda":
        query = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit,memory.total"
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            values["gpu"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        values["cuda"] = torch.version.cuda
    return values


def table(results: list[dict[str, Any]]) -> str:
    """Results in Markdown: milliseconds, and how many times faster fuser is than each peer."""
    names = list(dict.fromkeys(name for result in results for name in result["times"] if name != "fuser"))
    lines = [_line(["case", "fuser ms", *names]), _line(["---", "---:", *["---:"] * len(names)])]
    for result in results:
        mine = result["times"].get("fuser")
        cells = [f"{mine['median_ms']:.3f}" if mine else result["missing"].get("fuser", "–")[:60]]
        for name in names:
            time_ms = result["times"].get(name)
            ratio = result["speedup"].get(name)
            cells.append(
                "–" if time_ms is None else f"{time_ms['median_ms']:.3f}" + (f" ({ratio:.2f}×)" if ratio else "")
            )
        lines.append(_line([result["name"], *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def profile(case: Case, device: torch.device, target: str, path: Path) -> None:
    """Where the time of one case goes, by kernel, as PyTorch's profiler sees it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    arm = arms_of(case, (), device, target)["fuser"]()
    for _ in range(3):
        arm()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profiler(activities=activities) as found:
        for _ in range(5):
            arm()
        synchronize(device)
    key = "cuda_time_total" if device.type == "cuda" else "cpu_time_total"
    path.write_text(f"{case}\n{found.key_averages().table(sort_by=key, row_limit=40)}\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["encoders", "attention"], choices=["encoders", "attention"])
    parser.add_argument("--models", nargs="+", default=["bert-base", "bert-large"], choices=list(SIZES))
    parser.add_argument(
        "--shapes", nargs="+", default=["8x512", "1x128", "16x1024", "1x4096", "8x64"], help="BATCHxLENGTH"
    )
    parser.add_argument(
        "--masks", nargs="+", default=["dense", "longformer", "strided", "window"], choices=list(masks(512))
    )
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 1024, 16384, 32768], help="of attention alone")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch of attention alone")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no case is started")
    parser.add_argument("--emulated", action="store_true", help="tiny sizes on the CPU's emulator: does it all run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; of a dry run: nowhere")
    parser.add_argument("--profile", type=Path, help="write where the time of the first case goes to this file")
    parser.add_argument("--document", type=Path, help="write the table to this Markdown file as well")
    options = parser.parse_args()
    if options.emulated:
        options.models, options.shapes, options.lengths, options.tokens = ["tiny"], ["1x24"], [24], 24
        options.heads, options.head_dim, options.rounds = 2, 32, 2
        options.peers = [peer for peer in options.peers if peer == "eager"]
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    options.peers = tuple(options.peers)
    if options.output is None and not options.emulated:
        options.output = RESULTS / "gpu.json"
    return options


def main() -> None:
    options = parse()
    if not options.emulated and not torch.cuda.is_available():
        raise SystemExit("there is no usable GPU; --emulated runs everything on the CPU with tiny sizes")
    device = torch.device("cpu" if options.emulated else "cuda")
    target = "cuda:emulated" if options.emulated else "cuda"
    about = gpu(device, named_target(target))
    results: list[dict[str, Any]] = []
    started = time.perf_counter()
    with torch.no_grad():
        for case in cases(options):
            if time.perf_counter() - started > options.budget:
                print(f"the budget of {options.budget:g} s is spent")
                break
            print(case, flush=True)
            try:
                results.append(run(case, options, device, target))
            except torch.OutOfMemoryError as error:
                print(f"  out of memory: {str(error)[:100]}")
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"benchmark": "gpu", "machine": about, "results": results}, indent=1)
                options.output.write_text(text + "\n", encoding="utf-8")
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if options.profile is not None:
            profile(next(cases(options)), device, target, options.profile)
    print(table(results))
    if options.document is not None:
        head = (
            f"# Measured on a GPU\n\n{about.get('gpu', about['cpu'])}, commit {about['commit']}, {about['date']}.\n\n"
        )
        options.document.write_text(f"{head}{table(results)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
