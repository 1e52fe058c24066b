"""The tables of results are what the stored results say, and the README shows them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return load_script("table")


MACHINE = {"cpu": "Some CPU", "arch": "avx512", "threads": 2, "peak_gflops_a_core": 99.6, "commit": "abcdef0123456"}
MACHINE |= {"versions": {"torch": "2.13.0"}, "date": "2026-01-02T03:04:05"}

ENCODERS: dict[str, Any] = {
    "machine": MACHINE,
    "results": [
        {
            "case": "bert-base:1x128",
            "timings": {"fuser": {"median_ms": 50.04}, "eager": {"median_ms": 123.4}},
            "speedup_over_best": 1.256,
            "fraction_of_floor": 0.876,
        },
        {"case": "minilm:1x7", "timings": {"fuser": {"median_ms": 2}}, "speedup_over_best": 2, "fraction_of_floor": 1},
        {"memory": {"case": "bert-base:1x128", "eager": {"forward_peak_mb": 900}, "fuser": {"forward_peak_mb": 700.4}}},
    ],
}
ATTENTION: dict[str, Any] = {
    "machine": MACHINE,
    "results": [
        {
            "mask": "strided",
            "length": 1024,
            "shape": {"dtype": "fp32", "batch": 1, "heads": 12, "dim": 64},
            "timings": {arm: {"median_ms": ms} for arm, ms in (("fuser", 1.23), ("flex32", 9.5), ("flex64", 7.5))},
            "speedup_over_best": 6.1,
            "work_ratio": 1.5,
            "fraction_of_floor": 0.5,
        },
        {
            "mask": "dense",
            "length": 1024,
            "shape": {"dtype": "fp32", "batch": 1, "heads": 12, "dim": 64},
            "timings": {arm: {"median_ms": ms} for arm, ms in (("fuser", 2), ("sdpa", 4), ("onnxruntime_mha", 3))},
            "speedup_over_best": 1.5,
            "work_ratio": 1,
            "fraction_of_floor": 0.75,
        },
    ],
}


def test_encoders(table: ModuleType) -> None:
    lines = table.encoders(ENCODERS).splitlines()
    assert "| model: batch × tokens | fuser | eager | over the fastest other | of the floor |" in lines
    assert "| bert-base:1x128 | 50 | 123 | **1.26×** | 88% |" in lines
    assert "| minilm:1x7 | 2 | – | **2.00×** | 100% |" in lines
    assert "Peak resident memory of bert-base:1x128: 700 MB, eager 900 MB." in lines
    assert "Machine: Some CPU (avx512), 2 threads, 100 Gflop/s a core measured." in lines[-1]


def test_attention(table: ModuleType) -> None:
    lines = table.attention(ATTENTION).splitlines()
    assert lines[2] == (
        "| mask, tokens | fuser | FlexAttention | SDPA | ONNX Runtime | over the fastest other | "
        "pairs computed / allowed | of the floor |"
    )
    assert "| strided 1024 | 1.23 | 7.5 | – | – | **6.10×** | 1.50 | 50% |" in lines
    assert "| dense 1024 | 2 | – | 4 | 3 | **1.50×** | 1.00 | 75% |" in lines
    assert "Machine: Some CPU (avx512), 2 threads, 100 Gflop/s a core measured." in lines[-1]


def test_modern(table: ModuleType) -> None:
    whole = {"fuser": {"median_ms": 50.04}, "eager": {"median_ms": 123.4}, "OpenVINO": {"median_ms": 75.0}}
    part = {"fuser": {"median_ms": 2.0}, "eager": {"median_ms": 4.0}}
    results = [
        {"case": "llama:1x512", "timings": whole, "speedup_over_best": 1.499, "missing": {}},
        {"case": "t5:1x7", "timings": part, "speedup_over_best": 2, "missing": {"OpenVINO": "it does not convert"}},
    ]
    lines = table.modern({"machine": MACHINE, "results": results}).splitlines()
    assert "| llama:1x512 | 50 | 123 | 75 | **1.50×** |" in lines and "| t5:1x7 | 2 | 4 | – | **2.00×** |" in lines
    assert "t5:1x7 without OpenVINO: it does not convert" in lines


def test_int8(table: ModuleType) -> None:
    arms = {
        "fuser int8": (10.04, 0.99976),
        "fuser int8, attention too": (9.5, 0.9997),
        "ONNX Runtime int8": (12.0, 0.9994),
    }
    case = {
        "case": "bert-base:1x128",
        "timings": {arm: {"median_ms": ms} for arm, (ms, _) in arms.items()},
        "cosine_to_fp32": {arm: cosine for arm, (_, cosine) in arms.items()},
        "speedup_over": {"fuser int8, attention too": 0.95, "ONNX Runtime int8": 1.195},
    }
    accuracy = {"sentences": 200, "model": "minilm", "smoothed": {"mean_cosine": 0.99956, "recall_of_10_nearest": 0.98}}
    lines = table.int8({"machine": MACHINE, "results": [case, {"accuracy": accuracy}, {"nncf": None}]}).splitlines()
    assert "| bert-base:1x128 | 10 (0.9998) | 9.5 (0.9997) | 12 (0.9994) | **1.20×** |" in lines
    assert "**Embeddings of 200 sentences by minilm, against fp32**" in lines
    assert "|  | mean cosine | recall of 10 nearest |" in lines and "| smoothed | 0.9996 | 0.9800 |" in lines
    assert "Machine: Some CPU (avx512), 2 threads, 100 Gflop/s a core measured." in lines[-1]


SEARCH: dict[str, Any] = {
    "machine": MACHINE,
    "results": [
        {
            "shape": "8x128",
            "programs": "125108160",
            "cold": {"seconds": 120.4, "overhead_share": 0.01},
            "warm": {"seconds": 31.6, "overhead_share": 0.0123},
            "default_over_best": [1.02, 0.998, 1.01],
            "layer": {
                "evaluations_until_within_2_percent": 22,
                "gap_to_exhaustive": -0.0042,
                "gap_to_best_seen": 0.0111,
            },
        }
    ],
}


def test_search(table: ModuleType) -> None:
    lines = table.search(SEARCH).splitlines()
    assert "| 8x128 | 1.3e+08 | 120 | 32 | 1.2% | 1.010× (0.998–1.020) | 22 | -0.4% | +1.1% |" in lines
    same = {**SEARCH, "results": [{**SEARCH["results"][0], "default_over_best": [1.0, 1.0]}]}
    assert "| 1.2% | the default is the best | 22 |" in table.search(same)
    assert "Machine: Some CPU (avx512), 2 threads, 100 Gflop/s a core measured." in lines[-1]


ARCHITECTURES: dict[str, Any] = {
    "machine": MACHINE,
    "results": [
        {
            "case": "llama",
            "timings": {"eager": {"median_ms": 8.44}},
            "of_eager": 0.7512,
            "of_compile": 0.824,
            "kernels": 20,
            "programs": 1,
            "fallbacks": [],
            "left_in_regions": {"cat": 4, "rsqrt": 1},
        },
        {
            "case": "bert",
            "timings": {"eager": {"median_ms": 5.0}},
            "of_eager": 0.6,
            "kernels": 10,
            "programs": 1,
            "fallbacks": [],
            "left_in_regions": {},
        },
        {
            "case": "longformer",
            "timings": {"eager": {"median_ms": 5.0}},
            "of_eager": 1.0,
            "kernels": 0,
            "programs": 0,
            "fallbacks": ["it depends on values"],
            "left_in_regions": {},
        },
    ],
}


def test_architectures(table: ModuleType) -> None:
    lines = table.architectures(ARCHITECTURES).splitlines()
    assert lines[4:7] == [
        "| bert | 10 | 5 | 0.60 |  | nothing |",
        "| llama | 20 | 8.44 | 0.75 | 0.82 | 4 cat, rsqrt |",
        "| longformer | 0 | 5 | 1.00 |  | the original runs: it depends on values |",
    ]


def test_efficient_attention(table: ModuleType) -> None:
    times = {"fuser": {"median_ms": 2}, "eager": {"median_ms": 4}, "compile": {"median_ms": 3}}
    found = {"times": times, "faster_than": {"eager": 2, "compile": 1.5}}
    modules = [{"mechanism": "eva", "tokens": 784, **found}]
    modules += [{"mechanism": "eva", "faster_from": {"softmax": 500, "local": None}}]
    made = table.efficient({"machine": MACHINE, "results": modules})
    assert "| eva | 784 | 2 | 4 | 3 | 2.00× | 1.50× |" in made and "| eva | 500 | slower |" in made
    models = [{"model": "DeiT", **found}]
    assert "| DeiT | 2 | 4 | 3 | 2.00× | 1.50× |" in table.efficient_models({"machine": MACHINE, "results": models})


def test_all_files_of_a_folder(table: ModuleType, tmp_path: Path) -> None:
    names = ("encoders", "attention")
    assert "No results" in table.tables(names, tmp_path)
    (tmp_path / "encoders.json").write_text(json.dumps(ENCODERS))
    (tmp_path / "attention.json").write_text(json.dumps(ATTENTION))
    made = table.tables(names, tmp_path)
    assert made.index("bert-base:1x128") < made.index("strided 1024")


def test_only_what_is_between_the_markers_changes(table: ModuleType) -> None:
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.replaced(text, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        table.replaced("no markers", "new")


@pytest.mark.parametrize("name", ["README.md", "docs/models.md", "docs/efficient-attention.md"])
def test_files_show_the_stored_results(table: ModuleType, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert table.replaced(text, table.tables(table.FILES[name])) == text, "run `python benchmarks/table.py --write`"
