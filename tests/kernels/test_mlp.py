"""The `mlp` family against float64, run by the emulator: tails, epilogues, whole rows, types; and what it declines."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Op, binary, layer_norm, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Gemm, Norm, Pointwise, Residual
from fuser.ir.target import TF32, Isa, Target, cuda_target, emulated_target
from fuser.kernels import mlp
from fuser.kernels.base import KernelCall, KernelSpec, materialized
from fuser.kernels.families import IMPLEMENTATIONS
from fuser.kernels.mlp import CudaMlp, MlpExtents, MlpFamily, MlpParameters
from fuser.runtime import emulator
from fuser.runtime.build import build
from fuser.search.partition import kernels

FAMILY, OURS = MlpFamily(), CudaMlp()
EMULATED = emulated_target()
WITH_TF32 = dataclasses.replace(EMULATED, features=EMULATED.features | {TF32})
# One element may be off by a few roundings where eager's happens to be exact; TF32 rounds all factors to 10 bits.
FLOOR = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 2.0**-10}

UP = Operator("up", Gemm(transposed=True), ("x", "w1"), ("up",))
BIAS = Operator("bias1", Bias(), ("up", "b1"), ("biased1",))
GELU = Operator("gelu", Activation(unary(Op.GELU)), ("biased1",), ("active",))
DOWN = Operator("down", Gemm(transposed=True), ("active", "w2"), ("down",))
BIAS2 = Operator("bias2", Bias(), ("down", "b2"), ("biased2",))
ADD = Operator("add", Residual(), ("biased2", "residual"), ("total",))
NORM = Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("normal",))
SCALE = Operator("scale", Pointwise(binary(Op.MUL)), ("up", "factor"), ("active",))
PLAIN = [UP, BIAS, GELU, DOWN, BIAS2]
BLOCK = [*PLAIN, ADD, NORM]


def graph(
    chain: Sequence[Operator],
    outputs: Sequence[str],
    sizes: tuple[int, int, int] = (64, 128, 64),
    rows: tuple[int, ...] = (3, 7),
    dtype: torch.dtype = torch.float16,
) -> OperatorGraph:
    """A graph of ``chain``; ``sizes`` are columns of the input, the hidden layer and the result."""
    k, h, n = sizes
    shapes: dict[str, tuple[int, ...]] = {"x": (*rows, k), "residual": (*rows, n), "w1": (h, k), "w2": (n, h)}
    shapes |= {"b1": (h,), "b2": (n,), "gamma": (n,), "beta": (n,), "factor": (*rows, 1)}
    wide = {"up", "biased1", "active"}
    shapes |= {name: (*rows, h if name in wide else n) for op in chain for name in op.outputs}
    gemms = {op.output: op for op in chain if isinstance(op.semantics, Gemm)}
    for name, weight in (("up", "w1"), ("down", "w2")):
        if name in gemms and not gemms[name].semantics.transposed:
            shapes[weight] = shapes[weight][::-1]
    values = {name: TensorSpec.contiguous(shape, dtype) for name, shape in shapes.items()}
    constants = {v: Constant(v) for v in ("w1", "w2", "b1", "b2", "gamma", "beta")}
    return OperatorGraph(tuple(chain), values, ("x", "residual", "factor"), tuple(outputs), constants)


def inputs(of: OperatorGraph) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {v: torch.randn(of.values[v].shape, generator=g) for v in (*of.inputs, *of.constants)}
    # Scaled as in a trained layer.
    for weight in ("w1", "w2"):
        made[weight] /= max(of.values[weight].shape) ** 0.5
    return {v: t.to(of.values[v].dtype) for v, t in made.items()}


def run(call: KernelCall, of: OperatorGraph, values: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    source = render(call.spec)
    path = build([source], target, headers=header_folder(target))[source.symbol]
    results = {v: torch.full(of.values[v].shape, float("nan"), dtype=of.values[v].dtype) for v in call.outputs}
    known = {**values, **results}
    tensors = materialized(call.tensors, known)
    emulator.run(path, source.symbol, tensors, call.extents)
    return results


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((got.double() - expected).norm() / expected.norm())


def check(
    of: OperatorGraph, chain: Sequence[Operator], target: Target = EMULATED, bm: int | None = None, shift: int = 0
) -> None:
    """Run the group with blocks of ``bm`` rows; ``shift``: elements in front of the input in its memory."""
    match = FAMILY.match(of.group(chain), target)
    assert match is not None
    choices = [p for p in OURS.space(match, target) if bm in (None, p.bm)]
    values = inputs(of)
    room = torch.empty(shift + values["x"].numel(), dtype=values["x"].dtype)
    values["x"] = room[shift:].view_as(values["x"]).copy_(values["x"])
    call = OURS.call(match, choices[0], target, 4)
    assert call.outputs == of.outputs
    results = run(call, of, values, target)
    exact, eager = evaluate(match.group, values, torch.float64), evaluate(match.group, values)
    for name, got in results.items():
        bound = 2 * error(eager[name], exact[name]) + FLOOR[got.dtype]
        assert error(got, exact[name]) <= bound


@pytest.mark.parametrize(
    ("sizes", "rows", "dtype"),
    [
        ((64, 128, 64), (64,), torch.float16),
        ((70, 200, 100), (75,), torch.float16),
        ((33, 65, 17), (1,), torch.bfloat16),
        ((128, 100, 256), (2, 40), torch.bfloat16),
        ((3, 5, 2), (5,), torch.float16),
    ],
    ids=str,
)
def test_sizes(sizes: tuple[int, int, int], rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whole tiles and tails of every size; rows that do not start at multiples of 16 bytes."""
    check(graph(PLAIN, ["biased2"], sizes, rows, dtype), PLAIN)


