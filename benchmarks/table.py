"""The tables of results in README.md and docs, from benchmarks/results/*.json: text and results agree.

python benchmarks/table.py            print the tables
python benchmarks/table.py --write    put them between the markers in these files
python benchmarks/table.py --check    exit with 1 if these files have other ones
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "fuser_contiguous": "fuser, contiguous",
    "sdpa": "SDPA",
    "flex": "FlexAttention",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
"""How arms of the attention benchmark are shown, if not by their own names."""
BEGIN, END = "<!-- results: written by benchmarks/table.py -->", "<!-- end of results -->"


def tables(names: Iterable[str], folder: Path = RESULTS) -> str:
    """Tables as Markdown; says so when there are no results."""
    parts = []
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(TABLES[name](json.loads(path.read_text())))
    return "\n\n".join(parts) or "No results are stored yet: `make bench` makes them for your machine."


def encoders(report: Mapping[str, Any]) -> str:
    """Whole models: milliseconds of every arm, the speedup over the fastest other one, and the share of the floor."""
    rows, memory = [], []
    arms = _union(result["timings"] for result in report["results"] if "timings" in result)
    for result in report["results"]:
        if "memory" in result:
            memory.append(result["memory"])
            continue
        times = [_ms(result["timings"].get(arm, {}).get("median_ms")) for arm in arms]
        rows.append(
            [result["case"], *times, f"**{result['speedup_over_best']:.2f}×**", f"{result['fraction_of_floor']:.0%}"]
        )
    dtype = report.get("benchmark", "").partition("encoders_")[2] or "fp32"
    title = f"Whole encoders, {dtype}, milliseconds a call (medians, all arms interleaved in one run)"
    text = _table(title, ["model: batch × tokens", *arms, "over the fastest other", "of the floor"], rows)
    for found in memory:
        ours, eager = found["fuser"]["forward_peak_mb"], found["eager"]["forward_peak_mb"]
        text += f"\n\nPeak resident memory of {found['case']}: {ours:.0f} MB, eager {eager:.0f} MB."
    return f"{text}\n\n{_machine(report['machine'])}"


def modern(report: Mapping[str, Any]) -> str:
    """Models of today: milliseconds of every arm, and why an arm is missing."""
    arms = _union(result["timings"] for result in report["results"])
    rows, notes = [], []
    for result in report["results"]:
        times = [_ms(result["timings"].get(arm, {}).get("median_ms")) for arm in arms]
        rows.append([result["case"], *times, f"**{result['speedup_over_best']:.2f}×**"])
        notes += [f"{result['case']} without {arm}: {reason}" for arm, reason in result["missing"].items()]
    title = "Models of today, whole, random weights, milliseconds a call (medians, all arms interleaved in one run)"
    text = _table(title, ["model: batch × tokens", *arms, "over the fastest other"], rows)
    return "\n\n".join([text, *notes, _machine(report["machine"])])


def decoding(report: Mapping[str, Any]) -> str:
    """Decoding: tokens a second of every arm, and the share of the machine's bandwidth that ours reads weights at."""
    arms = _union(result["tokens_a_second"] for result in report["results"])
    rows = []
    for result in report["results"]:
        speeds = [f"{result['tokens_a_second'][arm]:.1f}" if arm in result["tokens_a_second"] else "–" for arm in arms]
        case = f"{result['case']}: {result['prompt']} + {result['tokens']}"
        over = f"**{min(result['speedup_over'].values()):.2f}×**"
        rows.append([case, *speeds, over, f"{result['of_bandwidth']:.0%}"])
    title = "Decoding by `generate`, fp32, tokens a second (medians, all arms interleaved in one run)"
    columns = ["model: prompt + new tokens", *arms, "over the fastest other", "of the bandwidth"]
    return f"{_table(title, columns, rows)}\n\n{_machine(report['machine'])}"


def pt2e(report: Mapping[str, Any]) -> str:
    """Encoders that PyTorch has quantized: milliseconds and cosine of every arm."""
    return int8(report, "Encoders that PyTorch has quantized to int8")


