"""What benchmarks share: interleaved timing, agreement of the arms, and results with the machine they were made on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fuser.ir.target import Target
from fuser.runtime.cpuinfo import cpu_name

RESULTS = Path(__file__).parent / "results"
_SETTLE_SECONDS = 0.05
_LEAD_SECONDS = 0.15
_LEADS = 20
"""Of a call of so many leads the start is no matter."""
_PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "numpy", "sparse-fuser")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quartiles around it."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def interleave(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    *,
    settle: float = _SETTLE_SECONDS,
    lead: float = _LEAD_SECONDS,
) -> dict[str, Timing]:
    """Time every arm ``rounds`` times in turn, so that a change of the machine's speed meets them all.

    Before an arm's turn the threads of the one before get ``settle`` seconds to stop spinning. Then its calls are not
    counted until ``lead`` seconds have passed in which clock and caches settle, but for one that takes many times as
    long, and the order changes from round to round, so that no arm pays for its neighbour.
    """
    for run in arms.values():
        for _ in range(warmup):
            run()
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        names = list(arms)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(settle)
            ready = time.perf_counter() + lead
            while True:
                start = time.perf_counter()
                arms[name]()
                seconds = time.perf_counter() - start
                if start >= ready or seconds >= _LEADS * lead:
                    break
            samples[name].append(1e3 * seconds)
    return {name: _timing(s) for name, s in samples.items()}


def _timing(samples: list[float]) -> Timing:
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return Timing(statistics.median(samples), quartiles[0], quartiles[2], len(samples))


def compile_anew(network: Any, **options: Any) -> Any:
    """``network`` by torch.compile, which forgets what it has compiled before: of one function it compiles a few
    programs only, and runs it as it is from then on."""
    torch.compiler.reset()
    return torch.compile(network, **options)


def reason(error: Exception) -> str:
    """Why an arm is missing, for results: the error's kind and the first line of what it says."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # colours of a terminal
    return f"{type(error).__name__}: {said}".partition("\n")[0][:200]


def machine(target: Target) -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu_name(),
        "arch": target.arch,
        "features": sorted(target.features),
        "threads": torch.get_num_threads(),
        "peak_gflops_a_core": round(target.peak_flops / 1e9, 1),
        "bandwidth_gb_s": round(target.bandwidth / 1e9, 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def save(name: str, target: Target, results: list[dict[str, Any]], path: Path | None = None) -> Path:
    """Write results with their machine to ``benchmarks/results/NAME.json`` (or ``path``)."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": machine(target), "results": results}, indent=1) + "\n")
    return path


def as_record(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """Timings as plain values."""
    return {name: {k: round(v, 4) for k, v in asdict(t).items()} for name, t in timings.items()}


def ratios(timings: Mapping[str, Timing], ours: str) -> dict[str, float]:
    """How many times faster ``ours`` is than each other arm, by medians."""
    mine = timings[ours].median_ms
    return {name: round(t.median_ms / mine, 3) for name, t in timings.items() if name != ours}
