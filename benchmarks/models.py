"""Current models at several lengths against eager PyTorch, torch.compile and OpenVINO, fp32, in one interleaved run.

Random weights. Where a case says so, a model has fewer layers, in the proportion of local to global ones that it has.
Longformer is compared with Hugging Face's own code alone, as called for classification: its first token is global.

    python benchmarks/models.py --cases modernbert-base:512 t5-base-encoder:512
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoders import AGREEMENT, openvino_arm
from harness import as_record, interleave, ratios, save
from torch import Tensor, nn

import fuser
from fuser.runtime.device import cpu_target

CASES = (
    *("modernbert-base:512", "modernbert-base:2048/6", "modernbert-base:8192/3"),
    *("llama-160m:512", "t5-base-encoder:512", "longformer-base:4096/4"),
)
PEERS = ("compile", "openvino")


def modernbert(layers: int, length: int) -> nn.Module:
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(ModernBertConfig(num_hidden_layers=layers or 22, reference_compile=False))


def llama(layers: int, length: int) -> nn.Module:
    """Prefill: hidden states of a prompt, without a cache."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "use_cache": False}
    return LlamaModel(LlamaConfig(num_hidden_layers=layers or 12, **sizes))


def t5(layers: int, length: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "use_cache": False}
    return T5EncoderModel(T5Config(num_layers=layers or 12, **sizes))


def longformer(layers: int, length: int) -> nn.Module:
    from transformers import LongformerConfig, LongformerModel

    sizes = {"max_position_embeddings": length + 2, "attention_window": 512, "pad_token_id": 1}
    return LongformerModel(LongformerConfig(num_hidden_layers=layers or 12, **sizes), add_pooling_layer=False)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "modernbert-base": modernbert,
    "llama-160m": llama,
    "t5-base-encoder": t5,
    "longformer-base": longformer,
}


class Hidden(nn.Module):
    """A model as a function from token ids to hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids)[0]
        return hidden


def parse(case: str) -> tuple[str, int, int]:
    """NAME:TOKENS, or NAME:TOKENS/LAYERS; 0 layers for all of them."""
    name, _, shape = case.partition(":")
    length, _, layers = shape.partition("/")
    return name, int(length), int(layers or 0)


def run(case: str, options: argparse.Namespace) -> dict[str, Any]:
    name, length, layers = parse(case)
    torch.manual_seed(0)
    model = MODELS[name](layers, length).eval()
    ids = torch.randint(5, 30000, (1, length), generator=torch.Generator().manual_seed(1))
    more = {}
    if name == "longformer-base":
        more["global_attention_mask"] = torch.zeros_like(ids).index_fill_(1, torch.tensor([0]), 1)
    call = {"input_ids": ids, **more}
    start = time.perf_counter()
    fast = fuser.optimize(model)
    fast(**call)
    seconds = time.perf_counter() - start
    arms: dict[str, Callable[[], Any]] = {"fuser": lambda: fast(**call)[0], "eager": lambda: model(**call)[0]}
    if "compile" in options.peers and not more:
        compiled = torch.compile(Hidden(model))
        arms["torch.compile"] = lambda: compiled(ids)
    with tempfile.TemporaryDirectory() as folder:
        if "openvino" in options.peers and not more:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(Hidden(model), (ids,), str(path), dynamo=True, external_data=True, verbose=False)
            arms["OpenVINO"] = openvino_arm(path, ids, options.threads)
        outputs = {arm: torch.as_tensor(made()) for arm, made in arms.items()}
        reference = outputs["eager"]
        errors = {
            arm: float((torch.as_tensor(run()) - reference).norm() / reference.norm()) for arm, run in arms.items()
        }
        wrong = [arm for arm, error in errors.items() if error > AGREEMENT]
        if wrong:
            raise SystemExit(f"{case}: {', '.join(wrong)} does not compute the same: {errors}")
        timings = interleave(arms, options.rounds, warmup=1)
    compared = ratios(timings, "fuser")
    print(f"{case}: " + ", ".join(f"{k} {t.median_ms:.1f}" for k, t in timings.items()), flush=True)
    print(f"  faster than the best other arm: {min(compared.values()):.2f}x", flush=True)
    return {
        "case": f"{name}:1x{length}" + (f", {layers} layers" if layers else ""),
        "timings": as_record(timings),
        "speedup_over": compared,
        "speedup_over_best": min(compared.values()),
        "relative_error_to_eager": {k: float(f"{v:.3g}") for k, v in errors.items()},
        "optimize_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/models.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("fuser").setLevel(logging.ERROR)
    target = cpu_target()
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        results = [run(case, options) for case in options.cases]
    print(save("models", target, results, options.output))


if __name__ == "__main__":
    main()
