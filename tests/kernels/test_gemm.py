"""The `gemm` family against float64: tails, strides, epilogues, storage types, instruction sets, threads."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import Gated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fuser
from fuser.codegen.render import header_folder, render
from fuser.ir.evaluation import evaluate
from fuser.ir.expression import Builder, Expression, Op, layer_norm, rms_norm, softmax, unary
from fuser.ir.graph import Constant, Operator, OperatorGraph, TensorSpec
from fuser.ir.operators import Activation, Bias, Gemm, Norm, Residual
from fuser.ir.target import Isa, Target, emulated_target
from fuser.kernels import gemm
from fuser.kernels.base import (
    Access,
    DType,
    KernelCall,
    KernelSpec,
    LibraryCall,
    LibraryParameters,
    Operand,
    materialized,
)
from fuser.kernels.gemm import (
    CpuGemm,
    GatedGemmParameters,
    GemmExtents,
    GemmFamily,
    GemmMatch,
    GemmParameters,
    OneDnnGemm,
    pack,
    unpack,
)
from fuser.kernels.operands import OperandExtents
from fuser.runtime.abi import KernelArgs
from fuser.runtime.build import build
from fuser.runtime.cache import KernelCache, default_cache
from fuser.runtime.cpuinfo import cpu_flags, detect_isa
from fuser.runtime.library import Kernel, load

NATIVE = detect_isa()
ISAS = {
    Isa.AVX512: (Isa.AVX512, Isa.AVX2, Isa.PORTABLE),
    Isa.AVX2: (Isa.AVX2, Isa.PORTABLE),
}.get(NATIVE, (NATIVE,))
MATRIX = Operand(Access.MATRIX, DType.F32)
COLUMN = Operand(Access.COLUMN, DType.F32)
PERIODIC = Operand(Access.MATRIX, DType.F32, periodic=True)
# One element of a result may be off by a few roundings where eager's happens to be exact.
FLOOR = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 2.0**-10}


def target(isa: Isa = NATIVE, features: frozenset[str] = frozenset()) -> Target:
    return Target("cpu", isa.value, features, 2, (32 << 10, 1 << 20, 32 << 20), 1e11, 2e10, 1e-6)


def _expression(make: Callable[[Builder, int], Sequence[int]]) -> Expression:
    b = Builder()
    return b.build(*make(b, b.input(0)))


def _post_norm(b: Builder, x: int) -> Sequence[int]:
    total = b.apply(Op.ADD, b.apply(Op.ADD, x, b.input(1)), b.input(2))
    return b.inline(layer_norm(1e-5), (total, b.input(3), b.input(4)))


def _pre_norm(b: Builder, x: int) -> Sequence[int]:
    total = b.apply(Op.ADD, x, b.input(1))
    return [total, *b.inline(rms_norm(1e-6), (total, b.input(2)))]


def _norm_of_norm(b: Builder, x: int) -> Sequence[int]:
    """What one pass needs of the one before changes from pass to pass."""
    total = b.apply(Op.ADD, b.apply(Op.GELU, x), b.input(1))
    (first,) = b.inline(rms_norm(1e-6), (total, b.input(2)))
    return b.inline(layer_norm(1e-5, bias=False), (b.apply(Op.TANH, first), b.input(2)))


def _sum_and_softmax(b: Builder, x: int) -> Sequence[int]:
    """The last pass needs a norm, the sum that it is of, and an operand that a pass before it has read."""
    total = b.apply(Op.ADD, b.apply(Op.GELU, x), b.input(1))
    (normal,) = b.inline(layer_norm(1e-5), (total, b.input(2), b.input(3)))
    return [b.apply(Op.ADD, normal, b.input(1)), *b.inline(softmax(), (normal,)), total]


IDENTITY = _expression(lambda b, x: [x])
BIAS = _expression(lambda b, x: [b.apply(Op.ADD, x, b.input(1))])
# (expression, operands, kind of every operand: "row" is a bias, "full" a residual, "periodic", "column")
EPILOGUES: dict[str, tuple[Expression, tuple[str, ...]]] = {
    "none": (IDENTITY, ()),
    "bias": (BIAS, ("row",)),
    "bias_gelu": (_expression(lambda b, x: [b.apply(Op.GELU, b.apply(Op.ADD, x, b.input(1)))]), ("row",)),
    "relu_residual": (_expression(lambda b, x: [b.apply(Op.ADD, b.apply(Op.RELU, x), b.input(1))]), ("full",)),
    "positions": (BIAS, ("periodic",)),
    "row_scale": (_expression(lambda b, x: [b.apply(Op.MUL, x, b.input(1))]), ("column",)),
    "gated": (_expression(lambda b, x: [b.apply(Op.MUL, b.apply(Op.SILU, x), b.input(1))]), ("full",)),
    "post_norm": (_expression(_post_norm), ("row", "full", "row", "row")),
    "sum_and_norm": (_expression(_pre_norm), ("full", "row")),
    "norm_of_norm": (_expression(_norm_of_norm), ("full", "row")),
    "sum_and_softmax": (_expression(_sum_and_softmax), ("full", "row", "row")),
    "softmax": (_expression(lambda b, x: b.inline(softmax(), (x,))), ()),
}
_OPERANDS = {"row": MATRIX, "full": MATRIX, "periodic": PERIODIC, "column": COLUMN}
PERIOD = 5


@dataclass(frozen=True)
class Case:
    isa: Isa
    n: int
    k: int
    epilogue: str
    a_dtype: DType = DType.F32
    w_dtype: DType = DType.F32
    out_dtype: DType = DType.F32
    features: frozenset[str] = frozenset()
    tile: tuple[int, int] | None = None

    @property
    def parameters(self) -> GemmParameters:
        expression, kinds = EPILOGUES[self.epilogue]
        mr, vectors = self.tile or (None, None)
        made = gemm.parameters(
            self.n,
            self.k,
            expression,
            [_OPERANDS[kind] for kind in kinds],
            [self.out_dtype] * len(expression.outputs),
            target(self.isa, self.features),
            a_dtype=self.a_dtype,
            w_dtype=self.w_dtype,
            mr=mr,
            vectors=vectors,
            depth=128,
        )
        # Small products on several threads, and several cache blocks of rows.
        return dataclasses.replace(made, serial_below=0, mc=2 * made.mr)

    def __str__(self) -> str:
        names = [self.isa.value, str(self.n), str(self.k), self.epilogue, self.a_dtype.value, self.w_dtype.value]
        return "-".join([*names, *self.features, *map(str, self.tile or ())])


SHAPES = [(1, 1), (3, 5), (17, 33), (100, 64), (769, 131), (48, 700), (33, 0)]
TAILS = [Case(NATIVE, n, k, "bias") for n, k in SHAPES]
TAILS += [Case(isa, n, k, "bias") for isa in ISAS if isa is not NATIVE for n, k in ((17, 33), (100, 300))]
TAILS += [Case(NATIVE, 100, 64, "bias", tile=tile) for tile in gemm._TILES[NATIVE][1:]]
FUSED = [Case(NATIVE, 100, 70, name) for name in EPILOGUES]
FUSED += [
    Case(isa, 41, 70, name)
    for isa in ISAS
    if isa is not NATIVE
    for name in ("bias_gelu", "sum_and_norm", "norm_of_norm")
]
BF16 = [
    Case(NATIVE, 100, 131, "bias_gelu", DType.BF16, DType.BF16, DType.BF16),
    Case(NATIVE, 100, 131, "post_norm", DType.F32, DType.BF16, DType.F32),
    Case(ISAS[-1], 100, 131, "bias", DType.BF16, DType.BF16, DType.BF16),
]
if "avx512_bf16" in cpu_flags() and NATIVE is Isa.AVX512:
    FEATURES = frozenset({"avx512_bf16"})
    BF16 += [
        Case(NATIVE, n, k, "bias_gelu", DType.BF16, DType.BF16, DType.BF16, FEATURES)
        for n, k in ((100, 131), (17, 700), (33, 1))
    ]
SPECIAL = Case(NATIVE, 40, 50, "bias")
ALL = [*TAILS, *FUSED, *BF16, SPECIAL]


def _spec(parameters: GemmParameters) -> KernelSpec:
    return KernelSpec("gemm", "cpu/gemm.cpp.j2", parameters)


@pytest.fixture(scope="module")
def cache() -> KernelCache:
    return default_cache()


@pytest.fixture(scope="module")
def kernels(cache: KernelCache) -> Callable[[Case], Kernel]:
    """Every kernel of this file, built in as few runs of ninja as there are targets."""
    paths: dict[Case, Path] = {}
    for isa, features in {(case.isa, case.features) for case in ALL}:
        specs = {c: _spec(c.parameters) for c in ALL if (c.isa, c.features) == (isa, features)}
        machine = target(isa, features)
        built = build([render(s) for s in specs.values()], machine, headers=header_folder(machine), cache=cache)
        paths |= {case: built[spec.symbol] for case, spec in specs.items()}
    return functools.cache(lambda case: load(paths[case], _spec(case.parameters).symbol))


@dataclass
class Problem:
    """Inputs of one launch; ``a`` may be strided."""

    a: Tensor
    weight: Tensor
    operands: list[Tensor]

    @classmethod
    def make(cls, case: Case, m: int, gap: int = 0, seed: int = 0) -> Problem:
        g = torch.Generator().manual_seed(seed)
        store = torch.full((m, case.k + gap), float("nan"), dtype=case.a_dtype.torch)
        a = store[:, : case.k]
        a.copy_(torch.randn(m, case.k, generator=g))
        shapes = {"row": (case.n,), "full": (m, case.n), "periodic": (PERIOD, case.n), "column": (m, 1)}
        operands = [torch.randn(shapes[kind], generator=g) for kind in EPILOGUES[case.epilogue][1]]
        # Scaled as in a trained layer, so that a softmax does not magnify the logits' roundings.
        weight = torch.randn(case.n, case.k, generator=g) / max(case.k, 1) ** 0.5
        return cls(a, weight.to(case.w_dtype.torch), operands)

    def eager(self, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
        m = len(self.a)
        operands = [x.to(dtype) for x in self.operands]
        for i, kind in enumerate(EPILOGUES[case.epilogue][1]):
            if kind == "periodic":
                operands[i] = operands[i].repeat(-(-m // PERIOD), 1)[:m]
        return EPILOGUES[case.epilogue][0].evaluate(self.a.to(dtype) @ self.weight.to(dtype).t(), *operands)

    def run(self, case: Case, kernel: Kernel, threads: int, gap: int = 0) -> tuple[Tensor, ...]:
        """The kernel's outputs, with ``gap`` untouched columns between their rows; all scratch starts as NaN."""
        p, m = case.parameters, len(self.a)
        packed = pack(self.weight, p.nr, width=p.width)
        stores = [torch.full((m, case.n + gap), float("nan"), dtype=d.torch) for d in p.out_dtypes]
        workspace = torch.full((p.workspace_bytes(threads) // 4 + 16,), float("nan"))
        aligned = workspace.data_ptr() + -workspace.data_ptr() % 64
        operands = tuple(
            OperandExtents(0 if kind == "row" else x.stride(0), PERIOD if kind == "periodic" else m)
            for kind, x in zip(EPILOGUES[case.epilogue][1], self.operands, strict=True)
        )
        extents = GemmExtents(m, self.a.stride(0), operands, tuple(s.stride(0) for s in stores))
        tensors = [self.a, packed, *self.operands, *stores]
        kernel(KernelArgs.pack([t.data_ptr() for t in tensors], extents, threads, aligned))
        assert all(s[:, case.n :].isnan().all() for s in stores)
        return tuple(s[:, : case.n] for s in stores)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def check(case: Case, kernel: Kernel, m: int, threads: int, gap: int = 0) -> tuple[Tensor, ...]:
    problem = Problem.make(case, m, gap, seed=m)
    outputs = problem.run(case, kernel, threads, gap)
    exact = problem.eager(case, torch.float64)
    # A weight in bf16 with activations in fp32 is compared with eager's fp32 on the same numbers.
    dtype = torch.bfloat16 if case.out_dtype is DType.BF16 else torch.float32
    for got, expected, eager in zip(outputs, exact, problem.eager(case, dtype), strict=True):
        assert error(got, expected) <= 2 * error(eager, expected) + FLOOR[dtype]
    return outputs


@pytest.mark.parametrize("case", TAILS, ids=str)
def test_every_tail(case: Case, kernels: Callable[[Case], Kernel]) -> None:
    """All row counts around one and two register tiles, and several cache blocks of rows."""
    kernel, mr = kernels(case), case.parameters.mr
    for m in [*range(1, 2 * mr + 2), 4 * mr + 3, 137]:
        check(case, kernel, m, threads=1 + m % 3, gap=m % 2 * 7)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_epilogues(case: Case, kernels: Callable[[Case], Kernel]) -> None:
    """Every class of operand, reductions and several outputs; the same bits for every number of threads."""
    for m in (1, 2, 9, 64, 150):
        results = [check(case, kernels(case), m, threads, gap=3) for threads in (1, 2, 3, 7)]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_storage(case: Case, kernels: Callable[[Case], Kernel]) -> None:
    for m in (1, 2, 15, 100):
        check(case, kernels(case), m, threads=2, gap=m % 2 * 5)


def test_nothing_to_do(kernels: Callable[[Case], Kernel]) -> None:
    """No rows: nothing is read or written, not even through null addresses."""
    extents = GemmExtents(0, SPECIAL.k, (OperandExtents(0, 1),), (SPECIAL.n,))
    assert kernels(SPECIAL).status(KernelArgs.pack([0, 0, 0, 0], extents, 2)) == 0


def test_empty_sum_is_the_epilogue_of_zero(kernels: Callable[[Case], Kernel]) -> None:
    case = next(c for c in TAILS if c.k == 0)
    problem = Problem.make(case, 4)
    (got,) = problem.run(case, kernels(case), 2)
    assert torch.equal(got, problem.operands[0].expand(4, -1))


def test_nan_and_infinity_reach_their_rows_only(kernels: Callable[[Case], Kernel]) -> None:
    problem = Problem.make(SPECIAL, 9)
    problem.a[2, 3], problem.a[4, 0], problem.a[7, 49] = float("nan"), float("inf"), -float("inf")
    problem.weight[5, 1], problem.weight[6, 2] = float("inf"), float("nan")
    (got,) = problem.run(SPECIAL, kernels(SPECIAL), 2)
    (eager,) = problem.eager(SPECIAL, torch.float32)
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isposinf(), eager.isposinf()) and torch.equal(got.isneginf(), eager.isneginf())
    assert got.isfinite().sum() > 200


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 40),
    st.sampled_from([8, 16, 32, 48]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_packing_round_trip(n: int, k: int, nr: int, transposed: bool, half: bool, pairs: bool) -> None:
    weight = torch.randn(n, k).to(torch.bfloat16 if half else torch.float32)
    weight = weight if transposed else weight.t().contiguous()
    packed = pack(weight, nr, transposed, width=2 if pairs else 1)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, n, k, transposed), weight)
    # Where element (n, k) of the layer lies, and nothing else is there.
    columns = weight if transposed else weight.t()
    flat = packed if pairs else packed.unsqueeze(-1)
    step = flat.shape[-1]
    for i, j in ((0, 0), (n - 1, k - 1), (n // 2, k // 3)):
        if k:
            assert flat[i // nr, j // step, i % nr, j % step] == columns[i, j]
    assert flat.count_nonzero() == columns.count_nonzero()


def test_source_is_a_function_of_the_parameters() -> None:
    first, second = (render(_spec(Case(NATIVE, 100, 70, "post_norm").parameters)) for _ in range(2))
    assert first == second
    lines = first.text.splitlines()
    assert lines[0].startswith("// fuser gemm kernel fuser_gemm_") and "n=100,k=70" in lines[1]
    assert render(_spec(Case(NATIVE, 100, 71, "post_norm").parameters)).symbol != first.symbol


# The family on operator graphs.

ROWS, K, N = (2, 21), 60, 96


def _graph(chain: Sequence[Operator], outputs: Sequence[str], constant_weight: bool = True) -> OperatorGraph:
    f32 = torch.float32
    values = {name: TensorSpec.contiguous((*ROWS, N), f32) for op in chain for name in op.outputs}
    values |= {v: TensorSpec.contiguous((N,), f32) for v in ("bias", "gamma", "beta")}
    values |= {"x": TensorSpec.contiguous((*ROWS, K), f32), "residual": TensorSpec.contiguous((*ROWS, N), f32)}
    values["weight"] = TensorSpec.contiguous((N, K), f32)
    constants = {v: Constant(v) for v in ("bias", "gamma", "beta", *(["weight"] if constant_weight else []))}
    return OperatorGraph(tuple(chain), values, ("x", "residual"), tuple(outputs), constants)


GEMM = Operator("dense", Gemm(transposed=True), ("x", "weight"), ("product",))
ADD_BIAS = Operator("bias", Bias(), ("product", "bias"), ("biased",))
GELU = Operator("gelu", Activation(unary(Op.GELU)), ("biased",), ("active",))
RESIDUAL = Operator("add", Residual(), ("biased", "residual"), ("total",))
NORM = Operator("norm", Norm(layer_norm(1e-5)), ("total", "gamma", "beta"), ("normal",))
INNER = Operator("inner", Norm(rms_norm(1e-6)), ("product", "gamma"), ("inner",))
ADD_INNER = Operator("add", Residual(), ("residual", "inner"), ("total",))


@pytest.mark.parametrize(
    ("chain", "outputs"),
    [
        ([GEMM], ["product"]),
        ([GEMM, ADD_BIAS, GELU], ["active"]),
        ([GEMM, ADD_BIAS, RESIDUAL, NORM], ["total", "normal"]),
        ([GEMM, ADD_BIAS, RESIDUAL, NORM], ["normal"]),
        ([GEMM, INNER, ADD_INNER, NORM], ["total", "normal"]),
    ],
    ids=lambda v: "-".join(getattr(i, "name", i) for i in v),
)
def test_family_runs_a_group(chain: list[Operator], outputs: list[str], cache: KernelCache) -> None:
    graph, machine, family = _graph(chain, outputs), target(), GemmFamily()
    match = family.match(graph.group(chain), machine)
    assert match is not None
    choices = CpuGemm().space(match, machine)
    assert 1 <= len(choices) <= 6 and len(set(choices)) == len(choices)
    assert all(CpuGemm().cost(match, c, machine).seconds(machine) > 0 for c in choices)
    call = CpuGemm().call(match, choices[0], machine, 2)
    assert isinstance(call, KernelCall)
    assert call.outputs == tuple(outputs)

    g = torch.Generator().manual_seed(0)
    values = {n: torch.randn(graph.values[n].shape, generator=g) for n in (*graph.inputs, *graph.constants, "weight")}
    results = {v: torch.empty(graph.values[v].shape) for v in outputs}
    tensors = materialized(call.tensors, {**values, **results})
    source = render(call.spec)
    kernel = load(build([source], machine, headers=header_folder(machine), cache=cache)[source.symbol], source.symbol)
    workspace = torch.empty(call.workspace_bytes // 4 + 16)
    kernel(KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2, workspace.data_ptr()))

    exact, eager = evaluate(match.group, values, torch.float64), evaluate(match.group, values)
    for name in outputs:
        assert error(results[name], exact[name]) <= 2 * error(eager[name], exact[name]) + FLOOR[torch.float32]


@dataclass(frozen=True)
class GatedCase(Gated):
    isa: Isa = NATIVE
    chunked: bool = False

    def match(self, rows: int) -> GemmMatch:
        graph = self.graph(rows)
        match = GemmFamily().match(graph.group(graph.compute), target(self.isa))
        assert match is not None and (match.n, match.products) == (self.n, self.products)
        return match


GATED = [
    GatedCase(40, 33),
    GatedCase(5, 70, products=3),
    GatedCase(17, 300, chunked=True),
    GatedCase(100, 64, transposed=False),
    GatedCase(33, 0),
    GatedCase(50, 131, dtype=torch.bfloat16),
    *(GatedCase(41, 70, isa=isa) for isa in ISAS if isa is not NATIVE),
]


@pytest.mark.parametrize("case", GATED, ids=str)
def test_products_that_meet_in_the_epilogue_are_one_kernel(case: GatedCase, cache: KernelCache) -> None:
    machine, ways = target(case.isa), CpuGemm()
    choices = ways.space(case.match(4), machine)
    assert all(isinstance(choice, GatedGemmParameters) for choice in choices)
    choices = [dataclasses.replace(c, chunk=c.kc // 2, kc=c.kc // 2) for c in choices] if case.chunked else choices
    assert case.chunked == any(c.chunk < c.steps for c in choices)
    sources = {c: render(KernelSpec("gemm", "cpu/gemm.cpp.j2", c)) for c in choices}
    paths = build([*sources.values()], machine, headers=header_folder(machine), cache=cache)
    g = torch.Generator().manual_seed(0)
    for rows in (1, 9, 70):
        match = case.match(rows)
        graph = match.group.graph
        values = {v: torch.randn(graph.values[v].shape, generator=g).to(case.dtype) for v in ("x", "weight")}
        exact, eager = (evaluate(graph, values, precision) for precision in (torch.float64, None))
        (name,) = graph.outputs
        for choice in choices:
            call = ways.call(match, choice, machine, 2)
            assert call.outputs == graph.outputs
            result = torch.full(graph.values[name].shape, float("nan"), dtype=case.dtype)
            tensors = materialized(call.tensors, {**values, name: result})
            workspace = torch.full((call.workspace_bytes // 4 + 16,), float("nan"))
            aligned = workspace.data_ptr() + -workspace.data_ptr() % 64
            symbol = sources[choice].symbol
            args = KernelArgs.pack([t.data_ptr() for t in tensors], call.extents, 2, aligned)
            load(paths[symbol], symbol)(args)
            assert error(result, exact[name]) <= 2 * error(eager[name], exact[name]) + FLOOR[case.dtype]


@pytest.mark.parametrize(
    "change",
    [
        {"part1": TensorSpec((4, 40), torch.float32, (80, 1), "product", 39)},
        {"part1": TensorSpec((4, 40), torch.float32, (80, 1), "product", 0)},
        {"part0": TensorSpec((4, 40), torch.float32, (80, 2), "product", 0)},
        {"part0": TensorSpec((4, 40), torch.float32, (40, 1), "product", 0)},
    ],
    ids=["overlapping", "the same", "every other column", "other rows"],
)
def test_other_parts_of_a_product_are_refused(change: dict[str, TensorSpec]) -> None:
    graph = Gated(40, 33).graph(4)
    graph = dataclasses.replace(graph, values={**graph.values, **change})
    assert GemmFamily().match(graph.group(graph.compute), target()) is None


def test_parts_that_something_else_reads_are_refused() -> None:
    graph = Gated(40, 33).graph(4)
    for outputs in (("gated1", "product"), ("gated1", "part1")):
        other = dataclasses.replace(graph, outputs=outputs)
        assert GemmFamily().match(other.group(other.compute), target()) is None
    match = GatedCase(40, 33).match(4)
    assert OneDnnGemm().space(match, target()) == []


@pytest.mark.parametrize("transposed", [True, False])
def test_library_is_a_choice_and_follows_its_weight(transposed: bool) -> None:
    family, machine = GemmFamily(), target()
    gemm_ = dataclasses.replace(GEMM, semantics=Gemm(transposed))
    graph = _graph([gemm_, ADD_BIAS], ["biased"])
    if not transposed:
        graph = dataclasses.replace(
            graph, values={**graph.values, "weight": TensorSpec.contiguous((K, N), torch.float32)}
        )
    match = family.match(graph.group([gemm_, ADD_BIAS]), machine)
    assert match is not None
    ours, library = CpuGemm(), OneDnnGemm()
    assert library.space(match, machine) == [LibraryParameters(bias=True)] and library.from_library
    fast, slow = (way.cost(match, way.space(match, machine)[0], machine) for way in (ours, library))  # type: ignore[attr-defined]
    assert fast.seconds(machine) < slow.seconds(machine)
    call = library.call(match, LibraryParameters(bias=True), machine, 2)
    assert isinstance(call, LibraryCall) and call.inputs == ("x", "weight", "bias") and call.outputs == ("biased",)

    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(*ROWS, K, generator=g), torch.randn(N, generator=g)
    weight = torch.randn(graph.values["weight"].shape, generator=g)
    run = pickle.loads(pickle.dumps(call.run))
    for other in (weight, weight.clone(), weight.mul_(2)):
        out = torch.full((*ROWS, N), float("nan"))
        run(x, other, bias, out)
        columns = other if transposed else other.t()
        exact = x.double() @ columns.double().t() + bias.double()
        eager = torch.nn.functional.linear(x, columns, bias)
        assert error(out, exact) <= 2 * error(eager, exact) + FLOOR[torch.float32]
        run(x, weight, bias, out)
    fused = family.match(_graph([GEMM, ADD_BIAS, GELU], ["active"]).group([GEMM, ADD_BIAS, GELU]), machine)
    assert fused is not None and not library.space(fused, machine)


def test_family_refuses_what_it_cannot_run() -> None:
    family, machine = GemmFamily(), target()
    second = Operator("dense2", Gemm(transposed=True), ("x", "weight"), ("product2",))
    mixed = Operator("mixed", Residual(), ("product", "product2"), ("total",))
    chains = [
        [GEMM, second, mixed],
        [NORM],
    ]
    for chain in chains:
        graph = _graph(chain, [chain[-1].output])
        assert family.match(graph.group(chain), machine) is None
    run_time_weight = _graph([GEMM], ["product"], constant_weight=False)
    assert family.match(run_time_weight.group([GEMM]), machine) is None
    prologue = Operator("pre", Activation(unary(Op.RELU)), ("x",), ("y",))
    late = dataclasses.replace(GEMM, inputs=("y", "weight"))
    graph = _graph([prologue, late], ["product"])
    graph = dataclasses.replace(graph, values={**graph.values, "y": graph.values["x"]})
    assert family.match(graph.group([prologue, late]), machine) is None


def test_default_tile_wastes_the_fewest_columns() -> None:
    machine = target(Isa.AVX512)
    for n, nr in ((768, 64), (240, 48), (1000, 48), (20, 32), (5, 16), (64, 64)):
        made = gemm.parameters(n, 64, IDENTITY, (), (DType.F32,), machine)
        assert made.nr == nr, n
        assert made.mc % made.mr == 0 and made.kc <= 256


class _Gate(nn.Module):
    """One number a row from a product, read with the rows that it was made of, by itself and in sums."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(64, 1), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Any:
        gate = torch.sigmoid(self.gate(x))
        return gate * x, (gate * x).sum(-1, keepdim=True), self.norm(x + self.gate(x)), gate


@pytest.mark.parametrize("target", ["cpu", emulated_target()], ids=["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_one_column_is_no_row_of_many(target: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = _Gate().eval().to(dtype), torch.randn(5, 7, 64, dtype=dtype)
    with torch.no_grad():
        fast = fuser.optimize(model, search="model", target=target)
        for got, want in zip(fast(x), copy.deepcopy(model).double()(x.double()), strict=True):
            close = 1e-5 if dtype is torch.float32 else 3e-2
            torch.testing.assert_close(got.double(), want, rtol=close, atol=close * float(want.abs().max()))
    assert not fast.fallbacks