def int8(report: Mapping[str, Any], subject: str = "Encoders in int8") -> str:
    """Encoders in int8: milliseconds and cosine of every arm; and what becomes of a pretrained encoder's embeddings."""
    cases = [result for result in report["results"] if "timings" in result]
    arms = _union(result["timings"] for result in cases)
    rows = []
    for result in cases:
        times, cosines = result["timings"], result["cosine_to_fp32"]
        found = (f"{_ms(times[arm]['median_ms'])} ({cosines[arm]:.4f})" if arm in times else "–" for arm in arms)
        over = min(ratio for arm, ratio in result["speedup_over"].items() if not arm.startswith("fuser"))
        rows.append([result["case"], *found, f"**{over:.2f}×**"])
    title = f"{subject}, milliseconds a call (in brackets: mean cosine of hidden states to eager's)"
    parts = [_table(title, ["model: batch × tokens", *arms, "over the fastest other"], rows)] if rows else []
    for found in (result["accuracy"] for result in report["results"] if "accuracy" in result):
        scores = {name: values for name, values in found.items() if isinstance(values, Mapping)}
        kinds = _union(scores.values())
        cells = [[name, *(f"{values[kind]:.4f}" for kind in kinds)] for name, values in scores.items()]
        title = f"Embeddings of {found['sentences']} sentences by {found['model']}, against fp32"
        parts.append(_table(title, ["", *(kind.replace("_", " ") for kind in kinds)], cells))
    for found in (result["resident_mb"] for result in report["results"] if "resident_mb" in result):
        parts.append(
            f"BERT-base takes {found['eager']:.0f} MB of memory in eager PyTorch, {found['fp32']:.0f} MB in fuser's "
            f"fp32 and {found['int8']:.0f} MB in its int8 ({found['int8'] / found['fp32']:.2f}×)."
        )
    return "\n\n".join([*parts, _machine(report["machine"])])


def attention(report: Mapping[str, Any]) -> str:
    """Attention alone, by mask and length; of the settings of a peer the fastest counts in each case."""
    results = report["results"]
    best = [_best_settings(result["timings"]) for result in results]
    arms = _union(best)
    rows = [
        [
            f"{result['mask']} {result['length']}",
            *(_ms(times.get(arm)) for arm in arms),
            *([] if result["speedup_over_best"] is None else [f"**{result['speedup_over_best']:.2f}×**"]),
            f"{result['work_ratio']:.2f}",
            f"{result['fraction_of_floor']:.0%}",
        ]
        for result, times in zip(results, best, strict=True)
    ]
    shape = results[0]["shape"]
    title = (
        f"Attention alone, milliseconds a call ({shape['dtype']}, batch {shape['batch']}, {shape['heads']} heads "
        f"of {shape['dim']}; medians, interleaved)"
    )
    over = ["over the fastest other"] if any(not arm.startswith("fuser") for arm in arms) else []
    columns = ["mask, tokens", *(NAMES.get(arm, arm) for arm in arms), *over, "pairs computed / allowed"]
    return f"{_table(title, [*columns, 'of the floor'], rows)}\n\n{_machine(report['machine'])}"


def search(report: Mapping[str, Any]) -> str:
    """Searches over BERT-base by shape: what they cost, and what they found."""
    rows = []
    for result in report["results"]:
        layer, ratios = result["layer"], result["default_over_best"]
        # One program is timed once, whatever it is called.
        is_default = set(ratios) == {1.0}
        gain = f"{statistics.median(ratios):.3f}× ({min(ratios):.3f}–{max(ratios):.3f})"
        rows.append(
            [
                result["shape"],
                f"{float(result['programs']):.1e}",
                *(f"{result[kind]['seconds']:.0f}" for kind in ("cold", "warm")),
                f"{result['warm']['overhead_share']:.1%}",
                "the default is the best" if is_default else gain,
                str(layer["evaluations_until_within_2_percent"]),
                f"{layer['gap_to_exhaustive']:+.1%}",
                f"{layer['gap_to_best_seen']:+.1%}",
            ]
        )
    columns = [
        "batch × tokens",
        "programs",
        "cold, s",
        "warm, s",
        "searcher's share",
        "default / found, again (range)",
        "measured until within 2 %",
        "to the exhaustive best",
        "to the best seen",
    ]
    title = (
        "Searches over BERT-base: cost of the whole model's; default over found, each time in a fresh process; one "
        "layer's measurements, its gap to an exhaustive search over all kernels and to the best program of any search"
    )
    return f"{_table(title, columns, rows)}\n\n{_machine(report['machine'])}"


