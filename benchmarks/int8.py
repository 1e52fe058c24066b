"""Encoders in int8: fuser against fp32, ONNX Runtime's dynamic quantization and OpenVINO with NNCF, interleaved; and
what int8 does to the embeddings of a pretrained encoder.

NNCF is no dependency: without it (`pip install nncf`) OpenVINO runs in fp32 alone. Threads are the same for all.

    python benchmarks/int8.py --cases bert-base:1x128 minilm:32x64
    python benchmarks/int8.py --cases --sentences 1000
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from encoders import export_onnx, floor_ms, model, onnxruntime_arm, openvino_arm, parse, tokens
from harness import as_record, interleave, ratios, save
from torch import Tensor, nn

import fuser
from fuser import demo
from fuser.kernels.gemm import multiplies_bf16
from fuser.runtime.device import cpu_target

CALIBRATION = 16
"""Inputs that NNCF and fuser calibrate on."""
NEAREST = 10


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def quantized_by_onnxruntime(path: Path) -> Path:
    """Dynamically, as ``export_dynamic_quantized_onnx_model`` of sentence-transformers does."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = path.with_name("int8.onnx")
    quantize_dynamic(str(path), str(small), weight_type=QuantType.QInt8, per_channel=True)
    return small


def quantized_by_nncf(path: Path, samples: Sequence[Any]) -> Path:
    """On samples of inputs, as ``export_static_quantized_openvino_model`` of sentence-transformers does."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(str(path))
    small = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    saved = path.with_name("int8.xml")
    ov.save_model(small, str(saved))
    return saved


def openvino_int8(path: Path, ids: Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """Around the products in fp32, and, where the CPU multiplies it, in bf16, as is its default there."""
    samples = [
        torch.randint(0, 30000, ids.shape, generator=torch.Generator().manual_seed(i)) for i in range(CALIBRATION)
    ]
    saved = quantized_by_nncf(path, [sample.numpy() for sample in samples])
    arms = {"OpenVINO int8 (NNCF)": openvino_arm(saved, ids, threads)}
    if multiplies_bf16(cpu_target()):
        arms["OpenVINO int8 (NNCF), bf16"] = openvino_arm(saved, ids, threads, "bf16")
    return arms


def run(case: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    name, batch, length = parse(case)
    encoder, ids = model(name), tokens(batch, length)
    reference = encoder(ids)[0]
    calls = [tokens(2, length)[:, : length // (1 + i % 2)] for i in range(2)]
    fast = fuser.optimize(model(name), (ids,))
    start = time.perf_counter()
    quantized = fuser.optimize(model(name), (ids,), quantize=fuser.Int8(calibrate=calls))
    seconds = time.perf_counter() - start
    both = fuser.optimize(model(name), (ids,), quantize=[fuser.Int8(calibrate=calls), fuser.Int8Attention()])
    arms: dict[str, Callable[[], Any]] = {
        "fuser int8": lambda: quantized(ids)[0],
        "fuser int8, attention too": lambda: both(ids)[0],
        "fuser fp32": lambda: fast(ids)[0],
        "eager fp32": lambda: encoder(ids)[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model(name), ids, path)
        arms["ONNX Runtime int8"] = onnxruntime_arm(quantized_by_onnxruntime(path), ids, options.threads)
        arms["OpenVINO fp32"] = openvino_arm(path, ids, options.threads)
        try:
            arms |= openvino_int8(path, ids, options.threads)
        except ImportError as error:
            print(f"  OpenVINO int8 is left out: {error}")
        cosines = {arm: cosine(torch.as_tensor(call()), reference) for arm, call in arms.items()}
        timings = interleave(arms, options.rounds, warmup=3)
    compared = ratios(timings, "fuser int8")
    floor = floor_ms(encoder, batch, length, peak)
    print(f"{case}: floor {floor:.1f} ms, " + ", ".join(f"{k} {t.median_ms:.1f}" for k, t in timings.items()))
    print("  cosine " + ", ".join(f"{k} {c:.6f}" for k, c in cosines.items()), flush=True)
    return {
        "case": case,
        "int8_floor_ms": round(floor, 3),
        "fraction_of_floor": round(floor / timings["fuser int8"].median_ms, 3),
        "timings": as_record(timings),
        "speedup_over": compared,
        "cosine_to_fp32": {k: round(c, 6) for k, c in cosines.items()},
        "optimize_seconds": round(seconds, 2),
        "layers": quantized.report().count(": int8"),
        "constants_bytes": {"int8": quantized.snapshot().memory.constants, "fp32": fast.snapshot().memory.constants},
    }


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def accuracy(count: int) -> dict[str, Any]:
    """Embeddings of a pretrained encoder in int8 against fp32, by how they lie to each other."""
    encoder = demo.load_encoder(demo.model_folder())
    sentences = demo.read_sentences(demo.TEXT)[:count]
    batches = demo.make_batches(encoder, sentences, 32)
    inputs = [
        {"input_ids": b.input_ids[:8], "attention_mask": b.attention_mask[:8]}
        for b in batches[:: max(len(batches) // 4, 1)]
    ]
    exact = demo.embed(encoder, demo.encode_with(encoder.model), batches)
    found: dict[str, Any] = {"sentences": len(sentences), "model": demo.MODEL_PACKAGE}
    for name, quantize in (
        ("int8", fuser.Int8(calibrate=inputs, quality=0, smooth=False)),
        ("int8 smoothed", fuser.Int8(calibrate=inputs)),
    ):
        fast = fuser.optimize(demo.load_encoder(demo.model_folder()).model, quantize=quantize)
        got = demo.embed(encoder, demo.encode_with(fast), batches)
        alike, alike_exact = (e @ e.mT - 2 * torch.eye(len(e)) for e in (got, exact))
        upper = torch.triu_indices(len(exact), len(exact), 1)
        pairs = torch.stack([ranks(a[upper[0], upper[1]]) for a in (alike, alike_exact)])
        near, near_exact = (a.topk(NEAREST).indices for a in (alike, alike_exact))
        recall = (near[:, :, None] == near_exact[:, None]).any(-1).double().mean()
        cosines = (got * exact).sum(-1)
        found[name] = {
            "mean_cosine": round(float(cosines.mean()), 6),
            "min_cosine": round(float(cosines.min()), 6),
            "spearman_of_pairs": round(float(torch.corrcoef(pairs)[0, 1]), 6),
            f"recall_of_{NEAREST}_nearest": round(float(recall), 4),
        }
        print(f"{name}: {found[name]}", flush=True)
    return found


_RESIDENT = """
import ctypes, gc, sys, torch, fuser
from transformers import BertConfig, BertModel
size, how = sys.argv[1:]
tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 100}
model = BertModel(BertConfig(**tiny if size == "tiny" else {}), add_pooling_layer=False).eval()
quantize = fuser.Int8(quality=0) if how == "int8" else None
run = model if how == "eager" else fuser.optimize(model, search="model", quantize=quantize)
with torch.inference_mode():
    for _ in range(3):
        run(torch.ones(1, 128, dtype=torch.int64))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
