"""Attention alone: `fuser.sparse_attention` against SDPA, FlexAttention, ONNX Runtime and OpenVINO, all interleaved.

Every peer gets what suits it best: SDPA ``is_causal`` where it says all, FlexAttention the rule of the mask (equal to
it element by element), contiguous inputs and each block size, ONNX Runtime and OpenVINO the mask as a constant of an
exported model, ONNX Runtime its own fused operator too. Our arm ``fuser`` reads tensors laid out as a model's
projections leave them, which of the others only SDPA does; ``fuser_contiguous`` reads what they read. Every arm must
agree with float64 before it is timed. The floor is the multiply-adds of the allowed pairs over the measured peak, or
the bytes of all tensors over the measured bandwidth where that is more. "decode" is one query row over all keys.

    python benchmarks/attention.py
    python benchmarks/attention.py --masks longformer strided --lengths 1024 --peers sdpa flex --flex 64 128
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import as_record, compile_anew, interleave, ratios, save
from torch import Tensor, nn
from torch.nn import functional as F

import fuser
from fuser.ir.target import Target
from fuser.kernels.planner import plan
from fuser.runtime.device import cpu_target

MASKS: dict[str, fuser.masks.Mask] = {
    "dense": fuser.masks.Dense(),
    "causal": fuser.masks.Causal(),
    "window": fuser.masks.SlidingWindow(128, 128),
    "dilated": fuser.masks.Dilated(64, 4),
    "longformer": fuser.masks.Longformer(128, 16),
    "bigbird": fuser.masks.BigBird(64, 3, 2, 3, seed=0),
    "strided": fuser.masks.Strided(),
    "fixed": fuser.masks.Fixed(),
    "decode": fuser.masks.Dense(),
}
WITHOUT_MASK = frozenset({"dense", "decode"})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative L2 distance from attention in float64 at which an arm counts as computing the same."""
PEERS = ("sdpa", "flex", "onnxruntime", "openvino")
ONLY_FP32 = frozenset({"onnxruntime", "openvino"})

Arm = Callable[[], Any]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def queries(name: str, length: int) -> int:
    """Rows of q in a case of ``length`` keys."""
    return 1 if name == "decode" else length


def rule(name: str, length: int) -> Rule:
    """The mask as FlexAttention's ``mask_mod``, in the fewest operations."""
    step = int(length**0.5)
    blocks = MASKS["bigbird"].dense(length)[::64, ::64].contiguous() if name == "bigbird" else torch.empty(0)
    rules: dict[str, Rule] = {
        "causal": lambda b, h, i, j: j <= i,
        "window": lambda b, h, i, j: (i - j).abs() <= 128,
        "dilated": lambda b, h, i, j: ((i - j).abs() <= 256) & ((i - j) % 4 == 0),
        "longformer": lambda b, h, i, j: ((i - j).abs() <= 128) | (i < 16) | (j < 16),
        "bigbird": lambda b, h, i, j: blocks[i // 64, j // 64],
        "strided": lambda b, h, i, j: (j <= i) & (((i - j) % step == 0) | (i - j < step)),
        "fixed": lambda b, h, i, j: (j <= i) & ((j % step == step - 1) | (i // step == j // step)),
    }
    return rules[name]


class Attention(nn.Module):
    """SDPA with its mask as a constant, for exporters."""

    def __init__(self, mask: Tensor | None, causal: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)


def flex_arms(name: str, q: Tensor, k: Tensor, v: Tensor, blocks: list[int]) -> dict[str, Arm]:
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

    compiled = compile_anew(flex_attention)
    if name in WITHOUT_MASK:
        return {"flex": lambda: compiled(q, k, v)}
    length, mod = k.shape[2], rule(name, k.shape[2])
    if not torch.equal(create_mask(mod, None, None, length, length, device="cpu")[0, 0], MASKS[name].dense(length)):
        raise SystemExit(f"{name} {length}: FlexAttention's rule is another mask")

    def arm(block: int) -> Arm:
        tiles = create_block_mask(mod, None, None, length, length, device="cpu", BLOCK_SIZE=block)
        return lambda: compiled(q, k, v, block_mask=tiles)

    return {f"flex{block}": arm(block) for block in blocks}


def onnxruntime_arms(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, threads: int) -> dict[str, Arm]:
    """The exported model, and ONNX Runtime's own operator for attention with the mask added to the scores."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL

    def arm(model: bytes, inputs: list[Tensor], heads: int | None) -> Arm:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        if heads is None:
            return lambda: session.run(None, feed)[0]
        return lambda: torch.from_numpy(session.run(None, feed)[0]).unflatten(2, (heads, -1)).transpose(1, 2)

    exported = io.BytesIO()
    program = torch.onnx.export(module, (q, k, v), dynamo=True, verbose=False)
    assert program is not None
    program.save(exported)
    flat = [t.transpose(1, 2).flatten(2).contiguous() for t in (q, k, v)]
    return {
        "onnxruntime": arm(exported.getvalue(), [q, k, v], None),
        "onnxruntime_mha": arm(multi_head_attention(module, q, k), flat, q.shape[1]),
    }


def multi_head_attention(module: nn.Module, q: Tensor, k: Tensor) -> bytes:
    """An ONNX model of one ``com.microsoft.MultiHeadAttention``."""
    from onnx import TensorProto, helper, numpy_helper

    batch, heads, length, dim = q.shape
    shapes = {name: [batch, t.shape[2], heads * dim] for name, t in (("q", q), ("k", k), ("v", k), ("out", q))}
    attributes: dict[str, int] = {"num_heads": heads, "unidirectional": int(module.causal)}
    inputs, constants = ["q", "k", "v"], []
    if module.mask is not None:
        inputs += ["", "", "bias"]
        added = torch.zeros(length, length).masked_fill(~module.mask, torch.finfo(torch.float32).min)
        constants.append(numpy_helper.from_array(added[None, None].numpy(), "bias"))
    node = helper.make_node("MultiHeadAttention", inputs, ["out"], domain="com.microsoft", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "attention", values[:3], values[3:], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def openvino_arm(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, threads: int) -> Arm:
    import openvino as ov

    model = ov.convert_model(module, example_input=(q, k, v), input=[list(t.shape) for t in (q, k, v)])
    # Its default on CPUs with bf16 instructions is bf16, which is another answer.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    values = [t.numpy() for t in (q, k, v)]
    return lambda: request.infer(values, share_inputs=True)[0]


def arms_of(name: str, length: int, options: argparse.Namespace) -> tuple[dict[str, Arm], Tensor]:
    """All arms, and what they should give: (B, H, S, D) in float64."""
    mask, dtype = MASKS[name], DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    # The layout of a model's projections: heads inside tokens.
    tokens = [
        torch.randn(options.batch, rows, options.heads, options.dim, generator=generator).to(dtype).transpose(1, 2)
        for rows in (queries(name, length), length, length)
    ]
    q, k, v = (t.contiguous() for t in tokens)
    dense = None if name in WITHOUT_MASK else mask.dense(length)
    module = Attention(None if name == "causal" else dense, name == "causal").eval()
    arms: dict[str, Arm] = {
        "fuser": lambda: fuser.sparse_attention(*tokens, mask),
        "fuser_contiguous": lambda: fuser.sparse_attention(q, k, v, mask),
    }
    if "sdpa" in options.peers:
        arms["sdpa"] = lambda: F.scaled_dot_product_attention(*tokens, dense)
        if name == "causal":
            arms["sdpa_causal"] = lambda: module(*tokens)
    if "flex" in options.peers:
        arms |= flex_arms(name, q, k, v, options.flex)
    if "onnxruntime" in options.peers:
        arms |= onnxruntime_arms(module, q, k, v, options.threads)
    if "openvino" in options.peers:
        arms["openvino"] = openvino_arm(module, q, k, v, options.threads)
    by_head = [
        F.scaled_dot_product_attention(*(t[:, h : h + 1].double() for t in (q, k, v)), dense)
        for h in range(options.heads)
    ]
    return arms, torch.cat(by_head, dim=1)


def check(case: str, arms: Mapping[str, Arm], expected: Tensor, tolerance: float) -> dict[str, float]:
    """Relative L2 distances from ``expected``; exits if an arm is further away than ``tolerance``."""
    errors = {}
    for arm, run in arms.items():
        errors[arm] = float((torch.as_tensor(run()).double() - expected).norm() / expected.norm())
    wrong = {arm: error for arm, error in errors.items() if not error <= tolerance}
    if wrong:
        raise SystemExit(f"{case}: does not compute the same: {wrong}")
    return {arm: float(f"{error:.3g}") for arm, error in errors.items()}


def measure(name: str, length: int, target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """One case: milliseconds of all arms, ratios, and the share of the floor."""
    arms, expected = arms_of(name, length, options)
    errors = check(f"{name} {length}", arms, expected, AGREEMENT[options.dtype])
    mask, rows = MASKS[name], queries(name, length)
    timings = interleave(arms, options.rounds)
    heads = options.heads * options.batch
    flops = 4 * options.dim * mask.count(rows, length) * heads
    moved = 2 * (rows + length) * options.dim * heads * DTYPES[options.dtype].itemsize
    floor_ms = 1e3 * max(flops / (target.peak_flops * options.threads), moved / target.bandwidth)
    peers = {arm: t for arm, t in timings.items() if not arm.startswith("fuser")}
    speedups, contiguous = (ratios(peers | {arm: timings[arm]}, arm) for arm in ("fuser", "fuser_contiguous"))
    result = {
        "mask": name,
        "length": length,
        "shape": {"batch": options.batch, "heads": options.heads, "dim": options.dim, "dtype": options.dtype},
        "density": round(mask.density(rows, length), 5),
        "work_ratio": round(plan(mask, rows, length).work_ratio, 4),
        "floor_ms": round(floor_ms, 4),
        "fraction_of_floor": round(floor_ms / timings["fuser"].median_ms, 3),
        "timings": as_record(timings),
        "speedup_over": speedups,
        "speedup_over_best": min(speedups.values(), default=None),
        "speedup_over_best_contiguous": min(contiguous.values(), default=None),
        "relative_error_to_float64": errors,
    }
    times = ", ".join(f"{arm} {t.median_ms:.3g}" for arm, t in timings.items())
    print(f"{name} {length}: floor {floor_ms:.3g} ms, {times}")
    if speedups:
        print(f"  faster than the best other arm: {min(speedups.values()):.2f}x", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=[*MASKS], default=[*MASKS])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--flex", type=int, nargs="+", default=[32, 64, 128], help="block sizes of FlexAttention")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 leaves out ONNX Runtime and OpenVINO")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/attention.json")
    options = parser.parse_args()
    if options.dtype != "fp32":
        options.peers = [peer for peer in options.peers if peer not in ONLY_FP32]
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    target = cpu_target(recalibrate=True)
    torch.set_num_threads(options.threads)
    results = []
    with torch.inference_mode():
        for name in options.masks:
            for length in options.lengths:
                results.append(measure(name, length, target, options))
                gc.collect()
    print(save("attention", target, results, options.output))


if __name__ == "__main__":
    main()