def architectures(report: Mapping[str, Any]) -> str:
    """The architectures of ``transformers``: what kernels run of each, what is left, and the time of a warm call."""
    rows = []
    for result in sorted(report["results"], key=lambda result: str(result["case"])):
        left = ", ".join(name if count == 1 else f"{count} {name}" for name, count in result["left_in_regions"].items())
        if not result["programs"]:
            left = f"the original runs: {result['fallbacks'][0]}" if result["fallbacks"] else "the original runs"
        eager = result["timings"]["eager"]["median_ms"]
        ratios = [f"{ratio:.2f}" if ratio else "" for ratio in (result["of_eager"], result.get("of_compile"))]
        rows.append([result["case"], str(result["kernels"]), _ms(eager), *ratios, left or "nothing"])
    columns = ["architecture", "kernels run", "eager, ms", "fuser / eager", "fuser / torch.compile"]
    columns.append("left to PyTorch inside the regions")
    title = "Two layers of random weights, called as users call them, one thread, medians of interleaved warm calls"
    return f"{_table(title, columns, rows)}\n\n{_machine(report['machine'])}"


def any_length(report: Mapping[str, Any]) -> str:
    """Seconds of whole passes over a corpus of all lengths, and what new lengths, memory and threads cost."""
    cases = {result["case"]: result for result in report["results"]}
    passes = [
        result for result in report["results"] if "later_seconds" in result and result["case"] != "encode in int8"
    ]
    arms = _union(result["later_seconds"] for result in passes)
    rows = []
    for result in passes:
        times = [[_ms(result[key].get(arm)) for arm in arms] for key in ("first_seconds", "later_seconds")]
        size = f"{result['sentences']} sentences" if "sentences" in result else f"{result['texts']} texts"
        rows += [
            [f"{result['case']}, {size}, {name} pass", *t] for name, t in zip(("first", "later"), times, strict=True)
        ]
    text = _table("Sentences of all lengths by MiniLM, seconds a pass", ["corpus", *arms], rows)
    if found := cases.get("encode in int8"):
        times = found["later_seconds"]
        others = [seconds for arm, seconds in times.items() if not arm.startswith("fuser")]
        rows = [
            [arm, _ms(times[arm]), *(f"{cosine:.4f}" for cosine in found["cosines"][arm])]
            for arm in sorted(times, key=times.__getitem__)
        ]
        title = (
            f"The same by `encode` of sentence-transformers in int8, {found['texts']} texts, tokenizer included: "
            f"{min(others) / times['fuser int8']:.2f}× the speed of the fastest other"
        )
        text += "\n\n" + _table(title, ["arm", "seconds", "mean cosine to PyTorch", "least"], rows)
        text += f"\n\n{found['cpu']}, commit {found['commit']}." if "cpu" in found else ""
    if found := cases.get("new lengths"):
        text += (
            f"\n\nA new length of BERT with {found['layers']} layers costs {found['extra_ms']:.3g} ms beyond its run."
        )
    if found := cases.get("plans"):
        times = ", ".join(f"{name} {ms:.2g}" for name, ms in found["ms"].items())
        text += f"\n\nPlanning a length never seen, {found['from']} to {found['to']} tokens, milliseconds: {times}."
    if found := cases.get("memory"):
        text += f"\n\nResident memory grows by {found['growth']:.1%} from the 50th to the {found['shapes']}th shape"
        text += f" ({found['cpu']}, commit {found['commit']})." if "cpu" in found else "."
    if found := cases.get("threads"):
        text += (
            f"\n\n{found['callers']} threads with random lengths: {found['several']:.0f} calls a second, "
            f"{found['several_one_at_a_time']:.0f} with `concurrency=1`; one thread: {found['one']:.0f}; "
            f"{len(found['errors'])} errors."
        )
    return f"{text}\n\n{_machine(report['machine'])}"


