"""Greedy decoding by ``generate`` of models of 160M parameters, fp32: tokens a second of eager PyTorch with a dynamic
and a static cache, of torch.compile (a static cache, as transformers documents it), and of ours, interleaved.

A step reads all weights once, so the floor is their bytes over the machine's bandwidth, which is measured in the same
rounds by a product of one row with as many bytes of weights.

    python benchmarks/decoding.py --cases llama gpt2 --tokens 64
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import compile_anew, save
from torch import Tensor, nn

import fuser
from fuser.runtime.device import cpu_target

PROMPT = 128
VOCABULARY = 32000


def model(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY}
    if name == "llama":
        sizes |= {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=1024))
    else:
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_layer=16, n_positions=1024))
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made.eval()


def read_bytes(network: Any) -> int:
    """Bytes of the weights that a step reads: of every parameter once, but of tables only the rows that are looked up,
    unless they are the last product's, too."""
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    tables.discard(id(network.get_output_embeddings().weight))
    return sum(p.numel() * p.element_size() for p in network.parameters() if id(p) not in tables)


class Arm:
    """Milliseconds a step: those of ``tokens`` further ones, by the difference to a call for the first alone."""

    def __init__(self, network: Any, ids: Tensor, **options: Any) -> None:
        self._network, self._ids, self._options = network, ids, options
        self.samples: list[float] = []

    def generate(self, tokens: int) -> Tensor:
        found: Tensor = self._network.generate(
            self._ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **self._options
        )
        return found

    def run(self, tokens: int) -> None:
        clock = time.perf_counter()
        self.generate(1)
        first = time.perf_counter() - clock
        clock = time.perf_counter()
        self.generate(tokens + 1)
        self.samples.append(1e3 * (time.perf_counter() - clock - first) / tokens)


def arms(name: str, ids: Tensor, compiled: bool) -> dict[str, Arm]:
    eager = model(name)
    static = {"cache_implementation": "static", "disable_compile": True}
    made = {
        "fuser": Arm(fuser.optimize(model(name)), ids),
        "fuser, static cache": Arm(fuser.optimize(model(name)), ids, **static),
        "eager": Arm(eager, ids),
        "eager, static cache": Arm(eager, ids, **static),
    }
    if compiled:
        network = model(name)
        network.forward = compile_anew(network.forward)  # type: ignore[method-assign]
        made["torch.compile, static cache"] = Arm(network, ids, **static)
    return made


def bandwidth_run(size: int) -> Callable[[], float]:
    """GB/s of a product of one row with ``size`` bytes of weights."""
    width = 4096
    weight = torch.ones(size // (4 * width), width)
    row = torch.ones(1, width)

    def run() -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(row, weight)
        return 4e-9 * weight.numel() / (time.perf_counter() - start)

    return run


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    found = arms(name, ids, not options.no_compile)
    expected = found["eager"].generate(options.tokens + 1)
    agreement = {arm: float((a.generate(options.tokens + 1) == expected).float().mean()) for arm, a in found.items()}
    size = read_bytes(model(name))
    read, bandwidths = bandwidth_run(size), []
    for turn in range(options.rounds):
        order = list(found)
        bandwidths += [read() for _ in range(3)]
        for arm in order[turn % len(order) :] + order[: turn % len(order)]:
            found[arm].run(options.tokens)
    steps = {arm: statistics.median(a.samples) for arm, a in found.items()}
    bandwidth = statistics.median(bandwidths)
    result = {
        "case": name,
        "prompt": PROMPT,
        "tokens": options.tokens,
        "weights_mb": round(size / 1e6, 1),
        "bandwidth_gb_s": round(bandwidth, 2),
        "step_ms": {arm: round(ms, 3) for arm, ms in steps.items()},
        "tokens_a_second": {arm: round(1e3 / ms, 2) for arm, ms in steps.items()},
        "of_bandwidth": round(size / 1e6 / steps["fuser"] / bandwidth, 3),
        "speedup_over": {arm: round(ms / steps["fuser"], 3) for arm, ms in steps.items() if arm != "fuser"},
        "same_tokens_as_eager": agreement,
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=["llama", "gpt2"], default=["llama", "gpt2"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/decoding.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(target.cores)
    with torch.inference_mode():
        results = [run(name, options) for name in options.cases]
    print(save("decoding", target, results, options.output))


if __name__ == "__main__":
    main()
