"""Models of today at full size with random weights: against eager PyTorch, torch.compile and OpenVINO, fp32, in one
interleaved run. What a peer does not take, or computes otherwise, is told instead. Of sparse models eager is Hugging
Face's own attention.

    python benchmarks/modern.py --cases modernbert-base:1x512 t5-base-encoder:1x512
    python benchmarks/modern.py --cases modernbert-base:1x8192 --rounds 3
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
from harness import as_record, compile_anew, interleave, ratios, reason, save
from torch import Tensor, nn

import fuser
from fuser.runtime.device import cpu_target

NAMES = ("modernbert-base", "llama-160m", "longformer-base", "t5-base-encoder")
CASES = (
    "modernbert-base:1x512",
    "modernbert-base:1x2048",
    "llama-160m:1x512",
    "t5-base-encoder:1x512",
    "longformer-base:1x4096",
)


def model(name: str) -> nn.Module:
    """One of ``NAMES``."""
    import transformers

    torch.manual_seed(0)
    if name == "modernbert-base":
        made = transformers.ModernBertModel(transformers.ModernBertConfig())
    elif name == "llama-160m":
        # The hidden states of a prefill: a language model would multiply its last one alone by the vocabulary.
        made = decoding.model("llama").model
    elif name == "longformer-base":
        made = transformers.LongformerModel(transformers.LongformerConfig(max_position_embeddings=4098))
    elif name == "t5-base-encoder":
        sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
        made = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    else:
        raise SystemExit(f"there is no model {name}; take one of {', '.join(NAMES)}")
    return made.eval()


def compiled_arm(network: nn.Module, ids: Tensor) -> Callable[[], Any]:
    compiled = compile_anew(network)
    return lambda: compiled(ids)[0]


def exported_arm(network: nn.Module, ids: Tensor) -> Callable[[], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, ids, path)
        return openvino_arm(path, ids, torch.get_num_threads())


PEERS = {"torch.compile": compiled_arm, "OpenVINO": exported_arm}


def error_of(call: Callable[[], Any], reference: Tensor) -> float:
    """Its relative L2 distance."""
    return float((torch.as_tensor(call()) - reference).norm() / reference.norm())


def run(case: str, peers: list[str], rounds: int) -> dict[str, Any]:
    name, batch, length = parse(case)
    network, ids = model(name), tokens(batch, length)
    reference = network(ids)[0]
    start = time.perf_counter()
    fast = fuser.optimize(copy.deepcopy(network), (ids,))
    seconds = time.perf_counter() - start
    arms: dict[str, Callable[[], Any]] = {"fuser": lambda: fast(ids)[0], "eager": lambda: network(ids)[0]}
    errors = {arm: error_of(call, reference) for arm, call in arms.items()}
    if errors["fuser"] > AGREEMENT["fp32"]:
        raise SystemExit(f"{case}: fuser does not compute the same: {errors}")
    missing = {}
    for peer in peers:
        try:
            call = PEERS[peer](network, ids)
            errors[peer] = error_of(call, reference)
        except Exception as error:  # whatever a peer says against a model
            missing[peer] = reason(error)
            continue
        if errors[peer] > AGREEMENT["fp32"]:
            missing[peer] = f"it does not compute the same: its relative error is {errors[peer]:.3g}"
        else:
            arms[peer] = call
    timings = interleave(arms, rounds, warmup=1, lead=0.05)
    compared = ratios(timings, "fuser")
    print(f"{case}: " + ", ".join(f"{k} {t.median_ms:.1f}" for k, t in timings.items()))
    print(f"  faster than the best other arm: {min(compared.values()):.2f}x; without {missing}", flush=True)
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
    parser.add_argument("--cases", nargs="*", default=CASES, help=f"model:batch x tokens; of {', '.join(NAMES)}")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
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
            results.append(run(case, options.peers, options.rounds))
            # What is measured is not lost if a later case fails.
            path = save("modern", target, results, options.output)
            print(path)


if __name__ == "__main__":
    main()