print(next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Rss:")))
"""


def resident() -> dict[str, float]:
    """MB that BERT-base takes in memory, beyond what a process with a tiny model does, after calls of 128 tokens."""

    def kib(*given: str) -> int:
        return int(subprocess.run([sys.executable, "-c", _RESIDENT, *given], capture_output=True, check=True).stdout)

    return {how: round((kib("base", how) - kib("tiny", how)) * 1024 / 1e6, 1) for how in ("eager", "fp32", "int8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["bert-base:1x16", "bert-base:1x128", "bert-base:1x512", "bert-base:8x128", "minilm:1x16", "minilm:32x64"]
    parser.add_argument("--cases", nargs="*", default=cases)
    parser.add_argument("--sentences", type=int, default=500, help="of the demo's text; 0: none")
    parser.add_argument("--no-memory", action="store_true", help="do not measure resident memory")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/int8.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    target = cpu_target(recalibrate=True)
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    peak = target.rate(torch.int8) * options.threads
    with torch.no_grad():
        results = [run(case, options, peak) for case in options.cases]
        if options.sentences:
            results.append({"accuracy": accuracy(options.sentences)})
    if not options.no_memory:
        results.append({"resident_mb": resident()})
    results.append({"nncf": _version("nncf")})
    print(save("int8", target, results, options.output))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