def efficient(report: Mapping[str, Any]) -> str:
    """Mechanisms of efficient attention: milliseconds of every arm, and what many tokens need."""
    measured = [result for result in report["results"] if "times" in result]
    arms = _union(result["times"] for result in measured)
    rows = [
        [
            result["mechanism"],
            str(result["tokens"]),
            *(_ms(result["times"].get(arm, {}).get("median_ms")) for arm in arms),
            *(f"{result['faster_than'][arm]:.2f}×" for arm in ("eager", "compile")),
        ]
        for result in measured
    ]
    header = ["mechanism", "tokens", *arms, "over eager", "over torch.compile"]
    title = "One module, fp32, milliseconds a call (“softmax” and “local”: exact attention by our own kernels)"
    text = _table(title, header, rows)
    faster = [result for result in report["results"] if "faster_from" in result]
    if faster:
        exact = _union(result["faster_from"] for result in faster)
        rows = [
            [result["mechanism"], *(_since(result["faster_from"].get(other, "–")) for other in exact)]
            for result in faster
        ]
        text += "\n\n" + _table("Tokens from which a mechanism is faster than exact attention", ["", *exact], rows)
    for result in report["results"]:
        if "peak_gb" in result:
            text += (
                f"\n\n{result['mechanism']} on {result['tokens']:,} tokens: {result['seconds']:.1f} s, "
                f"{result['peak_gb']:.2f} GB at the most."
            )
    return f"{text}\n\n{_machine(report['machine'])}"


def efficient_models(report: Mapping[str, Any]) -> str:
    """Vision models with efficient attention: milliseconds of every arm."""
    arms = _union(result["times"] for result in report["results"])
    rows = [
        [
            result["model"],
            *(_ms(result["times"][arm]["median_ms"]) for arm in arms),
            *(f"{result['faster_than'][arm]:.2f}×" for arm in ("eager", "compile")),
        ]
        for result in report["results"]
    ]
    title = "Whole models, one image of 224 × 224, fp32, milliseconds a call (medians, all arms interleaved in one run)"
    return (
        f"{_table(title, ['model', *arms, 'over eager', 'over torch.compile'], rows)}\n\n{_machine(report['machine'])}"
    )


def _since(tokens: int | str | None) -> str:
    return "slower" if tokens is None else str(tokens)


def packed(report: Mapping[str, Any]) -> str:
    """Attention over documents side by side: milliseconds of every arm."""
    arms = _union(result["timings"] for result in report["results"])
    rows = [
        [f"{result['mask']}, {result['case']}", *(_ms(result["timings"][arm]["median_ms"]) for arm in arms)]
        for result in report["results"]
    ]
    title = "Attention over packed documents, milliseconds a call (fp32, 12 heads of 64)"
    return f"{_table(title, ['mask, documents', *arms], rows)}\n\n{_machine(report['machine'])}"


def _best_settings(timings: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of ``flex32``, ``flex64``, ``sdpa``, ``sdpa_causal``, … as the least of ``flex``, ``sdpa``, …"""
    best: dict[str, float] = {}
    for arm, timing in timings.items():
        peer = arm if arm in NAMES else re.split(r"\d|_", arm)[0]
        best[peer] = min(best.get(peer, math.inf), timing["median_ms"])
    return best


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Machine: {machine['cpu']} ({machine['arch']}), {machine['threads']} threads, "
        f"{machine['peak_gflops_a_core']:.0f} Gflop/s a core measured. "
        f"{versions}; {machine['date'][:10]}, commit {machine['commit'][:9]}."
    )


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for mapping in mappings:
        found.update(dict.fromkeys(mapping))
    return list(found)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


TABLES = {
    "encoders": encoders,
    "encoders_bf16": encoders,
    "modern": modern,
    "decoding": decoding,
    "any_length": any_length,
    "int8": int8,
    "int8_avx2": int8,
    "pt2e": pt2e,
    "attention": attention,
    "packed": packed,
    "search": search,
    "architectures": architectures,
    "efficient": efficient,
    "efficient_models": efficient_models,
}
FILES = {
    "README.md": (
        *("encoders", "encoders_bf16", "int8", "int8_avx2", "pt2e"),
        *("modern", "decoding", "any_length", "attention", "packed", "search"),
    ),
    "docs/models.md": ("architectures",),
    "docs/efficient-attention.md": ("efficient", "efficient_models"),
}
"""Which tables stand in which file."""


def replaced(text: str, made: str) -> str:
    """``text`` with ``made`` between the markers. Raises ValueError when they are not there."""
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"the file lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for name, names in FILES.items():
        made, path = tables(names), ROOT / name
        if not options.write and not options.check:
            print(made)
            continue
        old = path.read_text(encoding="utf-8")
        new = replaced(old, made)
        if options.check and new != old:
            raise SystemExit(f"{name} does not show the stored results: run `python benchmarks/table.py --write`")
        if options.write:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