@pytest.mark.parametrize(
    ("bm", "dtype"),
    [
        *((64, torch.bfloat16), (32, torch.float16), (16, torch.float16), (32, torch.float32)),
    ],
    ids=str,
)
def test_every_block_with_a_norm_behind(bm: int, dtype: torch.dtype) -> None:
    check(graph(BLOCK, ["normal"], (64, 96, 64), (3, 27), dtype), BLOCK, WITH_TF32, bm=bm)


def test_one_factor_a_row_in_the_hidden_layer() -> None:
    chain = [UP, SCALE, DOWN, BIAS2]
    check(graph(chain, ["biased2"], (40, 72, 50), (2, 20)), chain)


def test_rows_that_start_between_multiples_of_16_bytes() -> None:
    check(graph(PLAIN, ["biased2"]), PLAIN, shift=1)


def test_offsets_beyond_32_bits() -> None:
    """Rows of the input that lie gigabytes apart; memory that is never touched costs nothing."""
    of, stride = graph(PLAIN, ["biased2"], rows=(4,)), (1 << 30) + 8
    try:
        far = torch.empty(3 * stride + 64, dtype=torch.float16).as_strided((4, 64), (stride, 1))
    except RuntimeError:
        pytest.skip("this machine does not lend out 6 GiB of addresses")
    match = FAMILY.match(of.group(PLAIN), EMULATED)
    assert match is not None
    call, values = OURS.call(match, OURS.space(match, EMULATED)[0], EMULATED, 4), inputs(of)
    assert isinstance(call.extents, MlpExtents) and call.extents.rows == 4
    distant = dataclasses.replace(call, extents=dataclasses.replace(call.extents, x_stride=stride))
    found = run(distant, of, {**values, "x": far.copy_(values["x"])}, EMULATED)
    assert torch.equal(found["biased2"], run(call, of, values, EMULATED)["biased2"])


def test_several_outputs_and_no_activation() -> None:
    straight = [UP, dataclasses.replace(DOWN, inputs=("up", "w2")), BIAS2, ADD, NORM]
    check(graph(straight, ["total", "normal"]), straight)


def test_tf32_where_it_is_allowed() -> None:
    of = graph(BLOCK, ["normal"], (40, 72, 50), dtype=torch.float32)
    assert FAMILY.match(of.group(BLOCK), EMULATED) is None
    check(of, BLOCK, WITH_TF32)
    check(graph(PLAIN, ["biased2"], (33, 65, 17), (5,), torch.float32), PLAIN, WITH_TF32)


