"""Models of today at full size with random weights: against eager PyTorch, torch.compile and OpenVINO (where it takes
them), fp32, in one interleaved run. Of sparse models eager is Hugging Face's own attention.

    python benchmarks/modern.py --cases modernbert-base:1x512 t5-base-encoder:1x512
    python benchmarks/modern.py --cases longformer-base:1x4096 --peers --rounds 3
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoding
import torch
from encoders import AGREEMENT, export_onnx, openvino_arm, parse, tokens
from harness import as_record, interleave, ratios, save
from torch import nn

import fuser
from fuser.runtime.device import cpu_target


def model(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if name == "modernbert-base":
        made: nn.Module = transformers.ModernBertModel(transformers.ModernBertConfig())
    elif name == "llama-160m":
        # What a prefill computes of all tokens; the cache is filled.
        made = decoding.model("llama").model  # type: ignore[assignment]
    elif name == "longformer-base":
        made = transformers.LongformerModel(transformers.LongformerConfig(max_position_embeddings=4098))
    else:
        sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
        made = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    return made.eval()


NAMES = ("modernbert-base", "llama-160m", "longformer-base", "t5-base-encoder")


def openvino_of(network: nn.Module, ids: torch.Tensor, threads: int) -> Callable[[], Any] | str:
    """The arm, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(network, ids, path)
            return openvino_arm(path, ids, threads)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"


def run(case: str, options: argparse.Namespace) -> dict[str, Any]:
    name, batch, length = parse(case)
    network, ids = model(name), tokens(batch, length)
    reference = network(ids)[0]
    start = time.perf_counter()
    fast = fuser.optimize(copy.deepcopy(network), (ids,))
    seconds = time.perf_counter() - start
    arms: dict[str, Callable[[], Any]] = {"fuser": lambda: fast(ids)[0], "eager": lambda: network(ids)[0]}
    missing = {}
    if "compile" in options.peers:
        compiled = torch.compile(network)
        arms["torch.compile"] = lambda: compiled(ids)[0]
    if "openvino" in options.peers:
        found = openvino_of(network, ids, torch.get_num_threads())
        if isinstance(found, str):
            missing["OpenVINO"] = found
        else:
            arms["OpenVINO"] = found
    errors = {}
    for arm, call in arms.items():
        out = torch.as_tensor(call())
        errors[arm] = float((out - reference).norm() / reference.norm())
    wrong = [arm for arm, error in errors.items() if error > AGREEMENT]
    if "fuser" in wrong:
        raise SystemExit(f"{case}: fuser does not compute the same: {errors}")
    for arm in wrong:
        missing[arm] = f"it does not compute the same: its relative error is {errors[arm]:.3g}"
        del arms[arm]
    timings = interleave(arms, options.rounds, warmup=1, lead=0.05)
    compared = ratios(timings, "fuser")
    print(f"{case}: " + ", ".join(f"{k} {t.median_ms:.1f}" for k, t in timings.items()))
    print(f"  faster than: {compared}; without {missing}", flush=True)
    return {
        "case": case,
        "timings": as_record(timings),
        "speedup_over": compared,
        "speedup_over_best": min(compared.values()),
        "relative_error_to_eager": {k: float(f"{v:.3g}") for k, v in errors.items()},
        "missing": missing,
        "unfused": len(fast.unfused),
        "fallbacks": list(fast.fallbacks),
        "optimize_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["modernbert-base:1x512", "modernbert-base:1x2048", "llama-160m:1x512", "t5-base-encoder:1x512"]
    parser.add_argument("--cases", nargs="*", default=[*cases, "longformer-base:1x4096"], help=f"of {', '.join(NAMES)}")
    parser.add_argument("--peers", nargs="*", choices=["compile", "openvino"], default=["compile", "openvino"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/modern.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(options.threads or target.cores)
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in options.cases:
            results.append(run(case, options))
            # What is measured is not lost if a later case fails.
            path = save("modern", target, results, options.output)
    print(path)


if __name__ == "__main__":
    main()
