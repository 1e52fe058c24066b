"""Exact attention over long sequences: time and peak memory against length, each case in a process of its own.

Sparse masks run by their plan at up to 262,144 tokens; dense attention over 65,536 is streamed by CQS under a memory
budget. Peak memory is the process's resident high-water mark above what it holds before the call: everything that the
call takes beside q, k and v, planning and the output included. Some rows are compared with float64 afterwards.

    python benchmarks/long_sequences.py
    python benchmarks/long_sequences.py --masks strided --lengths 65536 --heads 2 --dense
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, save

import fuser
from fuser.runtime.device import cpu_target

MASKS: dict[str, fuser.masks.Mask] = {
    "strided": fuser.masks.Strided(),
    "longformer": fuser.masks.Longformer(256, 64),
    "dense": fuser.masks.Dense(),
}
ROWS = 24
"""Rows of the first and last head that are computed again in float64."""
AGREEMENT = 2e-6
"""Largest relative L2 distance of these rows from float64."""


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def rows_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, mask: fuser.masks.Mask) -> float:
    """Relative L2 distance of some rows from attention in float64."""
    length, dim = q.shape[2:]
    rows = torch.linspace(0, length - 1, ROWS).long()
    allowed = torch.cat([mask.rows(row, row + 1, length) for row in rows.tolist()])
    found, exact = [], []
    for head in {0, q.shape[1] - 1}:
        scores = q[0, head, rows].double() @ k[0, head].double().T / dim**0.5
        exact.append(torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ v[0, head].double())
        found.append(out[0, head, rows].double())
    expected = torch.stack(exact)
    return float((torch.stack(found) - expected).norm() / expected.norm())


def measure(name: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One case in this process."""
    torch.set_num_threads(options.threads)
    mask = MASKS[name]
    heads = options.dense_heads if name == "dense" else options.heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, options.dim, generator=generator) for _ in range(3))
    budget = options.budget if name == "dense" else None

    def attend(*operands: torch.Tensor) -> torch.Tensor:
        if budget is None:
            out = fuser.sparse_attention(*operands, mask)
            assert isinstance(out, torch.Tensor)
            return out
        return fuser.cqs.attention(*operands, options.workers, budget, mask)

    # What a process loads and builds once is not counted.
    attend(*(t[:, :, :512].contiguous() for t in (q, k, v)))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = resident("VmRSS"), time.perf_counter()
    out = attend(q, k, v)
    first, peak = time.perf_counter() - start, resident("VmHWM") - before
    start = time.perf_counter()
    again = attend(q, k, v)
    seconds = time.perf_counter() - start
    pairs = mask.count(length) * heads
    result = {
        "mask": name,
        "length": length,
        "heads": heads,
        "dim": options.dim,
        "first_call_seconds": round(first, 3),
        "seconds": round(seconds, 3),
        "fraction_of_floor": round(4 * options.dim * pairs / (cpu_target().peak_flops * options.threads) / seconds, 3),
        "peak_extra_bytes": peak,
        "output_bytes": out.nbytes,
        "inputs_bytes": q.nbytes + k.nbytes + v.nbytes,
        "scores_bytes": 4 * heads * length**2,
        "relative_error_of_rows": float(f"{rows_error(q, k, v, again, mask):.3g}"),
    }
    if budget is not None:
        how = fuser.cqs.streaming(q, k, v, budget, options.workers, mask)
        result |= {"budget": budget, "budget_bytes": fuser.cqs.parse_bytes(budget), "workers": how.partition.workers}
    return result


def run(name: str, length: int, arguments: list[str]) -> dict[str, Any]:
    """One case in a process of its own, checked."""
    command = [sys.executable, __file__, "--case", name, str(length), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {length} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if not found["relative_error_of_rows"] <= AGREEMENT:
        raise SystemExit(f"{name} {length}: differs from float64 by {found['relative_error_of_rows']}")
    if "budget_bytes" in found and found["peak_extra_bytes"] - found["output_bytes"] > found["budget_bytes"]:
        raise SystemExit(f"{name} {length}: took {found['peak_extra_bytes']} bytes, above {found['budget']}")
    peak, output = found["peak_extra_bytes"] / 2**20, found["output_bytes"] / 2**20
    print(
        f"{name} {length}: {found['seconds']:.2f} s ({found['fraction_of_floor']:.0%} of the floor), "
        f"{peak:.0f} MiB above q, k and v, of which the output {output:.0f}",
        flush=True,
    )
    return found


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Peak memory and time against length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds = figure.subplots(1, 2)
    for name in dict.fromkeys(r["mask"] for r in results):
        cases = sorted((r for r in results if r["mask"] == name), key=lambda r: r["length"])
        lengths = [r["length"] for r in cases]
        label = f"{name}, {cases[0]['heads']} heads of {cases[0]['dim']}"
        (line,) = memory.plot(lengths, [r["peak_extra_bytes"] / 2**20 for r in cases], marker="o", label=label)
        scores = [r["scores_bytes"] / 2**20 for r in cases]
        memory.plot(lengths, scores, linestyle=":", marker=".", color=line.get_color(), label=f"{name}: all scores")
        seconds.plot(lengths, [r["seconds"] for r in cases], marker="o", color=line.get_color(), label=label)
    for axes, label in ((memory, "peak memory beside q, k and v, MiB"), (seconds, "time of a call, s")):
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="*", choices=["strided", "longformer"], default=["strided", "longformer"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[65536, 131072, 262144])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dense", nargs="*", type=int, default=[65536], help="lengths of dense attention")
    parser.add_argument("--dense-heads", type=int, default=1)
    parser.add_argument("--budget", default="1GiB", help="memory that dense attention may take beside its output")
    parser.add_argument("--workers", type=int, default=7, help="workers that dense attention is divided among")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the other cases of the stored results")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_sequences.json")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        with torch.inference_mode():
            print(json.dumps(measure(options.case[0], int(options.case[1]), options)))
        return
    torch.set_num_threads(options.threads)
    passed = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _PASSED]
    cases = [(name, length) for name in options.masks for length in options.lengths]
    cases += [("dense", length) for length in options.dense]
    results = json.loads(options.output.read_text(encoding="utf-8"))["results"] if options.keep else []
    for name, length in cases:
        results = [r for r in results if (r["mask"], r["length"]) != (name, length)]
        results.append(run(name, length, passed))
        print(save("long_sequences", cpu_target(), results, options.output), flush=True)
        plot(results, options.output.with_suffix(".png"))


_PASSED = ("heads", "dim", "dense_heads", "budget", "workers", "threads")

if __name__ == "__main__":
    main()