def test_weights_stored_the_other_way() -> None:
    chain = [
        dataclasses.replace(op, semantics=Gemm(transposed=False)) if isinstance(op.semantics, Gemm) else op
        for op in PLAIN
    ]
    check(graph(chain, ["biased2"], rows=(64,)), chain)


def test_no_rows() -> None:
    of = graph(PLAIN, ["biased2"], rows=(0,))
    match = FAMILY.match(of.group(PLAIN), EMULATED)
    assert match is not None
    call = OURS.call(match, OURS.space(match, EMULATED)[0], EMULATED, 4)
    assert run(call, of, inputs(of), EMULATED)["biased2"].shape == (0, 64)


def test_declines_what_it_cannot_run() -> None:
    cpu = Target("cpu", Isa.PORTABLE.value, frozenset(), 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 1e-6)
    of = graph(BLOCK, ["normal"])
    assert FAMILY.match(of.group(BLOCK), EMULATED) is not None
    # Nobody runs it on CPUs.
    assert (FAMILY, "cuda") in IMPLEMENTATIONS and (FAMILY, "cpu") not in IMPLEMENTATIONS
    assert not list(kernels(of.group(BLOCK), IMPLEMENTATIONS, cpu))
    # One product; a hidden layer that something else reads; rows too wide for a block.
    assert FAMILY.match(of.group([UP, BIAS, GELU]), EMULATED) is None
    seen = graph(BLOCK, ["active", "normal"])
    assert FAMILY.match(seen.group(BLOCK), EMULATED) is None
    wide = graph(BLOCK, ["normal"], (64, 128, 1024))
    assert FAMILY.match(wide.group(BLOCK), EMULATED) is None
    # Two products side by side, and a norm between two.
    side = [UP, dataclasses.replace(DOWN, inputs=("x", "w2")), BIAS2]
    assert FAMILY.match(graph(side, ["up", "biased2"]).group(side), EMULATED) is None
    inner = Operator("inner", Norm(layer_norm(1e-5, weight=False, bias=False)), ("up",), ("active",))
    between = [UP, inner, DOWN]
    assert FAMILY.match(graph(between, ["down"]).group(between), EMULATED) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_choices_fit_and_cost_something(arch: str) -> None:
    target = cuda_target(arch)
    for sizes in ((384, 1536, 384), (256, 1024, 256), (128, 512, 128)):
        of = graph(BLOCK, ["normal"], sizes, (8, 512))
        match = FAMILY.match(of.group(BLOCK), target)
        assert match is not None
        for choice in OURS.space(match, target):
            assert choice.shared_bytes <= target.shared_bytes
            seconds = OURS.cost(match, choice, target).seconds(target)
            assert 2.0 * 8 * 512 * 2 * sizes[0] * sizes[1] / (target.tensor_flops * target.cores) < seconds < 1e-2


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator's checking mode needs g++")
@pytest.mark.parametrize(
    ("chain", "sizes", "dtype", "bm"),
    [
        (BLOCK, (40, 100, 50), torch.float16, 16),
        (BLOCK, (40, 60, 50), torch.bfloat16, 64),
        (PLAIN, (40, 150, 50), torch.float32, 32),
        (PLAIN, (33, 65, 17), torch.float32, 16),
    ],
    ids=["f16", "bf16", "tf32", "tails"],
)
def test_no_race_and_no_access_out_of_bounds(
    chain: list[Operator],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    bm: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSER_EMULATOR_CHECKED", "1")
    check(graph(chain, [chain[-1].output], sizes, (19,), dtype), chain, WITH_TF32, bm=bm)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_registers_spill(arch: str, compile_cuda: object) -> None:
    target = cuda_target(arch)
    of = graph(BLOCK, ["normal"], (384, 1536, 384), (8, 512))
    match = FAMILY.match(of.group(BLOCK), target)
    assert match is not None and callable(compile_cuda)
    best = min(OURS.space(match, target), key=lambda p: OURS.cost(match, p, target).seconds(target))
    assert isinstance(best, MlpParameters) and best.sums <= mlp._MAX_SUMS
    for kernel in compile_cuda(KernelSpec("mlp", "cuda/mlp.cu.j2", best), arch):
        assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel
