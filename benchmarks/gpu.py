"""Encoders and attention alone on an NVIDIA GPU: fuser against eager PyTorch with SDPA, torch.compile (default,
reduce-overhead, max-autotune), compiled FlexAttention and, for dense attention, cuDNN and FlashAttention through SDPA.

Every arm must agree with float32 before it is timed; all arms of a case are timed in turn. The most telling cases come
first, and results are written after every case, so that a budget of time may end the run anywhere; another run goes on
with the cases that the file of results lacks.

    python benchmarks/gpu.py --budget 400 --workers 8
    python benchmarks/gpu.py --parts attention --masks longformer --lengths 4096 --dtypes fp16
    python benchmarks/gpu.py --emulated               # a dry run of everything on the CPU, with tiny sizes
    python benchmarks/gpu.py --tables                 # stored results to docs/gpu.md; needs no GPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Timing, as_record, machine, ratios
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

import fuser
from fuser.ir.target import Target
from fuser.runtime.targets import named_target

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
AGREEMENT = {"fp16": 1e-2, "bf16": 5e-2, "fp32": 2e-4}
"""Largest relative L2 distance from the same computation in float32 (attention: float64) that counts as the same."""
MODES = {"compile": None, "compile reduce-overhead": "reduce-overhead", "compile max-autotune": "max-autotune"}
PEERS = ("eager", *MODES, "flex", "cudnn", "flash")
SAMPLE_SECONDS = 2e-3
"""A sample is as many calls as take this long: shorter ones measure the clock."""
SPARSE_LENGTH = 1024
"""Encoders of fewer tokens are measured with dense attention only."""
LEAST_SECONDS = 15.0
"""With less of the budget left no case is started."""
ROWS = 2048
"""Rows of attention alone that are compared with float64; of longer sequences, blocks spread over them."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"


