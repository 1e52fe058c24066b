"""Whole encoders against eager PyTorch, torch.compile, ONNX Runtime and OpenVINO, fp32, in one interleaved run; or in
bf16, which ONNX Runtime has not on CPUs, and which OpenVINO makes of the model in fp32.

The floor is the arithmetic of the GEMMs and of attention over the measured FMA peak of all cores.

    python benchmarks/encoders.py --cases bert-base:1x128 bert-base:1x512 minilm:1x128
    python benchmarks/encoders.py --memory bert-base:1x512
    python benchmarks/encoders.py --dtype bf16 --memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import as_record, compile_anew, interleave, ratios, save
from torch import Tensor, nn

import fuser
from fuser.runtime.device import cpu_target

SIZES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative L2 distance from eager fp32 at which an arm counts as computing the same."""


def model(name: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES[name]), add_pooling_layer=False).eval()


def parse(case: str) -> tuple[str, int, int]:
    name, shape = case.split(":")
    batch, length = shape.split("x")
    return name, int(batch), int(length)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 30000, (batch, length), generator=torch.Generator().manual_seed(1))


class Hidden(nn.Module):
    """The encoder as a function from token ids to hidden states, for exporters."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids)[0]
        return hidden


def onnxruntime_arm(path: Path, ids: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: ids.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_arm(path: Path, ids: Tensor, threads: int, precision: str = "f32") -> Callable[[], Any]:
    """``precision`` is what it computes in where the model says fp32; its own default is bf16 where the CPU has it."""
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", hints)
    request, value = compiled.create_infer_request(), ids.numpy()
    return lambda: request.infer([value])[0]


def export_onnx(encoder: nn.Module, ids: Tensor, path: Path) -> None:
    torch.onnx.export(Hidden(encoder), (ids,), str(path), dynamo=True, external_data=True, verbose=False)


def optimized_onnx(path: Path, hidden: int, heads: int) -> Path | None:
    """ONNX Runtime's own transformer fusions applied offline, where its tool manages."""
    try:
        from onnxruntime.transformers import optimizer

        fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=heads, hidden_size=hidden)
        target = path.with_name("fused.onnx")
        fused.save_model_to_file(str(target), use_external_data_format=True)
    except Exception as error:
        print(f"  ONNX Runtime's transformer optimizer: {error}")
        return None
    return target


def floor_ms(encoder: nn.Module, batch: int, length: int, peak: float) -> float:
    """Milliseconds of multiply-adds alone at the measured peak."""
    config: Any = encoder.config
    rows, width, inner = batch * length, config.hidden_size, config.intermediate_size
    layer = 2.0 * rows * (4 * width * width + 2 * width * inner) + 4.0 * batch * length * length * width
    return 1e3 * config.num_hidden_layers * layer / peak


def run(case: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    name, batch, length = parse(case)
    dtype, narrow = DTYPES[options.dtype], options.dtype != "fp32"
    encoder, ids = model(name).to(dtype), tokens(batch, length)
    reference = model(name)(ids)[0]
    start = time.perf_counter()
    fast = fuser.optimize(model(name).to(dtype), (ids,))
    seconds = time.perf_counter() - start
    arms: dict[str, Callable[[], Any]] = {"fuser": lambda: fast(ids)[0], "eager": lambda: encoder(ids)[0]}
    if "compile" in options.peers:
        compiled = compile_anew(model(name).to(dtype))
        arms["torch.compile"] = lambda: compiled(ids)[0]
    if "max-autotune" in options.peers:
        tuned = torch.compile(model(name).to(dtype), mode="max-autotune")
        arms["torch.compile max-autotune"] = lambda: tuned(ids)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if {"onnxruntime", "openvino"} & set(options.peers):
            export_onnx(model(name), ids, path)
        if "onnxruntime" in options.peers and not narrow:
            arms["ONNX Runtime"] = onnxruntime_arm(path, ids, options.threads)
            fused = optimized_onnx(path, encoder.config.hidden_size, encoder.config.num_attention_heads)
            if fused is not None:
                arms["ONNX Runtime + transformer fusions"] = onnxruntime_arm(fused, ids, options.threads)
        if "openvino" in options.peers:
            arms["OpenVINO"] = openvino_arm(path, ids, options.threads, "bf16" if narrow else "f32")
        errors = {}
        for arm, call in arms.items():
            out = torch.as_tensor(call()).float()
            errors[arm] = float((out - reference).norm() / reference.norm())
        wrong = [arm for arm, error in errors.items() if error > AGREEMENT[options.dtype]]
        if wrong:
            raise SystemExit(f"{case}: {', '.join(wrong)} does not compute the same: {errors}")
        timings = interleave(arms, options.rounds, warmup=3)
    compared = ratios(timings, "fuser")
    floor = floor_ms(encoder, batch, length, peak)
    result = {
        "case": case,
        "floor_ms": round(floor, 3),
        "fraction_of_floor": round(floor / timings["fuser"].median_ms, 3),
        "timings": as_record(timings),
        "speedup_over": compared,
        "speedup_over_best": min(compared.values()),
        "relative_error_to_eager": {k: float(f"{v:.3g}") for k, v in errors.items()},
        "optimize_seconds": round(seconds, 2),
        "stages": {k: round(v, 3) for k, v in fast.programs[-1].seconds.items()},
    }
    print(f"{case}: floor {floor:.1f} ms, " + ", ".join(f"{k} {t.median_ms:.1f}" for k, t in timings.items()))
    print(f"  faster than the best other arm: {result['speedup_over_best']:.2f}x", flush=True)
    return result


def memory(case: str, arm: str) -> None:
    """Print the peak resident memory of this process after loading a model and a few forward passes."""
    import resource

    name, batch, length = parse(case)
    encoder, ids = model(name), tokens(batch, length)
    if arm == "fuser":
        encoder = fuser.optimize(encoder, (ids,))
    # What loading and compiling needed is not what serving needs: start the high-water mark anew.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        encoder(ids)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"forward_peak_mb": round(peak / 1024, 1), "process_peak_mb": round(whole / 1024, 1)}))


def measure_memory(case: str) -> dict[str, Any]:
    """Peak resident memory of a forward pass, each arm in a process of its own."""
    found: dict[str, Any] = {"case": case}
    for arm in ("eager", "fuser"):
        command = [sys.executable, __file__, "--memory-arm", arm, case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[arm] = json.loads(output.strip().splitlines()[-1])
    print(f"{case}: peak resident memory of a forward pass {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["bert-base:1x128", "bert-base:1x512", "minilm:1x128"])
    peers = ["compile", "max-autotune", "onnxruntime", "openvino"]
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--memory", nargs="*", default=["bert-base:1x128", "bert-base:1x512"])
    parser.add_argument("--memory-arm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/encoders[_DTYPE].json")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.memory_arm:
        with torch.no_grad():
            memory(options.memory_arm[1], options.memory_arm[0])
        return
    target = cpu_target(recalibrate=True)
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        peak = target.rate(DTYPES[options.dtype]) * options.threads
        results = [run(case, options, peak) for case in options.cases]
    results += [{"memory": measure_memory(case)} for case in options.memory]
    name = "encoders" if options.dtype == "fp32" else f"encoders_{options.dtype}"
    print(save(name, target, results, options.output))


if __name__ == "__main__":
    main()
