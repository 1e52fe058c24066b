"""Encoders that PyTorch has quantized for x86 CPUs: fuser against eager and ``torch.compile``, and against fuser's own
int8, all interleaved.

torchao's PT2E, which ``torch.compile`` lowers to oneDNN's int8 where it freezes weights, has activations with the scale
that calibration found (static), or one of each call (dynamic); the older ``torch.ao.quantization.quantize_dynamic``
packs linear layers and finds one of each call, of seven bits (packed). All are of whole tensors. torchao's
``Int8DynamicActivationInt8WeightConfig`` finds one of each row, symmetric (rows) or with a zero point (shifted rows).

    python benchmarks/pt2e.py
    python benchmarks/pt2e.py --cases bert-base:8x128 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from encoders import model, parse, tokens
from harness import as_record, interleave, ratios, save
from int8 import cosine
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
from torchao.quantization.quant_primitives import MappingType

import fuser
from fuser.runtime.device import cpu_target

CALLS = 4
"""Of calibration."""
WAYS = ("static", "dynamic", "packed", "rows", "shifted rows")


class Hidden(nn.Module):
    """An encoder that returns its hidden states alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(ids)[0]
        return hidden


def quantized(encoder: nn.Module, ids: Tensor, how: str) -> nn.Module:
    """As PyTorch's tutorials do it."""
    made: nn.Module
    if how == "packed":
        made = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
        return made
    if "rows" in how:
        kind = MappingType.SYMMETRIC if how == "rows" else MappingType.ASYMMETRIC
        made = copy.deepcopy(encoder)
        quantize_(made, Int8DynamicActivationInt8WeightConfig(act_mapping_type=kind, set_inductor_config=False))
        return made
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    dynamic = how == "dynamic"
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    prepared = prepare_pt2e(torch.export.export(encoder, (ids,), strict=False).module(), quantizer)
    for i in range(CALLS):
        prepared(torch.randint(0, 30000, ids.shape, generator=torch.Generator().manual_seed(i)))
    made = convert_pt2e(prepared)
    return made


def run(case: str, how: str, options: argparse.Namespace) -> dict[str, Any]:
    name, batch, length = parse(case)
    encoder, ids = Hidden(model(name)).eval(), tokens(batch, length)
    converted = quantized(encoder, ids, how)
    fast = fuser.optimize(converted, (ids,))
    own = fuser.optimize(encoder, (ids,), quantize=fuser.Int8(quality=0))
    lowered = torch.compile(converted)
    arms: dict[str, Callable[[], Tensor]] = {
        "fuser": lambda: fast(ids),
        "fuser.Int8() of the fp32 model": lambda: own(ids),
        "eager": lambda: converted(ids),
        "torch.compile": lambda: lowered(ids),
    }
    reference = encoder(ids)
    cosines = {arm: cosine(call(), reference) for arm, call in arms.items()}
    timings = interleave(arms, options.rounds, warmup=2)
    title = f"{case}, {how}"
    print(f"{title}: " + ", ".join(f"{k} {t.median_ms:.1f} ({cosines[k]:.6f})" for k, t in timings.items()), flush=True)
    return {
        "case": title,
        "timings": as_record(timings),
        "speedup_over": ratios(timings, "fuser"),
        "cosine_to_fp32": {k: round(c, 6) for k, c in cosines.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["bert-base:1x128", "bert-base:8x128", "minilm:32x64"])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/pt2e.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    target = cpu_target(recalibrate=True)
    options.threads = options.threads or target.cores
    torch.set_num_threads(options.threads)
    inductor.freezing = True
    with torch.no_grad():
        results = [run(case, how, options) for case in options.cases for how in options.ways]
    print(save("pt2e", target, results, options.output))


if __name__ == "__main__":
    main()