class OutOfTime(BaseException):
    """No Exception: PyTorch's compiler would take it for a failure of its own and go on."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in its block after so many seconds."""

    def expire(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


Rule = Callable[[Any, Any, Tensor, Tensor], Tensor]


def rule(mask: fuser.masks.Mask, length: int, device: torch.device) -> Rule:
    """A mask of :func:`masks` as FlexAttention's ``mask_mod``, in the fewest operations."""
    match mask:
        case fuser.masks.Causal():
            return lambda b, h, i, j: j <= i
        case fuser.masks.SlidingWindow(left=left):
            return lambda b, h, i, j: (i - j).abs() <= left
        case fuser.masks.Dilated(window=window, dilation=step):
            return lambda b, h, i, j: ((i - j).abs() <= window * step) & ((i - j) % step == 0)
        case fuser.masks.Longformer(window=window, global_tokens=first):
            return lambda b, h, i, j: ((i - j).abs() <= window) | (i < first) | (j < first)
        case fuser.masks.BigBird(block=size):
            rows = [mask.rows(start, start + 1, length)[:, ::size] for start in range(0, length, size)]
            blocks = torch.cat(rows).to(device)
            return lambda b, h, i, j: blocks[i // size, j // size]
        case fuser.masks.Strided():
            step = math.isqrt(length)
            return lambda b, h, i, j: (j <= i) & (((i - j) % step == 0) | (i - j < step))
        case fuser.masks.Fixed():
            step = math.isqrt(length)
            return lambda b, h, i, j: (j <= i) & ((j % step == step - 1) | (i // step == j // step))
    raise ValueError(f"there is no rule for {mask}")


def flex(mask: fuser.masks.Mask, length: int, device: torch.device) -> Attend:
    """FlexAttention with the mask's blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mod = rule(mask, length, device)
    # Compiled, it makes no matrix of all pairs.
    blocks = create_block_mask(mod, None, None, length, length, device=str(device), _compile=length > 8192)
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
    allowed, positions = rule(mask, length, device), torch.arange(length, device=device)
    return torch.cat([allowed(None, None, rows[:, None], positions) for rows in positions.split(1024)]), False


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


def peers_of(case: Case, chosen: tuple[str, ...], autotuned: bool) -> tuple[str, ...]:
    """The arms beside fuser that a case is worth the time for."""
    names = ["eager"]
    if case.model is not None:
        # Alone, attention is one call of a library, which compiling leaves as it is.
        names += [name for name in MODES if autotuned or name != "compile max-autotune"]
    if case.mask != "dense":
        names.append("flex")
    if case.mask in ("dense", "causal") and case.dtype != "fp32":
        names += ["cudnn", "flash"]
    return tuple(name for name in names if name in chosen)


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
        eager = module(plain)

        def call(*given: Tensor) -> Tensor:
            with backend(name):
                result: Tensor = eager(*given)
            return result

        return bound(call)

    arms: dict[str, Callable[[], Callable[[], Tensor]]] = {"fuser": ours}
    if "eager" in peers:
        arms["eager"] = lambda: bound(module(plain))
    for name, mode in MODES.items():
        if name in peers:
            arms[name] = lambda mode=mode: bound(torch.compile(module(plain), mode=mode))  # type: ignore[misc]
    if "flex" in peers:
        arms["flex"] = lambda: bound(torch.compile(module(flex(mask, case.length, device))))
    return arms | {name: lambda name=name: through(name) for name in ("cudnn", "flash") if name in peers}  # type: ignore[misc]


class _Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def reference(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same computation by plain PyTorch, and the rows of the sequence that it is of: encoders in float32, the first
    of the batch; attention in float64, its first heads, and of a long sequence some rows."""
    mask, length = masks(case.length)[case.mask], case.length
    generator = torch.Generator().manual_seed(1)
    dtype = DTYPES[case.dtype]
    if case.model is None:
        size = length if length <= ROWS else 128
        starts = range(0, length, max(size, size * length // ROWS))
        allowed = torch.cat([mask.rows(start, start + size, length) for start in starts]).to(device)
        rows = torch.cat([torch.arange(start, start + size) for start in starts]).to(device)
        shape = (case.batch, case.heads, length, case.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype)[:1, :2].to(device).double() for _ in range(3))
        return _explicit(q[:, :, rows], k, v, allowed), rows
    width, allowed = SIZES[case.model].width, mask.dense(length).to(device)
    x = torch.randn(case.batch, length, width, generator=generator).to(dtype)[:1].to(device).float()
    model = encoder(SIZES[case.model], lambda q, k, v: _explicit(q, k, v, allowed), dtype, device).float()
    result: Tensor = model(x)
    return result, torch.arange(length, device=device)


def _explicit(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def distance(result: Tensor, expected: Tensor, rows: Tensor) -> float:
    """Relative L2 distance of what both have; ``rows`` of the sequence are expected."""
    part = result.index_select(-2, rows)[tuple(slice(0, n) for n in expected.shape)].to(expected.dtype)
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


def run(case: Case, options: argparse.Namespace, device: torch.device, target: str, end: float) -> dict[str, Any]:
    """One line of the results: times, distances from the reference and why arms are missing. Raises OutOfTime at
    ``end``, on the clock of ``time.perf_counter``."""
    began = time.perf_counter()
    peers = peers_of(case, options.peers, str(case) in autotuned(options))
    with limited(end - began):
        expected, rows = reference(case, device)
        makers = arms_of(case, peers, device, target)
    arms: dict[str, Callable[[], Tensor]] = {}
    distances: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        started = time.perf_counter()
        try:
            with limited(min(options.arm_seconds, end - started)):
                arm = make()
                found = distance(arm(), expected, rows)
        except OutOfTime:
            if time.perf_counter() >= end:
                raise
            missing[name] = f"not ready after {options.arm_seconds:g} s"
        except Exception as error:  # whatever an arm raises is a result of it
            missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            distances[name] = found
            print(f"  {name}: distance {found:.1e}, ready after {time.perf_counter() - started:.1f} s", flush=True)
            if found <= AGREEMENT[case.dtype]:
                arms[name] = arm
            else:
                missing[name] = f"disagrees by {found:.1e}"
        if name in missing:
            print(f"  {name}: {missing[name][:150]}", flush=True)
    with limited(end - time.perf_counter()):
        timings = measure(arms, device, options.rounds)
    return {
        **_head(case),
        "times": as_record(timings),
        "speedup": ratios(timings, "fuser") if "fuser" in timings else {},
        "distance": distances,
        "missing": missing,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _head(case: Case) -> dict[str, Any]:
    return {"case": dataclasses.asdict(case), "name": str(case)}


def cases(options: argparse.Namespace) -> list[Case]:
    """All cases, the most telling first: every axis is given in that order, and a case ranks by how far it is from the
    beginnings of them all."""
    ranked: list[tuple[int, Case]] = []
    if "encoders" in options.parts:
        axes = (options.dtypes, options.models, options.shapes, options.masks)
        for rank, (dtype, model, (batch, length), mask) in _ranked(*axes):
            if mask == "dense" or length >= SPARSE_LENGTH or options.emulated:
                ranked.append((rank, Case(model, batch, length, mask, dtype)))
    if "attention" in options.parts:
        for rank, (dtype, length, mask) in _ranked(options.dtypes, options.lengths, options.masks):
            batch = max(1, options.tokens // length)
            ranked.append((rank, Case(None, batch, length, mask, dtype, options.heads, options.head_dim)))
    return [case for _, case in sorted(ranked, key=lambda one: one[0])]


def _ranked(*axes: list[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for chosen in itertools.product(*map(enumerate, axes)):
        yield sum(position for position, _ in chosen), tuple(value for _, value in chosen)


def autotuned(options: argparse.Namespace) -> set[str]:
    """The names of the cases with an arm of max-autotune, which takes a minute or more to compile."""
    return set([str(case) for case in cases(options) if case.model is not None][: options.autotune])


def warm(options: argparse.Namespace, seconds: float) -> None:
    """Let ``options.workers`` processes compile the first cases into the caches on disk, for at most so long: tracing
    and compiling an encoder keeps one core busy for longer than its measurement takes."""
    command = [sys.executable, *sys.argv, "--warm"]
    started = time.perf_counter()
    workers = [
        subprocess.Popen(
            [*command, f"{i}/{options.workers}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for i in range(options.workers)
    ]
    try:
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, seconds - (time.perf_counter() - started)))
    finally:
        for worker in workers:
            # With the processes that it compiles in.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    print(f"compiled ahead for {time.perf_counter() - started:.0f} s", flush=True)


def work(todo: list[Case], options: argparse.Namespace, device: torch.device, target: str) -> None:
    """What a process of :func:`warm` does: its share of the cases, each arm once."""
    index, count = map(int, options.warm.split("/"))
    inductor.compile_threads = max(1, len(os.sched_getaffinity(0)) // count)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.9 / count)
    for case in todo[index::count]:
        # max-autotune chooses by measuring, for which the GPU must be free.
        with contextlib.suppress(Exception):
            for make in arms_of(case, peers_of(case, options.peers, False), device, target).values():
                with contextlib.suppress(Exception, OutOfTime), limited(options.arm_seconds):
                    make()()
        clear(device)


def clear(device: torch.device) -> None:
    """Forget what a case has compiled and allocated. Raises RuntimeError if it has left the GPU unusable."""
    synchronize(device)
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclasses.dataclass
class Stored:
    """The results in a file, by the name of the case; every one knows its machine by the position in ``machines``."""

    machines: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @staticmethod
    def identity(about: dict[str, Any]) -> tuple[str, ...]:
        """What must be the same for results to be comparable: the GPU's model, the commit and PyTorch."""
        return about.get("gpu", about["cpu"]).partition(",")[0], about["commit"], about["versions"]["torch"]

    @classmethod
    def read(cls, path: Path | None) -> Stored:
        if path is None or not path.exists():
            return cls([], {})
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["machines"], {result["name"]: result for result in found["results"]})

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"benchmark": "gpu", "machines": self.machines, "results": list(self.results.values())}
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)

    def join(self, about: dict[str, Any]) -> int:
        """The position of a machine, which is added if it is new."""
        if about not in self.machines:
            self.machines.append(about)
        return self.machines.index(about)

    def todo(self, wanted: list[Case], machine: int) -> list[Case]:
        """What has not been measured on such a machine; last, what took too long there."""
        same = [self.identity(about) == self.identity(self.machines[machine]) for about in self.machines]
        mine = {name: result for name, result in self.results.items() if same[result["machine"]]}
        new = [case for case in wanted if str(case) not in mine]
        return [*new, *(case for case in wanted if "skipped" in mine.get(str(case), {}))]


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


def document(stored: Stored) -> str:
    """The page: the machines, and one table for each part."""
    lines = [
        "# Measured on a GPU",
        "",
        "Made by `python benchmarks/gpu.py --tables`: milliseconds of one call (medians, arms of a case interleaved),",
        "in brackets how many times faster fuser is.",
        "",
    ]
    for about in stored.machines:
        versions = about["versions"]
        shown = f"torch {versions['torch']}, CUDA {about.get('cuda')}"
        lines.append(f"- {about.get('gpu', about['cpu'])}; {shown}, commit {about['commit']}, {about['date']}")
    for title, alone in (("Encoders", False), ("Attention alone", True)):
        results = [result for result in stored.results.values() if (result["case"]["model"] is None) == alone]
        if results:
            lines += ["", f"## {title}", "", table(results)]
    return "\n".join([*lines, ""])


def table(results: list[dict[str, Any]]) -> str:
    """Results in Markdown: milliseconds, and how many times faster fuser is than each peer."""
    order = ["fuser", *PEERS]
    names = sorted({name for result in results for name in (*result["times"], *result["missing"])}, key=order.index)
    lines = [_line(["case", *names]), _line(["---", *["---:"] * len(names)])]
    for result in results:
        cells = [_cell(result, name) for name in names]
        lines.append(_line([result["name"], *cells]))
        if "skipped" in result:
            lines[-1] = _line([f"{result['name']}: skipped, {result['skipped']}", *["–"] * len(names)])
    return "\n".join(lines)


def _cell(result: dict[str, Any], name: str) -> str:
    if name in result["times"]:
        ratio = result["speedup"].get(name)
        return f"{result['times'][name]['median_ms']:.3f}" + (f" ({ratio:.2f}×)" if ratio else "")
    why = result["missing"].get(name)
    return "–" if why is None else why[:40].replace("|", "/").replace("\n", " ")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def profile(case: Case, device: torch.device, target: str, path: Path) -> None:
    """Where the time of one case goes, by kernel, as PyTorch's profiler sees it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    try:
        with limited(60):
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
    except (Exception, OutOfTime) as error:  # the times matter more
        print(f"no profile: {type(error).__name__} {error}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["encoders", "attention"], choices=["encoders", "attention"])
    parser.add_argument("--models", nargs="+", default=["bert-base", "bert-large"], choices=list(SIZES))
    shapes = ["8x512", "1x4096", "1x128", "16x1024", "8x64", "1x512", "16x256", "8x2048", "1x64", "16x4096"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="BATCHxLENGTH of encoders")
    order = ["dense", "longformer", "strided", "window", "bigbird", "dilated", "causal", "fixed"]
    parser.add_argument("--masks", nargs="+", default=order, choices=list(masks(512)))
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16", "fp32"], choices=list(DTYPES))
    lengths = [4096, 16384, 1024, 32768, 2048, 8192]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="of attention alone")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch of attention alone")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all that suit a case; of a dry run: eager")
    parser.add_argument("--autotune", type=int, default=2, help="encoders, of the first cases, with max-autotune")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds, after which everything ends")
    parser.add_argument("--case-seconds", type=float, default=240, help="a case that takes longer is skipped")
    parser.add_argument("--arm-seconds", type=float, default=120, help="so long an arm may compile")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile the first cases ahead")
    parser.add_argument("--ahead-seconds", type=float, default=120, help="for how long they do")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--emulated", action="store_true", help="tiny sizes on the CPU's emulator: does it all run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.json; of a dry run: nowhere")
    parser.add_argument("--profile", type=Path, help="write where the time of the first case goes to this file")
    parser.add_argument("--document", type=Path, help="write the tables to this Markdown file as well")
    parser.add_argument("--tables", action="store_true", help=f"only write the stored results to docs/{DOCUMENT.name}")
    options = parser.parse_args()
    if options.emulated:
        options.models, options.shapes, options.lengths, options.tokens = ["tiny"], ["1x24"], [24], 24
        options.heads, options.head_dim, options.rounds = 2, 32, 2
    if options.peers is None:
        options.peers = ["eager"] if options.emulated else list(PEERS)
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    options.peers = tuple(options.peers)
    if options.output is None and not options.emulated:
        options.output = RESULTS / "gpu.json"
    return options


def main() -> None:
    options = parse()
    if options.tables:
        path = options.output or RESULTS / "gpu.json"
        if not path.exists():
            raise SystemExit(f"there are no results in {path}; run this on a machine with a GPU first")
        (options.document or DOCUMENT).write_text(document(Stored.read(path)), encoding="utf-8")
        return
    if not options.emulated and not torch.cuda.is_available():
        raise SystemExit("there is no usable GPU; --emulated runs everything on the CPU with tiny sizes")
    device = torch.device("cpu" if options.emulated else "cuda")
    target = "cuda:emulated" if options.emulated else "cuda"
    started = time.perf_counter()
    about = gpu(device, named_target(target))
    stored = Stored.read(options.output)
    machine = stored.join(about)
    todo = stored.todo(cases(options), machine)
    # What processes side by side measure to choose a variant by is not worth keeping.
    inductor.autotune_local_cache = False
    with torch.no_grad():
        if options.warm:
            work(todo, options, device, target)
            return
        if options.workers:
            warm(options, min(options.ahead_seconds, options.budget / 2))
        if options.profile is not None:
            profile(cases(options)[0], device, target, options.profile)
        for case in todo:
            end = min(time.perf_counter() + options.case_seconds, started + options.budget)
            if end - time.perf_counter() < LEAST_SECONDS:
                break
            print(case, flush=True)
            try:
                result = run(case, options, device, target, end)
            except OutOfTime:
                if end == started + options.budget:
                    break
                result = _skipped(case, f"it takes longer than {options.case_seconds:g} s")
            except Exception as error:  # the other cases may do better
                result = _skipped(case, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
            stored.results[str(case)] = {**result, "machine": machine}
            if options.output is not None:
                stored.write(options.output)
            clear(device)
        left = stored.todo(cases(options), machine)
        print(f"{len(left)} of {len(cases(options))} cases are left for another run")
    if options.document is not None:
        options.document.write_text(document(stored), encoding="utf-8")
    print(document(stored))


def _skipped(case: Case, why: str) -> dict[str, Any]:
    print(f"  skipped: {why}", flush=True)
    return {**_head(case), "skipped": why, "times": {}, "speedup": {}, "distance": {}, "missing": {}}


if __name__ == "__main__":
    main()
